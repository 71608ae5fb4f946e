//! [`Isa`]: the instruction set in use.

use std::sync::OnceLock;

/// An instruction set that this CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isa {
    Scalar,
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
                eprintln!("TERNARY_ISA={name}: this CPU has {}; using {}", names.join(", "), best.name());
                best
            })
        })
    }

    /// All that this CPU has, the best last.
    pub fn available() -> Vec<Self> {
        vec![Self::Scalar]
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
        }
    }
}
