//! Float block layouts: Q8_0, Q4_0, Q4_1, Q4_K and Q6_K.
//!
//! ```text
//! Q8_0   32 weights,  34 bytes: [scale: 2] [codes, i8: 32]                          value = scale * code
//! Q4_0   32 weights,  18 bytes: [scale: 2] [codes: 16]                              value = scale * (code - 8)
//! Q4_1   32 weights,  20 bytes: [scale: 2] [min: 2] [codes: 16]                     value = scale * code + min
//! Q4_K  256 weights, 144 bytes: [scale: 2] [min: 2] [8 x (scale, min), 6 bits: 12] [codes: 128]
//!                               value = scale * s(j) * code - min * m(j)            j: 32 weights each
//! Q6_K  256 weights, 210 bytes: [low 4 bits: 128] [high 2 bits: 64] [16 scales, i8: 16] [scale: 2]
//!                               value = scale * s(j) * (code - 32)                  j: 16 weights each
//! ```
//!
//! Byte `i` of 4-bit codes stores weight `i` in its low half and weight `i + 16` (Q4_K: `i + 32`, in each 64 weights)
//! in its high half. Q6_K has two halves of 128 weights each: weight `l + 32 q` has its low bits in nibble `q / 2` of
//! byte `l + 32 (q mod 2)`, and its high bits at bits `2q` of byte `l`.
//!
//! # Source
//! `ggml-quants.c` of llama.cpp, functions `quantize_row_*_ref` and `dequantize_row_*`.

use crate::Encoding;
use half::f16;

/// Reads the values of a block.
///
/// # Shapes
/// values `[block_weights]`
pub(crate) fn decode_block(encoding: Encoding, block: &[u8], values: &mut [f32]) {
    let f16_at = |i: usize| f16::from_le_bytes([block[i], block[i + 1]]).to_f32();
    match encoding {
        Encoding::Q4_1 => {
            let (scale, least) = (f16_at(0), f16_at(2));
            nibbles(&block[4..], values, |code| f32::from(code) * scale + least);
        }
        Encoding::Q4K => {
            let (scale, least) = (f16_at(0), f16_at(2));
            let sixes = &block[4..16];
            let groups = values.chunks_exact_mut(64).zip(block[16..].chunks_exact(32)).enumerate();
            for (i, (values, codes)) in groups {
                let [low, high] = [2 * i, 2 * i + 1].map(|j| {
                    let (s, m) = six_bits(sixes, j);
                    (scale * f32::from(s), least * f32::from(m))
                });
                for (h, (half, (scale, least))) in values.chunks_exact_mut(32).zip([low, high]).enumerate() {
                    for (value, &byte) in half.iter_mut().zip(codes) {
                        *value = scale * f32::from((byte >> (4 * h)) & 15) - least;
                    }
                }
            }
        }
        _ => {
            let (mut codes, mut factors) = ([0; 256], [0; 16]);
            let codes = &mut codes[..values.len()];
            let scale = decode_codes(encoding, block, codes, &mut factors[..values.len() / 16]).to_f32();
            let groups = values.chunks_exact_mut(16).zip(codes.chunks_exact(16));
            for ((values, codes), &factor) in groups.zip(&factors) {
                let scale = scale * f32::from(factor);
                values.iter_mut().zip(codes).for_each(|(value, &code)| *value = scale * f32::from(code));
            }
        }
    }
}

/// Reads the integer codes and factors of a block of Q8_0, Q4_0 or Q6_K, and returns its scale. A value is `scale *
/// factor * code`.
///
/// # Shapes
/// codes `[block_weights]`, factors `[block_weights / 16]` (all 1 except in Q6_K)
///
/// # Panics
/// If the encoding is another one.
pub(crate) fn decode_codes(encoding: Encoding, block: &[u8], codes: &mut [i8], factors: &mut [i8]) -> f16 {
    let f16_at = |i: usize| f16::from_le_bytes([block[i], block[i + 1]]);
    factors.fill(1);
    match encoding {
        Encoding::Q8_0 => codes.iter_mut().zip(&block[2..]).for_each(|(code, &byte)| *code = byte as i8),
        Encoding::Q4_0 => {
            let (low, high) = codes.split_at_mut(16);
            for ((low, high), &byte) in low.iter_mut().zip(high).zip(&block[2..]) {
                (*low, *high) = ((byte & 15) as i8 - 8, (byte >> 4) as i8 - 8);
            }
        }
        Encoding::Q6K => {
            for (h, codes) in codes.chunks_exact_mut(128).enumerate() {
                let (low, high) = (&block[64 * h..64 * h + 64], &block[128 + 32 * h..160 + 32 * h]);
                for (i, code) in codes.iter_mut().enumerate() {
                    let (quarter, l) = (i / 32, i % 32);
                    let four = (low[i % 64] >> (4 * (quarter / 2))) & 15;
                    let two = (high[l] >> (2 * quarter)) & 3;
                    *code = (four | (two << 4)) as i8 - 32;
                }
            }
            factors.iter_mut().zip(&block[192..208]).for_each(|(factor, &byte)| *factor = byte as i8);
            return f16_at(208);
        }
        _ => panic!("{encoding} has no blocks of integers"),
    }
    f16_at(0)
}

/// Values of 4-bit codes: all low halves, then all high halves.
fn nibbles(codes: &[u8], values: &mut [f32], value: impl Fn(u8) -> f32) {
    let (low, high) = values.split_at_mut(codes.len());
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(codes) {
        (*low, *high) = (value(byte & 15), value(byte >> 4));
    }
}

/// Scale and minimum `j` of a Q4_K block, 6 bits each (`get_scale_min_k4` in llama.cpp).
fn six_bits(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        ((packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4), (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4))
    }
}

/// Rounds values to a block of Q8_0 or Q4_0, to the bit as GGML does.
pub(crate) fn encode_block(encoding: Encoding, values: &[f32], block: &mut [u8]) {
    // The first value of the largest magnitude. Its sign is kept: in Q4_0 it becomes the code -8.
    let largest = values.iter().fold(0.0f32, |most, &v| if most.abs() < v.abs() { v } else { most });
    let divisor = if encoding == Encoding::Q8_0 { 127.0 } else { -8.0 };
    let largest = if encoding == Encoding::Q8_0 { largest.abs() } else { largest };
    let scale = largest / divisor;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let codes: [i8; 32] = std::array::from_fn(|i| {
        let x = values[i] * inverse;
        if encoding == Encoding::Q8_0 { x.round() as i8 } else { ((x + 8.5) as i8).min(15) - 8 }
    });
    encode_codes(encoding, &codes, f16::from_f32(scale), block);
}

/// Writes codes of a block of Q8_0 or Q4_0 (-8 to 7) and their scale without rounding.
pub(crate) fn encode_codes(encoding: Encoding, codes: &[i8], scale: f16, block: &mut [u8]) {
    block[..2].copy_from_slice(&scale.to_le_bytes());
    match encoding {
        Encoding::Q8_0 => block[2..].iter_mut().zip(codes).for_each(|(byte, &code)| *byte = code as u8),
        Encoding::Q4_0 => {
            let (low, high) = codes.split_at(16);
            for ((byte, low), high) in block[2..].iter_mut().zip(low).zip(high) {
                *byte = (low + 8) as u8 | (((high + 8) as u8) << 4);
            }
        }
        _ => panic!("{encoding} has no codes with a scale"),
    }
}
