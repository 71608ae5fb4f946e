//! [`WeightType`]: how a file stores the weight matrices of the transformer blocks.

use crate::Encoding;
use std::{fmt, str::FromStr};

/// The storage type of the weight matrices in the transformer blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightType {
    /// A GGML type: F32 or F16 in every kind of file; in GGUF files and archives also Q8_0, Q4_0, TQ1_0, TQ2_0 and
    /// Q2_0.
    Encoded(Encoding),
    /// `BITNET`: packed ternary codes of a Hugging Face folder, with one scale per matrix.
    Bitnet,
    /// `INT2`: ONNX's 2-bit integers, with one scale per row or group.
    Int2,
    /// `MATMULNBITS2` and `MATMULNBITS4`: the operator `MatMulNBits` of onnxruntime, with 2 or 4 bits per weight.
    MatMulNBits(u8),
}

impl fmt::Display for WeightType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Encoded(encoding) => encoding.fmt(f),
            Self::Bitnet => f.write_str("BITNET"),
            Self::Int2 => f.write_str("INT2"),
            Self::MatMulNBits(bits) => write!(f, "MATMULNBITS{bits}"),
        }
    }
}

impl FromStr for WeightType {
    type Err = String;

    /// Parses one of the names above, in any case.
    fn from_str(name: &str) -> Result<Self, String> {
        let others = [Self::Bitnet, Self::Int2, Self::MatMulNBits(2), Self::MatMulNBits(4)];
        let known = others.into_iter().find(|known| known.to_string().eq_ignore_ascii_case(name));
        known.map_or_else(
            || {
                let encoding = name.parse().map(Self::Encoded);
                encoding.map_err(|error: String| format!("{error}, BITNET, INT2, MATMULNBITS2, MATMULNBITS4"))
            },
            Ok,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weight_types_parse_from_their_names() {
        let types =
            [WeightType::Bitnet, WeightType::Int2, WeightType::MatMulNBits(2), WeightType::MatMulNBits(4)];
        for known in types.into_iter().chain([WeightType::Encoded(Encoding::Tq2_0)]) {
            assert_eq!(known.to_string().to_lowercase().parse(), Ok(known));
        }
        assert!("INT3".parse::<WeightType>().unwrap_err().contains("INT2"));
    }
}
