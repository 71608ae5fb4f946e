//! A [`Room`] as the memory of a tensor.

#![allow(unsafe_code)] // Burn's interface for owners of memory asks for it.

use burn::tensor::{Bytes, DType, Shape};
use burn_flex::{FlexTensor, Layout};
use burn_std::{AccessError, AccessPolicy, AllocationController, AllocationProperty};
use std::mem::MaybeUninit;
use ternary_kernels::Room;

/// The numbers of a room as a tensor, whose end gives the room back.
pub(super) fn filled(room: Room, shape: Shape) -> FlexTensor {
    let len = size_of_val::<[f32]>(&room);
    FlexTensor::new(owned(room, len), Layout::contiguous(shape), DType::F32)
}

/// The first `len` of its bytes, in one row.
pub(super) fn bytes(room: Room, len: usize) -> FlexTensor {
    FlexTensor::new(owned(room, len), Layout::contiguous(Shape::new([len])), DType::I8)
}

fn owned(room: Room, len: usize) -> Bytes {
    assert!(len <= size_of_val::<[f32]>(&room), "bytes of a room");
    // SAFETY: that many bytes are there, and floats, whichever, are initialized.
    unsafe { Bytes::from_controller(Box::new(Owner(room)), len) }
}

struct Owner(Room);

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
        // SAFETY: the same bytes; initialized ones may be called uninitialized.
        Ok(unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_holds_what_was_written_and_its_copies_are_their_own() {
        for n in [3, 100_000] {
            let mut room = Room::new(2 * n);
            room.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
            let tensor = filled(room, Shape::new([2, n]));
            let mut copy = tensor.clone();
            copy.storage_mut::<f32>()[1] = -1.0;
            assert_eq!((tensor.storage::<f32>()[1], copy.storage::<f32>()[1]), (1.0, -1.0));
            assert_eq!(tensor.storage::<f32>(), (0..2 * n).map(|i| i as f32).collect::<Vec<_>>());
            assert_eq!(copy.storage::<f32>()[2..], tensor.storage::<f32>()[2..]);
        }
    }
}
