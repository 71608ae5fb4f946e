//! Products of bytes by AMX: a tile of 16 tokens and 64 columns times one of 64 columns and 16 rows, in one instruction.
//!
//! Rust has no stable intrinsics for it, so this is assembly. No compiled code uses the tile registers, so they need not be
//! declared; they are configured, used and released within a call.

use crate::simd::vector::{LANES, Line, PANELS, Planes, Simd, Sums, Unit};
use std::{
    arch::{asm, x86_64::__cpuid_count, x86_64::__m512i},
    marker::PhantomData,
    sync::OnceLock,
};

/// Blocks of 16 columns in a tile.
const TILE_BLOCKS: usize = 4;

/// Whether the CPU has AMX for bytes, and Linux lets this process use it.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        // CPUID 7.0 EDX: bit 24 tiles, bit 25 products of bytes.
        let features = __cpuid_count(7, 0).edx;
        features >> 24 & 3 == 3 && permitted()
    })
}

/// Whether it also has products of bfloat16.
#[cfg(feature = "rayon")]
pub(super) fn multiplies_bf16() -> bool {
    static MULTIPLIES: OnceLock<bool> = OnceLock::new();
    // CPUID 7.0 EDX: bit 22.
    *MULTIPLIES.get_or_init(|| available() && __cpuid_count(7, 0).edx >> 22 & 1 == 1)
}

/// Asks Linux for the tile registers, for all threads of the process: their state is large, and saved only for those
/// that ask.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
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

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// The operand of `ldtilecfg`.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    /// Tiles 0 to 3: sums of `tokens` and 16 rows; 4: codes of `tokens`, so many blocks; 5: of `others`; 6 and 7: weights.
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

/// Products of panels and codes: see [`Simd::tiles`].
///
/// # Panics
/// When panels differ in length, or there are too few codes.
#[inline(always)]
pub(super) fn multiply<S: Simd<Int = __m512i>, const R: usize>(
    s: S,
    panels: [&[Planes]; R],
    codes: &[[i8; LANES]],
    stride: usize,
    tokens: usize,
    sink: &mut impl Sums<S, R>,
) {
    let blocks = panels[0].len();
    assert!(blocks > 0 && panels.iter().all(|panel| panel.len() == blocks), "panels of one length");
    assert!(tokens == 0 || codes.len() >= (tokens - 1) * stride + blocks, "codes of each token");
    // Columns that fill tiles, and the rest.
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
                Config::load(rows, rows, width);
                configured = (rows, width);
            }
            let panels = panels.map(|panel| panel[range.clone()].as_ptr().cast());
            let codes = codes[first * stride + range.start..].as_ptr();
            let part = Part { panels, codes, stride: stride * LANES, steps: range.len() / width };
            // SAFETY: codes and weights are there, as just checked; sums are as many as configured.
            unsafe { part.add(sums, pair, range.start == 0) };
        }
        sink.take(s, first, sums);
        first += sums.len();
    }
    release();
}

/// Gives the tiles up.
#[inline(always)]
fn release() {
    // SAFETY: it gives up what `Config::load` took.
    unsafe { asm!("tilerelease", options(nostack, nomem)) }
}

/// Steps of some 70 cycles after which the way from tiles to memory is used, lest it fall asleep.
const NAP: usize = 4;

/// Stores a tile that nobody needs.
///
/// After some 2,600 cycles without a `tilestored` the next one takes 1,100 cycles more (Xeon with model 167 by its CPUID: 48
/// steps of a loop over four products took 4,600 cycles with their sums stored at the end, and 3,350 so; 12 steps do not differ).
#[inline(always)]
fn stay_awake() {
    let mut line = Line([0; 64]);
    // SAFETY: tile 5 has one line here.
    unsafe {
        asm!("tilestored [{} + {}], tmm5", in(reg) &mut line, in(reg) size_of::<Line>(), options(nostack))
    }
}

/// The tiles as a [`Unit`]: the sums of four panels are in four of them from one call to the next, as no compiled code uses
/// them.
pub struct Tiles {
    tokens: usize,
    blocks: usize,
    /// Steps so far.
    steps: usize,
    /// Tiles are their thread's.
    thread: PhantomData<*mut ()>,
}

impl Tiles {
    /// # Panics
    /// When there are no such tiles. The CPU must have AMX.
    #[inline(always)]
    pub(super) fn new(tokens: usize, blocks: usize) -> Self {
        assert!((1..=LANES).contains(&tokens) && (1..=TILE_BLOCKS).contains(&blocks), "rows of a tile");
        Config::load(tokens, 1, blocks);
        Self { tokens, blocks, steps: 0, thread: PhantomData }
    }
}

impl Drop for Tiles {
    #[inline(always)]
    fn drop(&mut self) {
        release();
    }
}

impl Unit for Tiles {
    #[inline(always)]
    fn clear(&mut self) {
        // SAFETY: the tiles are configured.
        unsafe {
            asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem));
        }
    }

    #[inline(always)]
    fn add(&mut self, panels: [&[Line]; PANELS], codes: &[[i8; LANES]], stride: usize) {
        assert!(panels.iter().all(|panel| panel.len() == 4 * self.blocks), "lines of the blocks");
        assert!(codes.len() >= (self.tokens - 1) * stride + self.blocks, "codes of each token");
        // SAFETY: the tiles are configured for so many tokens and blocks, whose weights and codes are there, as just checked.
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
                line = in(reg) size_of::<Line>(),
                options(nostack, readonly)
            );
        }
        self.steps += 1;
        if self.steps.is_multiple_of(NAP) {
            stay_awake();
        }
    }

    #[inline(always)]
    fn store(&self, sums: &mut [[Line; LANES]; PANELS]) {
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
                line = in(reg) size_of::<Line>(),
                options(nostack)
            );
        }
    }
}

/// Products of bfloat16: see [`Simd::half_tiles`](Simd::half_tiles).
///
/// # Panics
/// When factors do not fit each other.
#[cfg(feature = "rayon")]
pub(super) fn multiply_bf16(
    left: [&[Line]; 2],
    right: [&[Line]; 2],
    sums: &mut [[f32; 2 * LANES]; 2 * LANES],
) {
    // Each 32 numbers of k are 16 lines of either factor.
    let steps = left[0].len() / LANES;
    assert!(left.iter().chain(&right).all(|lines| lines.len() == steps * LANES), "factors of one length");
    if steps == 0 {
        return sums.as_flattened_mut().fill(0.0);
    }
    Config::load(LANES, LANES, TILE_BLOCKS);
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
            line = in(reg) size_of::<Line>(),
            pair = in(reg) 2 * size_of::<Line>(),
            options(nostack)
        );
    }
}

/// Some columns of a product, a tile's width at a time.
struct Part<const R: usize> {
    panels: [*const Line; R],
    codes: *const [i8; LANES],
    /// Bytes from a token's codes to the next one's.
    stride: usize,
    steps: usize,
}

impl<const R: usize> Part<R> {
    /// Adds to the sums of a tile of tokens, or of two; of `fresh` ones nothing is added to.
    ///
    /// Products that add to one tile wait for each other: four of them are under way at once where there are two panels and
    /// a pair of tiles of tokens.
    ///
    /// # Safety
    /// Panels, codes and sums have what the tiles are configured for; for a `pair`, whole tiles, and two panels.
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
                    line = in(reg) size_of::<Line>(),
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
                    line = in(reg) size_of::<Line>(),
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
                    line = in(reg) size_of::<Line>(),
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
