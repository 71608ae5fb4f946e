use crate::quant::scale_rule::Rule;

/// `scale = mean |w|`; under sparsity, of the kept weights.
///
/// # Source
/// Ma et al., The Era of 1-bit LLMs (BitNet b1.58), equations 1 to 3.
pub(super) struct Absmean;

impl Rule for Absmean {}
