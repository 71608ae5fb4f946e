//! What this machine could do at best: the measure of every other number.

use crate::{
    Arena, Isa, Pool,
    simd::{Kernel, Line, Simd},
};
use std::{hint::black_box, time::Instant};

/// Bytes that no cache holds.
const BYTES: usize = 256 << 20;

/// Int8 operations a second of one thread (a product and a sum are two), everything in registers and first-level cache.
pub fn integer_operations(isa: Isa) -> f64 {
    const ROUNDS: usize = 20_000;
    let lines = [Line([1; 64]); 16];
    let mut operations = 0;
    let best = (0..10).map(|_| {
        let start = Instant::now();
        let (dots, sum) = isa.run(Dots { lines: black_box(&lines), rounds: ROUNDS });
        black_box(sum);
        operations = dots * 64 * 2;
        start.elapsed().as_secs_f64()
    });
    let best = best.fold(f64::INFINITY, f64::min);
    operations as f64 / best
}

struct Dots<'a> {
    lines: &'a [Line; 16],
    rounds: usize,
}

impl Kernel for Dots<'_> {
    /// How many dot products of a vector, and their sum.
    type Output = (usize, f32);

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        // As many sums as products have: fewer would wait for each other.
        if S::TOKENS >= 8 { self.sums::<S, 4>(s) } else { self.sums::<S, 1>(s) }
    }
}

/// Tokens of the measuring loop.
const TOKENS: usize = 4;

impl Dots<'_> {
    #[inline(always)]
    fn sums<S: Simd, const TILES: usize>(self, s: S) -> (usize, f32) {
        let mut x = [s.splat(0); TOKENS];
        for (t, x) in x.iter_mut().enumerate() {
            *x = s.splat(black_box(t as i32));
        }
        let mut total = [[s.splat(0); TOKENS]; TILES];
        for _ in 0..self.rounds {
            let mut acc = [[s.splat(0); TOKENS]; TILES];
            for lines in black_box(self.lines).as_chunks::<TILES>().0 {
                for r in 0..TILES {
                    let w = s.load(&lines[r]);
                    for t in 0..TOKENS {
                        acc[r][t] = s.dot(acc[r][t], w, x[t]);
                    }
                }
            }
            for r in 0..TILES {
                for t in 0..TOKENS {
                    total[r][t] = s.add(total[r][t], s.widen(acc[r][t]));
                }
            }
        }
        let sum = total.into_iter().flatten().fold(s.splat(0), |a, b| s.add(a, b));
        (self.rounds * self.lines.len() * TOKENS, s.sum_lanes(s.to_float(sum)))
    }
}

/// Bytes a second that the threads of a pool read together from memory, in huge pages: the best of many short runs,
/// since others may be at work.
pub fn read_bandwidth(pool: &Pool) -> f64 {
    const RUN: usize = 8 << 20;
    let mut block = Arena::new(BYTES).take::<Line>(BYTES / size_of::<Line>());
    block.fill(Line([1; 64]));
    let runs: Vec<_> = block.chunks(RUN / size_of::<Line>()).collect();
    let best = (0..4 * runs.len()).map(|run| {
        let lines = runs[run % runs.len()];
        let part = lines.len() / (pool.threads() * 8);
        let start = Instant::now();
        pool.run(lines.len() / part, |index, _| {
            black_box(pool.isa().run(Read { lines: &lines[index * part..][..part] }));
        });
        start.elapsed().as_secs_f64()
    });
    RUN as f64 / best.fold(f64::INFINITY, f64::min)
}

struct Read<'a> {
    lines: &'a [Line],
}

impl Kernel for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.splat(0); 4];
        for lines in self.lines.as_chunks::<4>().0 {
            for (sum, line) in sums.iter_mut().zip(lines) {
                s.prefetch(line, 64);
                *sum = s.add(*sum, s.load(line));
            }
        }
        let sum = sums.into_iter().fold(s.splat(0), |a, b| s.add(a, b));
        s.sum_lanes(s.to_float(sum))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore)] // it measures the CPU
    fn peaks_are_positive() {
        for isa in Isa::available() {
            assert!(integer_operations(isa) > 0.0);
        }
    }
}
