//! AMX: products of int8 and bfloat16 matrices in tile registers.
//!
//! # The instruction
//! There are eight tile registers of up to 16 rows of 64 bytes. One instruction multiplies two of them and adds to a third:
//!
//! ```text
//!               64 columns                    16 rows of weights (64 bytes each = 4 columns of 16 rows)
//!            +--------------+                +--------------+
//! 16 tokens  |  codes, i8   |   x  16 quads  | weights, i8  |   +=   16 tokens x 16 rows of sums, i32      (tdpbssd)
//!            +--------------+      of columns+--------------+
//! ```
//!
//! A cache line of packed weights, four columns of 16 rows, is a row of the weight tile as it is; a token's codes are a row of
//! the other one. So nothing is packed for AMX, and it adds to the same exact sums as the vector instructions.
//! `tdpbf16ps` does the same with pairs of bfloat16 and sums in f32.
//!
//! | register | few tokens ([`AmxUnit`]) | many tokens ([`multiply`]) | bfloat16 ([`multiply_bf16`]) |
//! |---|---|---|---|
//! | 0-3 | sums of 4 tiles of weights | sums of 2 x 16 tokens and 2 tiles | sums of 2 x 16 rows and 2 x 16 columns |
//! | 4 | codes of up to 16 tokens | codes of tokens 0-15 | rows 0-15 of the left factor |
//! | 5 | one line, stored to keep the store path awake | codes of tokens 16-31 | rows 16-31 |
//! | 6, 7 | weights | weights | columns of the right factor |
//!
//! # Pseudo code
//! ```text
//! multiply (many tokens):                              AmxUnit (1 to 16 tokens):
//!     for each 32 tokens:                                  new: configure
//!         configure, if the shape changed                  clear: sums = 0
//!         sums = 0, or load those of before                add: load the codes of 64 columns; load 4 x weights,
//!         for each 64 columns:                                  4 products; every 4th time store an unused line
//!             load 2 x codes, 2 x weights; 4 products      store: sums to memory
//!         store the sums, pass them to the sink            drop: release
//!     release
//! ```
//!
//! Products that add to one register wait for each other, so both keep four sums going.
//!
//! # Assembly
//! Rust has no stable intrinsics for AMX. No compiled code uses the tile registers, so that they need not be declared as
//! clobbered; they are configured, used and released within a call, or within the life of an [`AmxUnit`].
//!
//! # Measured
//! On an Intel Xeon with AMX (768 x 3072, details in BENCHMARKS.md):
//! - four products take 64 cycles without loads, 120 with loads of aligned rows, 160 to 190 with rows that cross cache
//!   lines. Codes of tokens therefore start at cache lines;
//! - `AmxUnit` with four tiles takes 62 cycles per 64 columns of two tiles, with two tiles 78; unpacking alone takes 42;
//! - after 2,600 cycles without a `tilestored`, the next one takes 1,100 more: see [`keep_store_path_awake`];
//! - four accumulators used in turn for two tiles: 6 to 9 % slower.

use crate::simd::vector::{AccumulatorSink, CacheLine, LANES, MatrixUnit, Simd, UNIT_TILES, UnpackedBlock};
use std::{
    arch::{asm, x86_64::__cpuid_count, x86_64::__m512i},
    marker::PhantomData,
    sync::OnceLock,
};

/// Blocks of 16 columns per tile register: 64 bytes.
const TILE_BLOCKS: usize = 4;

/// Whether the CPU has AMX for bytes, and Linux permits this process to use it.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        // CPUID 7.0 EDX: bit 24 tiles, bit 25 products of bytes.
        let features = __cpuid_count(7, 0).edx;
        features >> 24 & 3 == 3 && request_tiles()
    })
}

/// Whether the CPU also has AMX for bfloat16.
#[cfg(feature = "rayon")]
pub(super) fn multiplies_bf16() -> bool {
    static MULTIPLIES: OnceLock<bool> = OnceLock::new();
    // CPUID 7.0 EDX: bit 22.
    *MULTIPLIES.get_or_init(|| available() && __cpuid_count(7, 0).edx >> 22 & 1 == 1)
}

/// Requests the tile registers from Linux, for all threads of the process. Their state is large, and Linux saves it only for
/// processes that request it.
#[cfg(target_os = "linux")]
fn request_tiles() -> bool {
    const ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: the call reads and writes no memory of ours; it clobbers rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    result == 0
}

/// Other systems: unknown, so no.
#[cfg(not(target_os = "linux"))]
fn request_tiles() -> bool {
    false
}

