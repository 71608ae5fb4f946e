//! [`Isa`]: the instruction set in use.

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

/// An instruction set that this CPU has: each variant holds the proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isa {
    Scalar(Scalar),
    /// With FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2<false>),
    #[cfg(target_arch = "x86_64")]
    AvxVnni(Avx2<true>),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    /// With the tiles of AMX for products of many tokens.
    #[cfg(target_arch = "x86_64")]
    Amx(Avx512),
    /// With dot products.
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
}

impl Isa {
    /// The best one, or the one that the environment variable `TERNARY_ISA` names; found once.
    ///
    /// A name that this CPU lacks is reported on standard error and passed over.
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

    /// All that this CPU has, the best last.
    pub fn available() -> Vec<Self> {
        let mut all = vec![Self::Scalar(Scalar)];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(Avx2::new().map(Self::Avx2));
            all.extend(Avx2::new().map(Self::AvxVnni));
            all.extend(Avx512::new().map(Self::Avx512));
            all.extend(Avx512::with_tiles().map(Self::Amx));
        }
        #[cfg(target_arch = "aarch64")]
        all.extend(Neon::new().map(Self::Neon));
        all
    }

    /// As in `TERNARY_ISA`: `scalar`, `avx2`, `avxvnni`, `avx512vnni`, `amx` or `neon`.
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

    /// Whether [`half_product`](crate::half_product) rounds: the CPU has a unit for products of bfloat16.
    #[cfg(feature = "rayon")]
    pub fn has_half_tiles(self) -> bool {
        struct Has;
        impl Kernel for Has {
            type Output = bool;

            #[inline(always)]
            fn run<S: Simd>(self, s: S) -> bool {
                s.has_half_tiles()
            }
        }
        self.run(Has)
    }

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
