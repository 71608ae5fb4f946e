//! The machine's limits, measured: int8 operations per second and memory bandwidth. Benchmarks report kernels as a share of
//! these.
//!
//! Both are measured in the same run as the kernels, since speeds of our shared machines vary by a fifth between runs: a share of
//! the peak is comparable, a time is not. The peak is that of the instructions that the kernels use: `vpmaddubsw` and `vpaddw`
//! with AVX2 (313 GOP/s per core of a Zen 3), `vpdpbusd` with VNNI (552 GOP/s of a Xeon). Tiles of AMX are not measured: their
//! share is counted in cycles (`simd/x86_64/amx.rs`).

use crate::{
    Arena, Isa, Pool,
    simd::{CacheLine, Kernel, Simd},
};
use std::{hint::black_box, time::Instant};

/// Bytes to read: more than any cache holds.
const PROBE_BYTES: usize = 256 << 20;

/// Int8 operations per second of one thread, with all operands in registers and the first-level cache. A multiplication and
/// an addition are two operations.
pub fn int8_ops_per_second(isa: Isa) -> f64 {
    const ROUNDS: usize = 20_000;
    let lines = [CacheLine([1; 64]); 16];
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

/// Dot products of the lines with constants, repeated.
struct Dots<'a> {
    lines: &'a [CacheLine; 16],
    rounds: usize,
}

impl Kernel for Dots<'_> {
    /// Number of dot instructions (64 products each), and the sum of all, so that none is optimized away.
    type Output = (usize, f32);

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        // As many sums as the kernels have: fewer would not hide the latency.
        if S::REGISTER_TOKENS >= 8 { self.sums::<S, 4>(s) } else { self.sums::<S, 1>(s) }
    }
}

/// Tokens of the probe: sums per tile.
const PROBE_TOKENS: usize = 4;

impl Dots<'_> {
    /// The loop of a product, with `TILES` x [`PROBE_TOKENS`] sums in registers.
    #[inline(always)]
    fn sums<S: Simd, const TILES: usize>(self, s: S) -> (usize, f32) {
        let mut x = [s.splat(0); PROBE_TOKENS];
        for (t, x) in x.iter_mut().enumerate() {
            *x = s.splat(black_box(t as i32));
        }
        let mut total = [[s.splat(0); PROBE_TOKENS]; TILES];
        for _ in 0..self.rounds {
            let mut acc = [[s.splat(0); PROBE_TOKENS]; TILES];
            for lines in black_box(self.lines).as_chunks::<TILES>().0 {
                for r in 0..TILES {
                    let w = s.load(&lines[r]);
                    for t in 0..PROBE_TOKENS {
                        acc[r][t] = s.dot(acc[r][t], w, x[t]);
                    }
                }
            }
            for r in 0..TILES {
                for t in 0..PROBE_TOKENS {
                    total[r][t] = s.add(total[r][t], s.widen(acc[r][t]));
                }
            }
        }
        let sum = total.into_iter().flatten().fold(s.splat(0), |a, b| s.add(a, b));
        (self.rounds * self.lines.len() * PROBE_TOKENS, s.sum_lanes(s.to_float(sum)))
    }
}

/// Bytes per second that the threads of a pool read from memory together, in huge pages. The best of many short runs, since
/// other programs may be running.
pub fn read_bandwidth(pool: &Pool) -> f64 {
    const RUN: usize = 8 << 20;
    let mut block = Arena::new(PROBE_BYTES).take::<CacheLine>(PROBE_BYTES / size_of::<CacheLine>());
    block.fill(CacheLine([1; 64]));
    let runs: Vec<_> = block.chunks(RUN / size_of::<CacheLine>()).collect();
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

/// Reads all lines.
struct Read<'a> {
    lines: &'a [CacheLine],
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
            assert!(int8_ops_per_second(isa) > 0.0);
        }
    }
}
