//! [`sum_over_ranks`]: the sum of a step's gradients over all processes.

use crate::tree::subtrees;
use crate::{Group, TreeSum, add_slices, share};

/// Numbers of a shard that a rank adds at a time, at most: 1 MiB. Counts of MPI are 32-bit, buffers stay small, and large blocks
/// over TCP have been seen to stall.
const SHARD: usize = 1 << 18;
/// Numbers added at a time, so that the partial sums stay in the first cache.
const BLOCK: usize = 2048;

/// The sum over the leaves of all ranks, in the order of [`TreeSum`]; the same bits on every rank.
///
/// `present` has a flag for each leaf of the step: whether it has a value. `nodes` are the subtrees of this rank's [`share`] of
/// them, as [`TreeSum::into_values`] returns them. All that are there have the same length, which a rank without any takes
/// from the others.
///
/// Each rank adds one shard of every bucket, for all:
///
/// ```text
/// for each bucket of size * shard numbers:
///     all_to_all    rank r gets shard r of every rank's subtrees
///     add           in the order of the tree
///     all_gather    every rank gets the sums of all shards
/// ```
///
/// so that a rank sends and receives `2 (size - 1) / size` times the gradient, as in a ring, if each rank has one subtree.
///
/// # Shapes
/// `present`: `[leaves]`; each of `nodes`: `[numbers]` -> `[numbers]`.
///
/// # Panics
/// The ranks do not divide the leaves, `nodes` are not those of the share, or their lengths differ.
pub fn sum_over_ranks(group: &dyn Group, present: &[bool], nodes: Vec<Option<Vec<f32>>>) -> Vec<f32> {
    let (leaves, size) = (present.len(), group.size());
    // The subtrees of every rank, and whether one of its leaves has a value.
    let roots: Vec<Vec<Root>> = (0..size)
        .map(|rank| {
            let root = |(start, height)| {
                let leaves = &present[start..start + (1usize << height)];
                Root { start, height, present: leaves.contains(&true) }
            };
            subtrees(share(leaves, rank, size)).into_iter().map(root).collect()
        })
        .collect();
    let own = &roots[group.rank()];
    assert_eq!(own.len(), nodes.len(), "the subtrees of this rank's share");
    assert!(own.iter().zip(&nodes).all(|(root, node)| root.present == node.is_some()), "values are present");
    if size == 1 {
        return add_roots(own, nodes);
    }

    let length = nodes.iter().flatten().next().map_or(0, Vec::len);
    assert!(nodes.iter().flatten().all(|node| node.len() == length), "gradients of one model");
    let lengths = group.gather_numbers(&[length as f64]);
    let length = lengths.iter().fold(0.0, |most: f64, &length| most.max(length)) as usize;
    assert!(lengths.iter().all(|&found| found == 0.0 || found as usize == length), "gradients of one model");

    let rounds = roots.iter().map(Vec::len).max().unwrap_or(0);
    let shard = length.div_ceil(size).clamp(1, SHARD);
    let mut send = vec![0.0f32; size * shard];
    let mut received = vec![vec![0.0f32; size * shard]; rounds];
    let mut sum = Vec::with_capacity(length);
    while sum.len() < length {
        let bucket = sum.len()..(sum.len() + size * shard).min(length);
        for (round, received) in received.iter_mut().enumerate() {
            // What a rank without this subtree sends is not read.
            if let Some(Some(node)) = nodes.get(round) {
                send[..bucket.len()].copy_from_slice(&node[bucket.clone()]);
            }
            group.all_to_all(&send, received);
        }
        add_shards(&roots, &mut received, shard);
        group.all_gather(&received[0][..shard], &mut send);
        sum.extend_from_slice(&send[..bucket.len()]);
    }
    sum
}

/// A subtree of a rank's share.
#[derive(Clone, Copy)]
struct Root {
    start: usize,
    height: u32,
    /// Whether it has a value.
    present: bool,
}

