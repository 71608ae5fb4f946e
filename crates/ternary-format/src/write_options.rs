//! [`WriteOptions`]: storage types of a written model.

use crate::{Encoding, Tensor, WeightType};
use getset::WithSetters;

/// Storage types of a written model. `None` selects the smallest type of the file kind that keeps every value.
///
/// ```
/// use ternary_format::{Encoding, WeightType, WriteOptions};
///
/// let options = WriteOptions::default().with_weights(Some(WeightType::Encoded(Encoding::Q8_0)));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, WithSetters)]
#[getset(set_with = "pub")]
#[non_exhaustive]
pub struct WriteOptions {
    /// Matrices of the transformer blocks. The default is TQ2_0 in GGUF files (Q2_0 if rows do not fit), BITNET in
    /// folders, INT2 in ONNX files, and the types of the model in archives.
    pub weights: Option<WeightType>,
    /// Token embedding and untied output head. The default is the type of the model where the file kind supports it,
    /// else F32.
    pub embedding: Option<Encoding>,
}

impl WriteOptions {
    /// Storage type of an embedding table in a kind of file that supports the encodings `known`.
    pub(crate) fn table(&self, table: &Tensor, known: &[Encoding]) -> Encoding {
        let own = Some(table.encoding()).filter(|own| known.contains(own));
        self.embedding.or(own).unwrap_or(Encoding::F32)
    }
}