/// The operand of `ldtilecfg`.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl TileConfig {
    /// Configures the registers: 0-3 for sums of `tokens` and 16 rows; 4 for codes of `tokens`, of `blocks` blocks; 5 for codes of
    /// `others`; 6 and 7 for weights.
    fn load(tokens: usize, others: usize, blocks: usize) {
        let (tokens, others, columns) = (tokens as u8, others as u8, (blocks * LANES) as u16);
        let mut config =
            Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].copy_from_slice(&[64, 64, 64, 64, columns, columns, 64, 64]);
        let quads = (columns / 4) as u8;
        config.rows[..8].copy_from_slice(&[tokens, tokens, tokens, tokens, tokens, others, quads, quads]);
        // SAFETY: the configuration is a valid one: at most 16 rows of at most 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) }
    }
}

/// Products of panels and the codes of many tokens: see [`Simd::multiply_panels`].
///
/// # Panics
/// When panels differ in length, or there are too few codes.
#[inline(always)]
pub(super) fn multiply<S: Simd<Int = __m512i>, const R: usize>(
    s: S,
    panels: [&[UnpackedBlock]; R],
    codes: &[[i8; LANES]],
    stride: usize,
    tokens: usize,
    sink: &mut impl AccumulatorSink<S, R>,
) {
    let blocks = panels[0].len();
    assert!(blocks > 0 && panels.iter().all(|panel| panel.len() == blocks), "panels of one length");
    assert!(tokens == 0 || codes.len() >= (tokens - 1) * stride + blocks, "codes of each token");
    // Columns that fill tile registers, and the rest.
    let whole = blocks / TILE_BLOCKS * TILE_BLOCKS;
    let parts = [0..whole, whole..blocks];
    let mut configured = (0, 0);
    let mut sums = [[s.splat(0); R]; 2 * LANES];
    let mut first = 0;
    while first < tokens {
        let rows = LANES.min(tokens - first);
        let pair = R == 2 && tokens - first >= 2 * LANES;
        let sums = &mut sums[..if pair { 2 * LANES } else { rows }];
        for range in parts.iter().filter(|range| !range.is_empty()) {
            let width = TILE_BLOCKS.min(range.len());
            if configured != (rows, width) {
                TileConfig::load(rows, rows, width);
                configured = (rows, width);
            }
            let panels = panels.map(|panel| panel[range.clone()].as_ptr().cast());
            let codes = codes[first * stride + range.start..].as_ptr();
            let part = TileColumns { panels, codes, stride: stride * LANES, steps: range.len() / width };
            // SAFETY: codes and weights are there, as just checked; sums are as many as configured.
            unsafe { part.add(sums, pair, range.start == 0) };
        }
        sink.take(s, first, sums);
        first += sums.len();
    }
    release();
}

/// Releases the tile registers.
#[inline(always)]
fn release() {
    // SAFETY: it releases what `TileConfig::load` took.
    unsafe { asm!("tilerelease", options(nostack, nomem)) }
}

/// Steps of [`AmxUnit`], of some 70 cycles each, between stores that keep the store path awake.
const STORE_INTERVAL: usize = 4;

/// Stores a tile register that is not in use.
///
/// After some 2,600 cycles without a `tilestored`, the next one takes 1,100 cycles more. Measured on a Xeon of CPUID model 167:
/// 48 steps of four products took 4,600 cycles if sums were stored at the end only, and 3,350 with this. With 12 steps there is
/// no difference.
#[inline(always)]
fn keep_store_path_awake() {
    let mut line = CacheLine([0; 64]);
    // SAFETY: tile 5 has one line here.
    unsafe {
        asm!("tilestored [{} + {}], tmm5", in(reg) &mut line, in(reg) size_of::<CacheLine>(), options(nostack))
    }
}

/// The tile registers as a [`MatrixUnit`]: the sums of four tiles of weights stay in registers from one call to the next, since
/// no compiled code uses them.
pub struct AmxUnit {
    tokens: usize,
    blocks: usize,
    /// Number of steps so far.
    steps: usize,
    /// Tile registers belong to a thread, so this is neither `Send` nor `Sync`.
    thread: PhantomData<*mut ()>,
}

impl AmxUnit {
    /// Configures the registers for `tokens` tokens and `blocks` blocks per step. The CPU must have AMX.
    ///
    /// # Panics
    /// When `tokens` is not in 1..=16, or `blocks` not in 1..=4.
    #[inline(always)]
    pub(super) fn new(tokens: usize, blocks: usize) -> Self {
        assert!((1..=LANES).contains(&tokens) && (1..=TILE_BLOCKS).contains(&blocks), "rows of a tile");
        TileConfig::load(tokens, 1, blocks);
        Self { tokens, blocks, steps: 0, thread: PhantomData }
    }
}

impl Drop for AmxUnit {
    #[inline(always)]
    fn drop(&mut self) {
        release();
    }
}

