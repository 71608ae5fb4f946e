//! A tensor of an optimizer's state that is placed on a device at the first step.

use burn::optim::{StateSink, StateSource};
use burn::tensor::{Device, Tensor, TensorData};

/// A moment of a parameter.
///
/// Burn loads the tensors of a record to the default device of the build, not to the device of the run: in a build with wgpu, a run
/// on the CPU would open the GPU. So a loaded moment stays `Stored` until a step names the device.
#[derive(Clone)]
pub(super) enum Moment<const D: usize> {
    Stored(TensorData),
    Placed(Tensor<D>),
}

impl<const D: usize> Moment<D> {
    /// The moment as a tensor on `device`.
    pub fn placed(self, device: &Device) -> Self {
        Self::Placed(match self {
            Self::Stored(data) => Tensor::from_data(data, device),
            Self::Placed(tensor) => tensor.to_device(device),
        })
    }

    /// The tensor on its device.
    ///
    /// # Panics
    /// If it is `Stored`: Burn calls [`placed`](Self::placed) before each step.
    pub fn into_tensor(self) -> Tensor<D> {
        match self {
            Self::Placed(tensor) => tensor,
            Self::Stored(_) => panic!("a state is moved to the device of its gradient before a step"),
        }
    }

    /// Adds the moment to a record, under the name `leaf`.
    pub fn flatten(&self, prefix: &str, leaf: &str, out: &mut StateSink) {
        out.push_tensor(
            prefix,
            leaf,
            match self {
                Self::Stored(data) => data.clone(),
                Self::Placed(tensor) => tensor.to_data(),
            },
        );
    }

    /// The moment `leaf` of a record; `None` if there is no such tensor, or one of another rank.
    pub fn unflatten(prefix: &str, leaf: &str, source: &mut StateSource) -> Option<Self> {
        let data = source.take_tensor(prefix, leaf)?;
        (data.rank() == D).then_some(Self::Stored(data))
    }
}

impl<const D: usize> From<Tensor<D>> for Moment<D> {
    fn from(tensor: Tensor<D>) -> Self {
        Self::Placed(tensor)
    }
}
