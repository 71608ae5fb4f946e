//! [`Isa`]: the instruction set in use, chosen at run time.
//!
//! | name | CPU features | `dot` |
//! |---|---|---|
//! | `scalar` | none | plain Rust |
//! | `avx2` | AVX2, FMA, F16C | `vpmaddubsw`, 16-bit sums |
//! | `avxvnni` | the same and AVX-VNNI | `vpdpbusd` |
//! | `avx512vnni` | AVX-512 F, BW and VNNI | `vpdpbusd`, 512 bits |
//! | `amx` | the same and AMX-TILE, AMX-INT8 | the same, and tile products for many tokens |
//! | `neon` | NEON with dot products | `sdot` |
//!
//! # Measured
//! One Xeon with AMX, two threads, the same program with each set (`TERNARY_ISA`): a training step of 768 x 12 with int8 products,
//! and eight texts generated together (768 x 12, ternary).
//!
//! | | `avx2` | `avx512vnni` | `amx` |
//! |---|---|---|---|
//! | training step, tokens/s | 525 | 1061 | 1738 |
//! | eight texts, tokens/s | 989, 1023 | | 1544, 1543, 1560 |
//!
//! Results do not depend on the choice, except for products of bfloat16. Every instruction set of the CPU is tested against
//! the same oracles, whichever is in use.

#[cfg(target_arch = "aarch64")]
use super::aarch64::Neon;
#[cfg(target_arch = "x86_64")]
use super::x86_64::{Avx2, Avx512};
use super::{
    scalar::Scalar,
    vector::{Kernel, Simd},
};
use std::{
    io::{self, Write},
    sync::OnceLock,
};

/// An instruction set that this CPU has. Each variant holds a value that proves it.
///
/// # Example
/// ```
/// use ternary_kernels::Isa;
/// // The last one is the best.
/// let names: Vec<_> = Isa::available().iter().map(|isa| isa.name()).collect();
/// assert_eq!(names[0], "scalar");
/// // Methods of an instruction set work on one row.
/// let mut x = [1.0, 1.0, 1.0, 1.0];
/// Isa::get().softmax(&mut x);
/// assert_eq!(x, [0.25; 4]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust, for any CPU.
    Scalar(Scalar),
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2<false>),
    /// AVX2 with the dot products of AVX-VNNI.
    #[cfg(target_arch = "x86_64")]
    AvxVnni(Avx2<true>),
    /// AVX-512 with VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// AVX-512 with VNNI, and the tile registers of AMX for products of several tokens.
    #[cfg(target_arch = "x86_64")]
    Amx(Avx512),
    /// NEON with dot products.
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
}

impl Isa {
    /// The best instruction set of this CPU, or the one that the environment variable `TERNARY_ISA` names. Detected once.
    ///
    /// If the CPU lacks the named one, a warning on standard error says so, and the best one is used.
    pub fn get() -> Self {
        static ISA: OnceLock<Isa> = OnceLock::new();
        *ISA.get_or_init(|| {
            let all = Self::available();
            let best = *all.last().expect("every CPU is scalar");
            let Ok(name) = std::env::var("TERNARY_ISA") else { return best };
            all.iter().find(|isa| isa.name() == name).copied().unwrap_or_else(|| {
                let names: Vec<_> = all.iter().map(|isa| isa.name()).collect();
                // A warning that cannot be written is lost.
                let _ = writeln!(
                    io::stderr(),
                    "TERNARY_ISA={name}: this CPU has {}; using {}",
                    names.join(", "),
                    best.name()
                );
                best
            })
        })
    }

    /// All instruction sets of this CPU, the best one last.
    pub fn available() -> Vec<Self> {
        let mut all = vec![Self::Scalar(Scalar)];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(Avx2::new().map(Self::Avx2));
            all.extend(Avx2::new().map(Self::AvxVnni));
            all.extend(Avx512::new().map(Self::Avx512));
            all.extend(Avx512::with_amx().map(Self::Amx));
        }
        #[cfg(target_arch = "aarch64")]
        all.extend(Neon::new().map(Self::Neon));
        all
    }

    /// Its name, as in `TERNARY_ISA`: `scalar`, `avx2`, `avxvnni`, `avx512vnni`, `amx` or `neon`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar(_) => "scalar",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni(_) => "avxvnni",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "avx512vnni",
            #[cfg(target_arch = "x86_64")]
            Self::Amx(_) => "amx",
            #[cfg(target_arch = "aarch64")]
            Self::Neon(_) => "neon",
        }
    }

    /// Whether [`matmul_bf16`](crate::matmul_bf16) rounds its factors: the CPU multiplies bfloat16 in tiles.
    #[cfg(feature = "rayon")]
    pub fn multiplies_bf16(self) -> bool {
        struct Has;
        impl Kernel for Has {
            type Output = bool;

            #[inline(always)]
            fn run<S: Simd>(self, s: S) -> bool {
                s.multiplies_bf16()
            }
        }
        self.run(Has)
    }

    /// Runs a kernel with this instruction set.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Self::Scalar(simd) => simd.vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => simd.vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni(simd) => simd.vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) | Self::Amx(simd) => simd.vectorize(kernel),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(simd) => simd.vectorize(kernel),
        }
    }
}