impl MatrixUnit for AmxUnit {
    #[inline(always)]
    fn clear(&mut self) {
        // SAFETY: the tiles are configured.
        unsafe {
            asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem));
        }
    }

    #[inline(always)]
    fn add(&mut self, panels: [&[CacheLine]; UNIT_TILES], codes: &[[i8; LANES]], stride: usize) {
        assert!(panels.iter().all(|panel| panel.len() == 4 * self.blocks), "lines of the blocks");
        assert!(codes.len() >= (self.tokens - 1) * stride + self.blocks, "codes of each token");
        // SAFETY: the tiles are configured for this number of tokens and blocks, whose weights and codes are there, as just checked.
        unsafe {
            asm!(
                "tileloadd tmm4, [{codes} + {stride}]",
                "tileloadd tmm6, [{first} + {line}]",
                "tdpbssd tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{second} + {line}]",
                "tdpbssd tmm1, tmm4, tmm7",
                "tileloadd tmm6, [{third} + {line}]",
                "tdpbssd tmm2, tmm4, tmm6",
                "tileloadd tmm7, [{fourth} + {line}]",
                "tdpbssd tmm3, tmm4, tmm7",
                codes = in(reg) codes.as_ptr(),
                stride = in(reg) stride * LANES,
                first = in(reg) panels[0].as_ptr(),
                second = in(reg) panels[1].as_ptr(),
                third = in(reg) panels[2].as_ptr(),
                fourth = in(reg) panels[3].as_ptr(),
                line = in(reg) size_of::<CacheLine>(),
                options(nostack, readonly)
            );
        }
        self.steps += 1;
        if self.steps.is_multiple_of(STORE_INTERVAL) {
            keep_store_path_awake();
        }
    }

    #[inline(always)]
    fn store(&self, sums: &mut [[CacheLine; LANES]; UNIT_TILES]) {
        let [first, second, third, fourth] = sums.each_mut().map(|sums| sums.as_mut_ptr());
        // SAFETY: a tile has at most 16 lines.
        unsafe {
            asm!(
                "tilestored [{first} + {line}], tmm0",
                "tilestored [{second} + {line}], tmm1",
                "tilestored [{third} + {line}], tmm2",
                "tilestored [{fourth} + {line}], tmm3",
                first = in(reg) first,
                second = in(reg) second,
                third = in(reg) third,
                fourth = in(reg) fourth,
                line = in(reg) size_of::<CacheLine>(),
                options(nostack)
            );
        }
    }
}

/// Products of bfloat16 matrices, of 32 rows and 32 columns: see [`Simd::multiply_bf16`](Simd::multiply_bf16).
///
/// # Panics
/// When factors do not fit each other.
#[cfg(feature = "rayon")]
pub(super) fn multiply_bf16(
    left: [&[CacheLine]; 2],
    right: [&[CacheLine]; 2],
    sums: &mut [[f32; 2 * LANES]; 2 * LANES],
) {
    // Each 32 numbers of k are 16 lines of either factor.
    let steps = left[0].len() / LANES;
    assert!(left.iter().chain(&right).all(|lines| lines.len() == steps * LANES), "factors of one length");
    if steps == 0 {
        return sums.as_flattened_mut().fill(0.0);
    }
    TileConfig::load(LANES, LANES, TILE_BLOCKS);
    // SAFETY: the tiles are 16 rows of 64 bytes, within the factors as just checked, and within the sums' rows of 128.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{left} + {line}]",
            "tileloadd tmm6, [{right} + {line}]",
            "tileloadd tmm7, [{right_next} + {line}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{left_next} + {line}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {left}, 1024",
            "add {left_next}, 1024",
            "add {right}, 1024",
            "add {right_next}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {pair}], tmm0",
            "tilestored [{sums} + {pair} + 64], tmm1",
            "tilestored [{sums} + {pair} + 2048], tmm2",
            "tilestored [{sums} + {pair} + 2112], tmm3",
            "tilerelease",
            left = inout(reg) left[0].as_ptr() => _,
            left_next = inout(reg) left[1].as_ptr() => _,
            right = inout(reg) right[0].as_ptr() => _,
            right_next = inout(reg) right[1].as_ptr() => _,
            steps = inout(reg) steps => _,
            sums = in(reg) sums.as_mut_ptr(),
            line = in(reg) size_of::<CacheLine>(),
            pair = in(reg) 2 * size_of::<CacheLine>(),
            options(nostack)
        );
    }
}

/// A range of columns of a product, in steps of one tile register.
struct TileColumns<const R: usize> {
    /// Weights of each panel at the first column.
    panels: [*const CacheLine; R],
    /// Codes of the first token at the first column.
    codes: *const [i8; LANES],
    /// Bytes from the codes of one token to those of the next.
    stride: usize,
    /// Tile registers of columns.
    steps: usize,
}

