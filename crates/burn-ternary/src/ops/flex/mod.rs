//! What the fused ops share on the CPU backend Flex: threads, and tensors as slices.
//!
//! Fused ops take f32 tensors, and pass other types to the default bodies, which are their oracle. Sums run over fixed blocks
//! and are added in order, so a result does not depend on the number of threads.

mod memory;

pub(super) use memory::{bytes_from_buffer, from_buffer};

use burn::tensor::{Bytes, DType, Shape};
use burn_flex::{FlexTensor, Layout};
use std::{
    io,
    sync::{LazyLock, OnceLock},
};
use ternary_kernels::{Pool, TensorBuffer};

/// As many threads as rayon has, which flex computes on. Idle threads spin for a while: a step consists of a thousand short
/// tasks, and waking a thread for each took a twentieth of it.
pub(super) static POOL: LazyLock<&'static Pool> =
    LazyLock::new(|| STARTED.get_or_init(|| Pool::new(rayon::current_num_threads())));

static STARTED: OnceLock<Pool> = OnceLock::new();

/// Starts these threads unless they run already, so that a failure is an error instead of a panic later.
pub(crate) fn start_threads(threads: usize) -> io::Result<()> {
    if STARTED.get().is_none() {
        let pool = Pool::try_new(threads)?;
        // If another thread was first, this pool ends here.
        let _ = STARTED.set(pool);
    }
    Ok(())
}

pub(super) fn is_f32(tensors: &[&FlexTensor]) -> bool {
    tensors.iter().all(|tensor| tensor.dtype() == DType::F32)
}

/// The tensor in contiguous memory.
pub(super) fn dense(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
}

/// The values of a dense tensor.
pub(super) fn values(tensor: &FlexTensor) -> &[f32] {
    let start = tensor.layout().start_offset();
    &tensor.storage::<f32>()[start..start + tensor.layout().num_elements()]
}

/// Token ids of any integer type.
pub(super) fn indices(ids: FlexTensor) -> Vec<usize> {
    let ids = dense(ids);
    let part = ids.layout().start_offset()..;
    let count = ids.layout().num_elements();
    match ids.dtype() {
        DType::I64 => ids.storage::<i64>()[part].iter().take(count).map(|id| *id as usize).collect(),
        DType::I32 => ids.storage::<i32>()[part].iter().take(count).map(|id| *id as usize).collect(),
        dtype => panic!("token ids are i32 or i64, not {dtype:?}"),
    }
}

pub(super) fn shape(tensor: &FlexTensor) -> Shape {
    tensor.layout().shape().clone()
}

pub(super) fn from_vec(values: Vec<f32>, shape: Shape) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape), DType::F32)
}

/// A buffer with as many elements as a tensor.
pub(super) fn buffer_like(like: &FlexTensor) -> TensorBuffer {
    TensorBuffer::new(like.layout().num_elements())
}

/// The same values in memory that only this tensor uses; copied if another tensor shares it.
pub(super) fn into_owned(mut tensor: FlexTensor) -> FlexTensor {
    let whole = tensor.layout().start_offset() == 0
        && tensor.storage::<f32>().len() == tensor.layout().num_elements();
    if whole && tensor.is_contiguous() && tensor.try_storage_mut::<f32>().is_some() {
        return tensor;
    }
    let tensor = dense(tensor);
    let mut copy = buffer_like(&tensor);
    POOL.copy(values(&tensor), &mut copy);
    from_buffer(copy, shape(&tensor))
}
