//! Text compression by context mixing, in the form of lpaq: several contexts each predict the next bit, and a small
//! online network weighs their predictions. See the [module](super#text) for the exact arithmetic.
//!
//! ```text
//! bytes before: 0, 1, 2, 3, 4, 6     each hashed with the known bits of this byte -> slot of a table of bit models
//! p_i = table_i[slot_i]              x_i = stretch(p_i), its log-odds
//! p   = squash(sum of w_i x_i)       code the bit with p
//! learn: table_i[slot_i], and w_i += rate * x_i * (bit - p)
//! ```

use super::coder::{BitModel, Coder, squash, stretch};

/// Lengths of the contexts, in bytes.
const ORDERS: [usize; 6] = [0, 1, 2, 3, 4, 6];

/// Decisions per byte.
pub(super) const DECISIONS: usize = 8;

/// Maximum count of a bit model. It is low because text changes its statistics.
const MAX_COUNT: u32 = 250;

/// Codes `text` in place.
pub(super) fn code(coder: &mut impl Coder, text: &mut [u8]) {
    // Two slots per bit of a text of ordinary length. A hash collision costs bits, never correctness.
    let slots = (16 * text.len()).next_power_of_two().clamp(1 << 12, 1 << 20);
    let mut tables = ORDERS.map(|_| vec![BitModel::EVEN; slots]);
    let mut weights = vec![[FIRST_WEIGHT; ORDERS.len()]; 256];
    let mut history = 0u64;
    for byte in text {
        let contexts = ORDERS.map(|order| {
            let context = history & ((1 << (8 * order)) - 1);
            (context << 8 | order as u64).wrapping_mul(MULTIPLIER) >> 32
        });
        let mut found = 1;
        for bit in (0..8).rev() {
            let slots = contexts.map(|context| {
                let hash = (context ^ (found as u64) << 32).wrapping_mul(MULTIPLIER);
                (hash >> 40) as usize & (slots - 1)
            });
            let mut inputs = [0; ORDERS.len()];
            for ((input, table), &slot) in inputs.iter_mut().zip(&tables).zip(&slots) {
                *input = stretch(table[slot].p());
            }
            let p = mix(&weights[found], &inputs);
            let one = coder.decide(*byte >> bit & 1 == 1, p);
            for (table, slot) in tables.iter_mut().zip(slots) {
                table[slot].learn_with_limit(one, MAX_COUNT);
            }
            learn(&mut weights[found], &inputs, p, one);
            found = found << 1 | usize::from(one);
        }
        *byte = found as u8;
        history = history << 8 | u64::from(*byte);
    }
}

/// Multiplier of the hash: 2^64 divided by the golden ratio. It is odd, and its bits have no pattern.
const MULTIPLIER: u64 = 0x9E37_79B9_7F4A_7C15;

/// Initial weight of a context: 1/4, in units of 1/65536.
const FIRST_WEIGHT: i32 = 1 << 14;

/// Probability of the weighted sum of log-odds.
fn mix(weights: &[i32; ORDERS.len()], inputs: &[i32; ORDERS.len()]) -> u32 {
    let sum: i64 = weights.iter().zip(inputs).map(|(&w, &x)| i64::from(w) * i64::from(x)).sum();
    squash((sum >> 16).clamp(-2047, 2047) as i32)
}

/// One step of gradient descent on the coding cost.
fn learn(weights: &mut [i32; ORDERS.len()], inputs: &[i32; ORDERS.len()], p: u32, one: bool) {
    let error = (i64::from(one) << 16) - i64::from(p);
    for (weight, &input) in weights.iter_mut().zip(inputs) {
        let change = (i64::from(input) * error * 20) >> 18;
        *weight = (i64::from(*weight) + change).clamp(-(1 << 20), 1 << 20) as i32;
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::coder::{Decoder, Encoder, can_encode},
        *,
    };

    fn packed(text: &[u8]) -> Vec<u8> {
        let mut encoder = Encoder::default();
        code(&mut encoder, &mut text.to_vec());
        encoder.finish()
    }

    #[test]
    fn texts_round_trip_and_shrink() {
        let sentence = "{\"id\":0,\"content\":\"<|endoftext|>\",\"single_word\":false,\"special\":true},";
        for (text, most) in [
            (vec![], 3),
            (b"a".to_vec(), 5),
            ((0..=255).collect::<Vec<u8>>(), 300),
            (crate::chat::TEMPLATE.into(), crate::chat::TEMPLATE.len() * 2 / 3),
            (sentence.repeat(20).into(), 150),
            (vec![b'x'; 100_000], 1000),
        ] {
            let packed = packed(&text);
            assert!(packed.len() <= most, "{}", packed.len());
            assert!(can_encode(packed.len(), DECISIONS * text.len()));
            let mut decoder = Decoder::new(&packed).unwrap();
            let mut found = vec![0; text.len()];
            code(&mut decoder, &mut found);
            assert!(decoder.finished());
            assert_eq!(found, text);
        }
    }
}
