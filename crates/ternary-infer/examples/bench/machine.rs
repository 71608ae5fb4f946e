//! What the machine can do, and what this process takes of it.

use std::{fs, thread, time::Instant};

/// The most bytes that `threads` threads read from memory in a second, in pages of 2 MiB where the system has them.
///
/// Each thread adds up its part of a block that no cache holds; the best of several passes counts.
pub fn read_bandwidth(threads: usize) -> std::io::Result<f64> {
    const BYTES: usize = 512 << 20;
    const PASSES: usize = 12;
    let mut memory = memmap2::MmapMut::map_anon(BYTES)?;
    #[cfg(target_os = "linux")]
    memory.advise(memmap2::Advice::HugePage)?;
    memory.fill(1);
    let best = (0..PASSES)
        .map(|_| {
            let start = Instant::now();
            thread::scope(|scope| {
                for part in memory.chunks(BYTES.div_ceil(threads)) {
                    scope.spawn(move || std::hint::black_box(sum(part)));
                }
            });
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min);
    Ok(BYTES as f64 / best)
}

/// Eight sums side by side, so that no addition waits for the one before.
fn sum(bytes: &[u8]) -> u64 {
    let mut sums = [0u64; 8];
    for line in bytes.as_chunks::<64>().0 {
        for (sum, word) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
            *sum = sum.wrapping_add(u64::from_le_bytes(*word));
        }
    }
    sums.into_iter().fold(0, u64::wrapping_add)
}

/// The most memory that this process has held, in bytes, where the system says.
pub fn peak_resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
