//! Products of bytes by AMX: a tile of 16 tokens and 64 columns times one of 64 columns and 16 rows, in one instruction.
//!
//! Rust has no stable intrinsics for it, so this is assembly. No compiled code uses the tile registers, so they need not be
//! declared; they are configured, used and released within a call.

use crate::{
    simd::{LANES, Line},
    ternary::Planes,
};
use std::{
    arch::{asm, x86_64::__cpuid_count, x86_64::__m512i},
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
    /// Tiles 0 to 3: sums of `tokens` and 16 rows; 4 and 5: codes of `tokens`, so many blocks; 6 and 7: weights.
    fn load(tokens: usize, blocks: usize) {
        let (tokens, columns) = (tokens as u8, (blocks * LANES) as u16);
        let mut config =
            Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].copy_from_slice(&[64, 64, 64, 64, columns, columns, 64, 64]);
        let quads = (columns / 4) as u8;
        config.rows[..8].copy_from_slice(&[tokens, tokens, tokens, tokens, tokens, tokens, quads, quads]);
        // SAFETY: the configuration is a valid one: at most 16 rows of at most 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) }
    }
}

/// Adds to `sums[t][r]` the products of panel `r` and the codes of token `t`, whose blocks begin at
/// `codes[t * stride]`; both are signed bytes.
///
/// # Panics
/// When panels differ in length, or there are too few codes.
pub(super) fn multiply<const R: usize>(
    panels: [&[Planes]; R],
    codes: &[[i8; LANES]],
    stride: usize,
    sums: &mut [[__m512i; R]],
) {
    let blocks = panels[0].len();
    assert!(panels.iter().all(|panel| panel.len() == blocks), "panels of one length");
    assert!(sums.is_empty() || codes.len() >= (sums.len() - 1) * stride + blocks, "codes of each token");
    let whole = blocks / TILE_BLOCKS * TILE_BLOCKS;
    for (range, width) in [(0..whole, TILE_BLOCKS), (whole..blocks, blocks - whole)] {
        if range.is_empty() {
            continue;
        }
        let panels = panels.map(|panel| &panel[range.clone()]);
        let mut part = Part { panels, codes: &codes[range.start..], stride, width };
        let (full, rest) = sums.split_at_mut(sums.len() / LANES * LANES);
        if !full.is_empty() {
            Config::load(LANES, width);
            part.add(full);
        }
        if !rest.is_empty() {
            Config::load(rest.len(), width);
            part.codes = &part.codes[full.len() * stride..];
            part.add(rest);
        }
    }
    // SAFETY: it gives up what `Config::load` took.
    unsafe { asm!("tilerelease", options(nostack, nomem)) }
}

/// Products of bfloat16: see [`Simd::half_tiles`](crate::simd::Simd::half_tiles).
///
/// # Panics
/// When factors do not fit each other.
pub(super) fn multiply_bf16(
    left: [&[Line]; 2],
    right: [&[Line]; 2],
    sums: &mut [[f32; 2 * LANES]; 2 * LANES],
) {
    // Each 32 numbers of k are a line of the left factor's rows, and 16 lines of the right one.
    let steps = left[0].len() / LANES;
    assert!(left.iter().chain(&right).all(|lines| lines.len() == steps * LANES), "factors of one length");
    if steps == 0 {
        return sums.as_flattened_mut().fill(0.0);
    }
    Config::load(LANES, TILE_BLOCKS);
    // SAFETY: the tiles are 16 rows of 64 bytes, within the factors as just checked, and within the sums' rows of 128.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{left} + {stride}]",
            "tileloadd tmm6, [{right} + {line}]",
            "tileloadd tmm7, [{right_next} + {line}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{left_next} + {stride}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {left}, 64",
            "add {left_next}, 64",
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
            stride = in(reg) steps * size_of::<Line>(),
            line = in(reg) size_of::<Line>(),
            pair = in(reg) 2 * size_of::<Line>(),
            options(nostack)
        );
    }
}

/// Some columns of a product, of which tiles take `width` blocks at a time.
struct Part<'a, const R: usize> {
    panels: [&'a [Planes]; R],
    codes: &'a [[i8; LANES]],
    stride: usize,
    width: usize,
}

