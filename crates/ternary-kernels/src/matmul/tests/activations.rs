//! Int8 activations against the formula of training.

use super::{Random, quantize};
use crate::*;

#[test]
fn activations_are_quantized_as_in_training() {
    let mut random = Random(1);
    for isa in Isa::available() {
        let (pool, mut buffer) = (Pool::with_isa(2, isa), Int8Activations::default());
        let large = if cfg!(miri) { (6, 80) } else { (40, 600) };
        for (tokens, cols) in [(1, 1), (3, 17), large, (2, 16), (1, 5)] {
            let scale = [1e-30, 1e-3, 1.0, 1e30][random.next(4)];
            let mut x: Vec<_> = (0..tokens * cols).map(|_| random.float() * scale).collect();
            let place = random.next(tokens * cols);
            x[place] = f32::NAN;
            Activations::int8(&pool, &x, cols, &mut buffer);
            for (token, x) in x.chunks(cols).enumerate() {
                let (codes, scale) = quantize(x);
                let blocks = &buffer.codes[token * buffer.blocks..][..buffer.blocks];
                let found = blocks.as_flattened();
                assert_eq!(buffer.scales[token], scale);
                assert_eq!(found[..cols], codes);
                assert!(found[cols..].iter().all(|code| *code == 0));
                let sum: i32 = codes.iter().map(|code| i32::from(*code)).sum();
                assert_eq!(buffer.sum(token), sum);
            }
        }
    }
}