/// The sum of one process's subtrees, which are all.
fn add_roots(roots: &[Root], nodes: Vec<Option<Vec<f32>>>) -> Vec<f32> {
    let mut tree = TreeSum::default();
    for (root, node) in roots.iter().zip(nodes) {
        tree.push_node(root.start, root.height, node, &mut add_slices);
    }
    tree.finish(&mut add_slices).unwrap_or_default()
}

/// Adds the shards of all ranks' subtrees into the first shard of `received`.
///
/// # Shapes
/// `received`: `[rounds][size, shard]`, where `[k][r]` is of subtree `k` of rank `r`.
fn add_shards(roots: &[Vec<Root>], received: &mut [Vec<f32>], shard: usize) {
    for from in (0..shard).step_by(BLOCK) {
        let block = from..(from + BLOCK).min(shard);
        let mut tree = TreeSum::default();
        let mut add = |left: Vec<f32>, right: Vec<f32>| add_slices(left, right);
        for (rank, roots) in roots.iter().enumerate() {
            for (root, received) in roots.iter().zip(&*received) {
                let row = root.present.then(|| received[rank * shard..][block.clone()].to_vec());
                tree.push_node(root.start, root.height, row, &mut add);
            }
        }
        if let Some(sum) = tree.finish(&mut add) {
            received[0][block].copy_from_slice(&sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Alone, Threads};

    /// Numbers over many binades, whose sums depend on the order.
    fn leaf(seed: u64, index: usize, length: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (index as u64 + 1);
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut number = || match next() % 50 {
            0 => -0.0,
            1 => f32::INFINITY * if next() % 2 == 0 { 1.0 } else { -1.0 },
            _ => (next() as i64 as f32) * 2f32.powi((next() % 16) as i32 - 70),
        };
        (0..length).map(|_| number()).collect()
    }

    fn bits(numbers: &[f32]) -> Vec<u32> {
        // Which NaN the sum of two infinities is, is up to the processor.
        numbers.iter().map(|number| if number.is_nan() { 0 } else { number.to_bits() }).collect()
    }

    fn sum_of(group: &dyn Group, seed: u64, present: &[bool], length: usize) -> Vec<u32> {
        let mut tree = TreeSum::default();
        for index in share(present.len(), group.rank(), group.size()) {
            tree.push(index, present[index].then(|| leaf(seed, index, length)), &mut add_slices);
        }
        bits(&sum_over_ranks(group, present, tree.into_values()))
    }

    #[test]
    fn any_number_of_ranks_has_the_bits_of_one() {
        let seed = u64::from(std::process::id());
        for (leaves, length) in [(1, 5), (4, 1), (6, 3001), (8, 4097), (12, 100), (20, 2049)] {
            for absent in [0, 3, 7] {
                let present: Vec<bool> =
                    (0..leaves).map(|i| absent == 0 || i * 5 % 7 % absent != 0).collect();
                if !present.contains(&true) {
                    continue;
                }
                let expected = sum_of(&Alone, seed, &present, length);
                assert_eq!(expected.len(), length);
                for size in (2..=leaves).filter(|size| leaves % size == 0) {
                    for sum in Threads::run(size, |group| sum_of(group, seed, &present, length)) {
                        assert_eq!(sum, expected, "{leaves} leaves on {size} ranks, seed {seed}");
                    }
                }
            }
        }
    }

    #[test]
    fn several_buckets_are_one_sum() {
        let length = 2 * SHARD + 77;
        let expected = sum_of(&Alone, 5, &[true; 2], length);
        for sum in Threads::run(2, |group| sum_of(group, 5, &[true; 2], length)) {
            assert_eq!(sum, expected);
        }
    }

    #[test]
    fn no_leaf_at_all_is_an_empty_sum() {
        for sum in Threads::run(2, |group| sum_over_ranks(group, &[false; 2], vec![None])) {
            assert!(sum.is_empty());
        }
    }
}
