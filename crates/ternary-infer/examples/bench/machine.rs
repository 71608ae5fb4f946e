//! Read bandwidth of the machine, and peak memory of this process.

use std::{fs, thread, time::Instant};

/// Read bandwidth of `threads` threads, in bytes per second, with pages of 2 MiB if the system has them.
///
/// Each thread sums its part of a block that is larger than the caches. The result is the best of several passes.
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

/// Eight independent sums, so that additions need not wait for each other.
fn sum(bytes: &[u8]) -> u64 {
    let mut sums = [0u64; 8];
    for line in bytes.as_chunks::<64>().0 {
        for (sum, word) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
            *sum = sum.wrapping_add(u64::from_le_bytes(*word));
        }
    }
    sums.into_iter().fold(0, u64::wrapping_add)
}

/// Peak resident memory of this process, in bytes; `None` if the system does not report it.
pub fn peak_resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
