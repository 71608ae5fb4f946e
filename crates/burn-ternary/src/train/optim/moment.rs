//! A tensor of an optimizer's state, which waits for its device after a checkpoint was read.

use burn::optim::{StateSink, StateSource};
use burn::tensor::{Device, Tensor, TensorData};

/// Burn puts the tensors of a record on the default device of the build until the first step, whatever device the run
/// is on: in a build with wgpu, a run on the processor would open the graphics card. So what was read stays data until
/// the device is known.
#[derive(Clone)]
pub(super) enum Moment<const D: usize> {
    Stored(TensorData),
    Placed(Tensor<D>),
}

impl<const D: usize> Moment<D> {
    pub fn placed(self, device: &Device) -> Self {
        Self::Placed(match self {
            Self::Stored(data) => Tensor::from_data(data, device),
            Self::Placed(tensor) => tensor.to_device(device),
        })
    }

    /// # Panics
    /// If it was never placed on a device, which Burn does before each step.
    pub fn into_tensor(self) -> Tensor<D> {
        match self {
            Self::Placed(tensor) => tensor,
            Self::Stored(_) => panic!("a state is moved to the device of its gradient before a step"),
        }
    }

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

    /// `None`: there is no such tensor, or one of another rank.
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
