//! A [`TensorBuffer`] as the memory of a tensor.

#![allow(unsafe_code)] // Burn's allocator interface requires it.

use burn::tensor::{Bytes, DType, Shape};
use burn_flex::{FlexTensor, Layout};
use burn_std::{AccessError, AccessPolicy, AllocationController, AllocationProperty};
use std::mem::MaybeUninit;
use ternary_kernels::TensorBuffer;

/// A tensor of the values of a buffer. Dropping the tensor returns the buffer to the cache.
pub(crate) fn from_buffer(buffer: TensorBuffer, shape: Shape) -> FlexTensor {
    let len = size_of_val::<[f32]>(&buffer);
    FlexTensor::new(owned(buffer, len), Layout::contiguous(shape), DType::F32)
}

/// A tensor of the first `len` bytes of a buffer, `[len]`.
pub(crate) fn bytes_from_buffer(buffer: TensorBuffer, len: usize) -> FlexTensor {
    FlexTensor::new(owned(buffer, len), Layout::contiguous(Shape::new([len])), DType::I8)
}

fn owned(buffer: TensorBuffer, len: usize) -> Bytes {
    assert!(len <= size_of_val::<[f32]>(&buffer), "{len} bytes of a shorter buffer");
    // SAFETY: the buffer has that many bytes, and every f32 of it is initialized.
    unsafe { Bytes::from_controller(Box::new(Owner(buffer)), len) }
}

struct Owner(TensorBuffer);

impl AllocationController for Owner {
    fn alloc_align(&self) -> usize {
        align_of::<f32>()
    }

    fn property(&self) -> AllocationProperty {
        AllocationProperty::Other
    }

    unsafe fn memory_mut(&mut self, _policy: AccessPolicy) -> Result<&mut [MaybeUninit<u8>], AccessError> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.0);
        // SAFETY: the same bytes; the caller promises to write initialized ones only.
        Ok(unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), bytes.len()) })
    }

    fn memory(&self, _policy: AccessPolicy) -> Result<&[MaybeUninit<u8>], AccessError> {
        let bytes: &[u8] = bytemuck::cast_slice(&self.0);
        // SAFETY: the same bytes; `MaybeUninit` also allows initialized bytes.
        Ok(unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_copy_leaves_its_tensor_alone() {
        for n in [3, 100_000] {
            let mut buffer = TensorBuffer::new(2 * n);
            buffer.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
            let tensor = from_buffer(buffer, Shape::new([2, n]));
            let mut copy = tensor.clone();
            copy.storage_mut::<f32>()[1] = -1.0;
            assert_eq!((tensor.storage::<f32>()[1], copy.storage::<f32>()[1]), (1.0, -1.0));
            assert_eq!(tensor.storage::<f32>(), (0..2 * n).map(|i| i as f32).collect::<Vec<_>>());
            assert_eq!(copy.storage::<f32>()[2..], tensor.storage::<f32>()[2..]);
        }
    }
}
