//! Ternary block layouts: TQ1_0, TQ2_0 and Q2_0.
//!
//! A block stores codes -1, 0 and +1 (`digit = code + 1` is 0, 1 or 2) and one f16 scale.
//!
//! ```text
//! Q2_0, 64 weights, 18 bytes:    [scale: 2] [digits: 16]
//!     byte b        = sum over i in 0..4 of digit(4b + i) << 2i
//!
//! TQ2_0, 256 weights, 66 bytes:  [digits of weights 0..128: 32] [of 128..256: 32] [scale: 2]
//!     byte m        = sum over p in 0..4 of digit(32p + m) << 2p              weights in a byte are 32 apart
//!
//! TQ1_0, 256 weights, 54 bytes:  [weights 0..160: 32] [160..240: 16] [240..256: 4] [scale: 2]
//!     number(m)     = digit(m) 3^4 + digit(B + m) 3^3 + digit(2B + m) 3^2 + digit(3B + m) 3 + digit(4B + m)
//!     byte m        = ceil(number(m) 256 / 243)            B bytes in the part; the last part has 4 digits per byte
//! ```
//!
//! A byte of TQ1_0 is the fraction `number / 243` in fixed point. Multiplying it by 3 moves the next digit in front
//! of the point, so SIMD code extracts digits without a division.
//!
//! # Source
//! `ggml-quants.c` of llama.cpp, functions `quantize_row_*_ref` and `dequantize_row_*`.

use crate::Encoding;
use half::f16;

/// The three parts of a TQ1_0 block: (first weight, first byte, bytes, digits per byte). Digits of one byte are
/// `bytes` weights apart.
const TQ1_0: [(usize, usize, usize, usize); 3] = [(0, 0, 32, 5), (160, 32, 16, 5), (240, 48, 4, 4)];

/// Reads codes and scale of a block.
///
/// # Shapes
/// codes `[block_weights]`
///
/// # Panics
/// If the encoding has no ternary blocks, or a length is not that of a block.
pub(crate) fn decode_block(encoding: Encoding, block: &[u8], codes: &mut [i8]) -> f16 {
    let scale_at = |i: usize| f16::from_le_bytes([block[i], block[i + 1]]);
    match encoding {
        Encoding::Tq1_0 => {
            assert_eq!((block.len(), codes.len()), (54, 256));
            for (first, at, bytes, digits) in TQ1_0 {
                let packed = &block[at..at + bytes];
                let mut power = 1u8;
                for codes in codes[first..].chunks_exact_mut(bytes).take(digits) {
                    for (code, &byte) in codes.iter_mut().zip(packed) {
                        // `byte * 3^n` modulo 256 removes the first n digits. The next digit is the carry of three
                        // times the rest.
                        *code = ((u16::from(byte.wrapping_mul(power)) * 3) >> 8) as i8 - 1;
                    }
                    power = power.wrapping_mul(3);
                }
            }
            scale_at(52)
        }
        Encoding::Tq2_0 => {
            assert_eq!((block.len(), codes.len()), (66, 256));
            for (packed, codes) in block.chunks_exact(32).zip(codes.chunks_exact_mut(128)) {
                for (plane, codes) in codes.chunks_exact_mut(32).enumerate() {
                    for (code, &byte) in codes.iter_mut().zip(packed) {
                        *code = ((byte >> (2 * plane)) & 3) as i8 - 1;
                    }
                }
            }
            scale_at(64)
        }
        Encoding::Q2_0 => {
            assert_eq!((block.len(), codes.len()), (18, 64));
            unpack(&block[2..], codes);
            scale_at(0)
        }
        _ => panic!("{encoding} has no ternary blocks"),
    }
}

/// The inverse of [`decode_block`].
///
/// # Panics
/// As [`decode_block`].
pub(crate) fn encode_block(encoding: Encoding, codes: &[i8], scale: f16, block: &mut [u8]) {
    let scale = scale.to_le_bytes();
    match encoding {
        Encoding::Tq1_0 => {
            assert_eq!((block.len(), codes.len()), (54, 256));
            for (first, at, bytes, digits) in TQ1_0 {
                for (m, byte) in block[at..at + bytes].iter_mut().enumerate() {
                    // A byte of four digits has a fifth digit of 0.
                    let number = (0..5).fold(0u16, |number, n| {
                        let digit = if n < digits { codes[first + n * bytes + m] + 1 } else { 0 };
                        3 * number + digit as u16
                    });
                    *byte = (number * 256).div_ceil(243) as u8;
                }
            }
            block[52..].copy_from_slice(&scale);
        }
        Encoding::Tq2_0 => {
            assert_eq!((block.len(), codes.len()), (66, 256));
            for (packed, codes) in block.chunks_exact_mut(32).zip(codes.chunks_exact(128)) {
                for (m, byte) in packed.iter_mut().enumerate() {
                    *byte = (0..4)
                        .fold(0, |byte, plane| byte | ((codes[32 * plane + m] + 1) as u8) << (2 * plane));
                }
            }
            block[64..].copy_from_slice(&scale);
        }
        Encoding::Q2_0 => {
            assert_eq!((block.len(), codes.len()), (18, 64));
            block[..2].copy_from_slice(&scale);
            pack(codes, &mut block[2..]);
        }
        _ => panic!("{encoding} has no ternary blocks"),
    }
}

/// Unpacks 2-bit codes, low bits first.
pub(crate) fn unpack(packed: &[u8], codes: &mut [i8]) {
    for (byte, codes) in packed.iter().zip(codes.chunks_mut(4)) {
        for (i, code) in codes.iter_mut().enumerate() {
            *code = ((byte >> (2 * i)) & 3) as i8 - 1;
        }
    }
}

/// The inverse of [`unpack`]. Unused fields of the last byte store code 0.
pub(crate) fn pack(codes: &[i8], packed: &mut [u8]) {
    for (byte, codes) in packed.iter_mut().zip(codes.chunks(4)) {
        *byte = (0..4).fold(0, |byte, i| byte | ((codes.get(i).unwrap_or(&0) + 1) as u8) << (2 * i));
    }
}

/// Returns whether no 2-bit field is 3, which would be the code +2.
pub(crate) fn holds_codes(packed: &[u8]) -> bool {
    packed.iter().fold(0, |found, byte| found | (byte & (byte >> 1) & 0x55)) == 0
}