impl<const R: usize> Part<'_, R> {
    /// For tokens of whole tiles, or for fewer than a tile, as was configured.
    fn add(&self, sums: &mut [[__m512i; R]]) {
        let code = |tile: usize| self.codes[tile * LANES * self.stride..].as_ptr();
        let mut tiles = sums.chunks_mut(LANES).enumerate();
        while let Some((tile, sums)) = tiles.next() {
            let sums = sums.as_mut_ptr();
            if R == 1 {
                // SAFETY: `multiply` has checked that codes and weights are there; sums are as many as configured.
                unsafe { self.one_by_one(sums.cast(), code(tile)) };
            } else if let Some((next, more)) = tiles.next() {
                // SAFETY: as above.
                unsafe { self.two_by_two(sums.cast(), more.as_mut_ptr().cast(), code(tile), code(next)) };
            } else {
                // SAFETY: as above.
                unsafe { self.one_by_two(sums.cast(), code(tile)) };
            }
        }
    }

    fn steps(&self) -> usize {
        self.panels[0].len() / self.width
    }

    fn weights(&self, panel: usize) -> *const Line {
        self.panels[panel].as_ptr().cast()
    }

    /// # Safety
    /// `sums`, `[tokens]` vectors, `codes` and the weights are as the tiles are configured.
    unsafe fn one_by_one(&self, sums: *mut __m512i, codes: *const [i8; LANES]) {
        // SAFETY: the caller's promise; tiles are read and written within those.
        unsafe {
            asm!(
                "tileloadd tmm0, [{sums} + {line}]",
                "2:",
                "tileloadd tmm4, [{codes} + {stride}]",
                "tileloadd tmm6, [{weights} + {line}]",
                "tdpbssd tmm0, tmm4, tmm6",
                "add {codes}, 64",
                "add {weights}, 1024",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{sums} + {line}], tmm0",
                sums = in(reg) sums,
                codes = inout(reg) codes => _,
                weights = inout(reg) self.weights(0) => _,
                steps = inout(reg) self.steps() => _,
                stride = in(reg) self.stride * LANES,
                line = in(reg) size_of::<Line>(),
                options(nostack)
            );
        }
    }

    /// # Safety
    /// As of [`one_by_one`](Self::one_by_one), with `sums` `[tokens, 2]`.
    unsafe fn one_by_two(&self, sums: *mut __m512i, codes: *const [i8; LANES]) {
        // SAFETY: the caller's promise; tiles are read and written within those.
        unsafe {
            asm!(
                "tileloadd tmm0, [{sums} + {pair}]",
                "tileloadd tmm1, [{sums} + {pair} + 64]",
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
                "tilestored [{sums} + {pair}], tmm0",
                "tilestored [{sums} + {pair} + 64], tmm1",
                sums = in(reg) sums,
                codes = inout(reg) codes => _,
                first = inout(reg) self.weights(0) => _,
                second = inout(reg) self.weights(1) => _,
                steps = inout(reg) self.steps() => _,
                stride = in(reg) self.stride * LANES,
                line = in(reg) size_of::<Line>(),
                pair = in(reg) 2 * size_of::<Line>(),
                options(nostack)
            );
        }
    }

    /// Four sums at a time: products of one wait for each other.
    ///
    /// # Safety
    /// As of [`one_by_two`](Self::one_by_two), for 16 tokens and the next 16.
    unsafe fn two_by_two(
        &self,
        sums: *mut __m512i,
        more: *mut __m512i,
        codes: *const [i8; LANES],
        next: *const [i8; LANES],
    ) {
        // SAFETY: the caller's promise; tiles are read and written within those.
        unsafe {
            asm!(
                "tileloadd tmm0, [{sums} + {pair}]",
                "tileloadd tmm1, [{sums} + {pair} + 64]",
                "tileloadd tmm2, [{more} + {pair}]",
                "tileloadd tmm3, [{more} + {pair} + 64]",
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
                "tilestored [{sums} + {pair}], tmm0",
                "tilestored [{sums} + {pair} + 64], tmm1",
                "tilestored [{more} + {pair}], tmm2",
                "tilestored [{more} + {pair} + 64], tmm3",
                sums = in(reg) sums,
                more = in(reg) more,
                codes = inout(reg) codes => _,
                next = inout(reg) next => _,
                first = inout(reg) self.weights(0) => _,
                second = inout(reg) self.weights(1) => _,
                steps = inout(reg) self.steps() => _,
                stride = in(reg) self.stride * LANES,
                line = in(reg) size_of::<Line>(),
                pair = in(reg) 2 * size_of::<Line>(),
                options(nostack)
            );
        }
    }
}