impl<const R: usize> TileColumns<R> {
    /// Adds the products of these columns to the sums of up to 16 tokens, or of 32 for a `pair`. `fresh` sums start at zero.
    ///
    /// Products that add to one register wait for each other. With two panels and a pair, four are under way at once.
    ///
    /// # Safety
    /// Panels, codes and sums have as many elements as the registers are configured for. A `pair` has 32 tokens and two
    /// panels.
    #[inline(always)]
    unsafe fn add(&self, sums: &mut [[__m512i; R]], pair: bool, fresh: bool) {
        let size = R * size_of::<__m512i>();
        let start = sums.as_mut_ptr().cast::<__m512i>();
        let at = |tile: usize, panel: usize| start.wrapping_add(tile * LANES * R + panel);
        // SAFETY: of the whole: the caller's promise. No compiled code between uses tiles.
        unsafe {
            match fresh {
                true => asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    options(nostack, nomem)
                ),
                false => {
                    asm!("tileloadd tmm0, [{} + {}]", in(reg) at(0, 0), in(reg) size, options(nostack));
                    if R == 2 {
                        asm!("tileloadd tmm1, [{} + {}]", in(reg) at(0, 1), in(reg) size, options(nostack));
                    }
                    if pair {
                        asm!("tileloadd tmm2, [{} + {}]", in(reg) at(1, 0), in(reg) size, options(nostack));
                        asm!("tileloadd tmm3, [{} + {}]", in(reg) at(1, 1), in(reg) size, options(nostack));
                    }
                }
            }
            match (R, pair) {
                (1, _) => asm!(
                    "2:",
                    "tileloadd tmm4, [{codes} + {stride}]",
                    "tileloadd tmm6, [{weights} + {line}]",
                    "tdpbssd tmm0, tmm4, tmm6",
                    "add {codes}, 64",
                    "add {weights}, 1024",
                    "dec {steps}",
                    "jnz 2b",
                    codes = inout(reg) self.codes => _,
                    weights = inout(reg) self.panels[0] => _,
                    steps = inout(reg) self.steps => _,
                    stride = in(reg) self.stride,
                    line = in(reg) size_of::<CacheLine>(),
                    options(nostack)
                ),
                (_, false) => asm!(
                    "2:",
                    "tileloadd tmm4, [{codes} + {stride}]",
                    "tileloadd tmm6, [{first} + {line}]",
                    "tileloadd tmm7, [{second} + {line}]",
                    "tdpbssd tmm0, tmm4, tmm6",
                    "tdpbssd tmm1, tmm4, tmm7",
                    "add {codes}, 64",
                    "add {first}, 1024",
                    "add {second}, 1024",
                    "dec {steps}",
                    "jnz 2b",
                    codes = inout(reg) self.codes => _,
                    first = inout(reg) self.panels[0] => _,
                    second = inout(reg) self.panels[R - 1] => _,
                    steps = inout(reg) self.steps => _,
                    stride = in(reg) self.stride,
                    line = in(reg) size_of::<CacheLine>(),
                    options(nostack)
                ),
                (_, true) => asm!(
                    "2:",
                    "tileloadd tmm4, [{codes} + {stride}]",
                    "tileloadd tmm6, [{first} + {line}]",
                    "tileloadd tmm7, [{second} + {line}]",
                    "tdpbssd tmm0, tmm4, tmm6",
                    "tdpbssd tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{next} + {stride}]",
                    "tdpbssd tmm2, tmm5, tmm6",
                    "tdpbssd tmm3, tmm5, tmm7",
                    "add {codes}, 64",
                    "add {next}, 64",
                    "add {first}, 1024",
                    "add {second}, 1024",
                    "dec {steps}",
                    "jnz 2b",
                    codes = inout(reg) self.codes => _,
                    next = inout(reg) self.codes.byte_add(LANES * self.stride) => _,
                    first = inout(reg) self.panels[0] => _,
                    second = inout(reg) self.panels[R - 1] => _,
                    steps = inout(reg) self.steps => _,
                    stride = in(reg) self.stride,
                    line = in(reg) size_of::<CacheLine>(),
                    options(nostack)
                ),
            }
            asm!("tilestored [{} + {}], tmm0", in(reg) at(0, 0), in(reg) size, options(nostack));
            if R == 2 {
                asm!("tilestored [{} + {}], tmm1", in(reg) at(0, 1), in(reg) size, options(nostack));
            }
            if pair {
                asm!("tilestored [{} + {}], tmm2", in(reg) at(1, 0), in(reg) size, options(nostack));
                asm!("tilestored [{} + {}], tmm3", in(reg) at(1, 1), in(reg) size, options(nostack));
            }
        }
    }
}
