//! Row orders of rotary attention.
//!
//! RoPE rotates pairs of components of a head. In memory, component `i` is paired with `i + head_dim / 2` (half
//! rotation, NEOX). llama.cpp pairs `2i` with `2i + 1` in its llama architecture (interleaved, NORM), and uses half
//! rotation in bitnet. Attention scores do not depend on the order of components, as long as queries and keys share
//! it. So the rows of `attn_q` and `attn_k` are permuted within each head, here for `head_dim = 8`:
//!
//! ```text
//! half rotation, in memory:    0 1 2 3 | 4 5 6 7         pairs (0,4) (1,5) (2,6) (3,7)
//! interleaved, in llama files: 0 4 1 5 2 6 3 7           numbers of the rows in memory; pairs are adjacent
//! ```

/// Row of the interleaved order that stores row `row` of the half-rotation order.
pub(crate) fn interleaved_row(row: usize, head_dim: usize) -> usize {
    let (start, within) = (row / head_dim * head_dim, row % head_dim);
    let half = head_dim / 2;
    start + 2 * (within % half) + within / half
}

/// The inverse of [`interleaved_row`].
pub(crate) fn half_rotation_row(row: usize, head_dim: usize) -> usize {
    let (start, within) = (row / head_dim * head_dim, row % head_dim);
    start + within % 2 * (head_dim / 2) + within / 2
}
