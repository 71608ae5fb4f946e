//! Derives many seeds from one: every random draw of a run is a pure function of its seed and an index.

/// SplitMix64's output after `seed`, advanced by `index`: a different, well-mixed seed for each index, and a bijection of seeds.
///
/// # Source
/// Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (2014).
pub fn mix(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
