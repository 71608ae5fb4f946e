//! [`AttentionShape`]: lengths and indices of the tensors of an attention.

/// Shape of an attention: `[batch, seq, heads * width]` queries over `[batch, seq, kv_heads * width]` keys and values.
///
/// Query head `h` reads the keys and values of head `h / (heads / kv_heads)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Number of sequences.
    pub batch: usize,
    /// Positions per sequence.
    pub seq: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; `heads` is a multiple of it.
    pub kv_heads: usize,
    /// Components per head.
    pub width: usize,
}

impl AttentionShape {
    /// Number of elements of the queries, and of the output.
    pub fn queries(&self) -> usize {
        self.batch * self.seq * self.heads * self.width
    }

    /// Number of elements of the keys, and of the values.
    pub fn keys(&self) -> usize {
        self.batch * self.seq * self.kv_heads * self.width
    }

    /// Number of rows of scores: one per sequence, head and position.
    pub fn rows(&self) -> usize {
        self.batch * self.heads * self.seq
    }

    /// Query heads per key-value head.
    pub(super) fn share(&self) -> usize {
        assert!(self.heads.is_multiple_of(self.kv_heads), "{} heads of {}", self.heads, self.kv_heads);
        self.heads / self.kv_heads
    }

    /// `1 / sqrt(width)`
    pub(super) fn scale(&self) -> f32 {
        (self.width as f32).sqrt().recip()
    }

    /// Index of the first number of a head at a position, in a tensor of `heads` heads.
    pub(super) fn at(&self, sequence: usize, position: usize, head: usize, heads: usize) -> usize {
        ((sequence * self.seq + position) * heads + head) * self.width
    }
}
