//! [`TreeSum`]: adds values in the order of a fixed binary tree.

use std::ops::Range;

/// Adds the values of leaves in the order of a binary tree: two neighbours of equal height are added as soon as the left one
/// begins at a multiple of twice its length, and at the end what is left is added from the right.
///
/// The tree depends on the indices of the leaves alone. A run of leaves is summed by as few subtrees as its ends allow, and
/// another process can add these subtrees: the bits are those of one process that adds all leaves. Holds at most one value
/// per height and end.
///
/// A leaf may be absent (`None`); then its neighbour counts for both. That is not adding zero, which turns -0 into 0.
#[derive(Debug)]
pub struct TreeSum<T> {
    nodes: Vec<Node<T>>,
}

/// The sum of the leaves `start..start + 2^height`.
#[derive(Debug)]
struct Node<T> {
    start: usize,
    height: u32,
    value: Option<T>,
}

impl<T> Default for TreeSum<T> {
    fn default() -> Self {
        Self { nodes: Vec::new() }
    }
}

impl<T> TreeSum<T> {
    /// Adds the next leaf, which is number `index`; `add` returns the sum of a left and a right value.
    pub fn push(&mut self, index: usize, value: Option<T>, add: &mut impl FnMut(T, T) -> T) {
        self.push_node(index, 0, value, add);
    }

    /// Adds the sum of the next `2^height` leaves, from leaf `start` on, a multiple of their number.
    pub(crate) fn push_node(
        &mut self,
        start: usize,
        height: u32,
        value: Option<T>,
        add: &mut impl FnMut(T, T) -> T,
    ) {
        self.nodes.push(Node { start, height, value });
        while let [.., left, right] = &self.nodes[..]
            && left.height == right.height
            && left.start.is_multiple_of(2 << left.height)
        {
            self.join(add);
        }
    }

    /// Replaces the last two nodes by their sum.
    fn join(&mut self, add: &mut impl FnMut(T, T) -> T) {
        let (Some(right), Some(left)) = (self.nodes.pop(), self.nodes.pop()) else { return };
        let value = match (left.value, right.value) {
            (Some(left), Some(right)) => Some(add(left, right)),
            (left, right) => left.or(right),
        };
        self.nodes.push(Node { start: left.start, height: left.height.max(right.height) + 1, value });
    }

    /// The sum of all leaves; `None` where none has a value.
    pub fn finish(mut self, add: &mut impl FnMut(T, T) -> T) -> Option<T> {
        while self.nodes.len() > 1 {
            self.join(add);
        }
        self.nodes.pop()?.value
    }

    /// The sums of the subtrees so far, in the order of their leaves.
    pub fn into_values(self) -> Vec<Option<T>> {
        self.nodes.into_iter().map(|node| node.value).collect()
    }
}

/// The subtrees that the leaves of `range` fill: start and height of each, in the order of their leaves.
pub(crate) fn subtrees(range: Range<usize>) -> Vec<(usize, u32)> {
    let mut tree = TreeSum::default();
    for index in range {
        tree.push(index, None::<()>, &mut |(), ()| ());
    }
    tree.nodes.iter().map(|node| (node.start, node.height)).collect()
}

/// The leaves of rank `rank` of `size` processes that share `leaves` evenly.
///
/// # Panics
/// `size` does not divide `leaves`.
pub fn share(leaves: usize, rank: usize, size: usize) -> Range<usize> {
    assert!(leaves.is_multiple_of(size), "{leaves} leaves for {size} processes");
    let count = leaves / size;
    rank * count..(rank + 1) * count
}

/// Adds `right` to `left`, number by number: an `add` for [`TreeSum`].
pub fn add_slices<A: AsMut<[f32]>, B: AsRef<[f32]>>(mut left: A, right: B) -> A {
    for (sum, number) in left.as_mut().iter_mut().zip(right.as_ref()) {
        *sum += number;
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    fn formula(leaves: Range<usize>, absent: &[usize]) -> Option<String> {
        let mut tree = TreeSum::default();
        let add = &mut |left: String, right: String| format!("({left} {right})");
        for index in leaves {
            tree.push(index, (!absent.contains(&index)).then(|| index.to_string()), add);
        }
        tree.finish(add)
    }

    #[test]
    fn the_tree_is_that_of_the_documentation() {
        for (leaves, expected) in [
            (1, "0"),
            (2, "(0 1)"),
            (3, "((0 1) 2)"),
            (4, "((0 1) (2 3))"),
            (6, "(((0 1) (2 3)) (4 5))"),
            (7, "(((0 1) (2 3)) ((4 5) 6))"),
        ] {
            assert_eq!(formula(0..leaves, &[]).unwrap(), expected);
        }
        assert_eq!(formula(0..6, &[1, 2, 3]).unwrap(), "(0 (4 5))");
        assert_eq!(formula(0..3, &[0, 1, 2]), None);
        assert_eq!(formula(0..0, &[]), None);
    }

    #[test]
    fn shares_of_any_size_are_subtrees_of_one_tree() {
        let add = &mut |left: String, right: String| format!("({left} {right})");
        for leaves in 1..=40 {
            let expected = formula(0..leaves, &[]);
            for size in (1..=leaves).filter(|size| leaves.is_multiple_of(*size)) {
                let mut tree = TreeSum::default();
                for rank in 0..size {
                    let mut own = TreeSum::default();
                    for index in share(leaves, rank, size) {
                        own.push(index, Some(index.to_string()), add);
                    }
                    let roots = subtrees(share(leaves, rank, size));
                    let values = own.into_values();
                    assert_eq!(roots.len(), values.len());
                    for ((start, height), value) in roots.into_iter().zip(values) {
                        tree.push_node(start, height, value, add);
                    }
                }
                assert_eq!(tree.finish(add), expected, "{leaves} leaves, {size} ranks");
            }
        }
    }

    #[test]
    fn an_even_share_of_a_power_of_two_is_one_subtree() {
        assert_eq!(subtrees(8..16), [(8, 3)]);
        assert_eq!(subtrees(3..6), [(3, 0), (4, 1)]);
        assert_eq!(subtrees(5..10), [(5, 0), (6, 1), (8, 1)]);
    }
}
