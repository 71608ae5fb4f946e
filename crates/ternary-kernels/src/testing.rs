//! What several tests of kernels share: pools, numbers, and a comparison with float64.

use crate::{Isa, Pool};

/// Every instruction set, on one thread and on three.
pub fn pools() -> Vec<Pool> {
    let isas = Isa::available();
    isas.into_iter().flat_map(|isa| [1, 3].map(|threads| Pool::with_isa(threads, isa))).collect()
}

/// `len` numbers between -`largest` and `largest`.
pub fn numbers(len: usize, largest: f32, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next() * largest).collect()
}

/// Every number within `tolerance` times the largest expected one.
#[track_caller]
pub fn assert_close(what: &str, found: &[f32], expected: impl IntoIterator<Item = f64>, tolerance: f64) {
    let expected: Vec<f64> = expected.into_iter().collect();
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(f64::MIN_POSITIVE, |max, x| max.max(x.abs()));
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let error = (f64::from(*found) - expected).abs() / largest;
        assert!(error <= tolerance, "{what}, {i}: {found} is not {expected}, by {error:.1e}");
    }
}

/// `n` numbers between -`scale` and `scale`.
pub fn values(n: usize, scale: f32) -> Vec<f32> {
    (0..n).map(|i| ((i * 2_654_435_761 >> 7) % 2001) as f32 / 1000.0 * scale - scale).collect()
}

/// The same bits on every instruction set, within `tolerance` of the float64 values.
pub fn check(name: &str, tolerance: f64, expected: &[f64], f: impl Fn(Isa) -> Vec<f32>) {
    let first = f(Isa::available()[0]);
    for isa in Isa::available() {
        let found = f(isa);
        assert!(found.iter().zip(&first).all(|(a, b)| a.to_bits() == b.to_bits()), "{name}, {isa:?}");
        for (found, expected) in found.iter().zip(expected) {
            let error = (f64::from(*found) - expected).abs() / expected.abs().max(1.0);
            assert!(error <= tolerance, "{name}, {isa:?}: {found} is not {expected}");
        }
    }
}

/// Miri is a thousand times as slow.
pub const SIZES: &[usize] = if cfg!(miri) { &[1, 5, 16, 17] } else { &[1, 5, 16, 17, 64, 100, 769] };
