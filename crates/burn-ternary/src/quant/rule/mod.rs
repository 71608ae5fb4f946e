//! The scale rules, one per file.

mod absmean;
mod absmedian;
mod learned;
mod seq;
mod ttq;
mod twn;

use super::{ScaleRule, scale_rule::Rule};

impl ScaleRule {
    /// The implementation of the rule.
    pub(crate) fn rule(self) -> &'static dyn Rule {
        match self {
            Self::Absmean => &absmean::Absmean,
            Self::Absmedian => &absmedian::Absmedian,
            Self::Twn => &twn::Twn,
            Self::Learned => &learned::Learned,
            Self::Seq => &seq::Seq,
            Self::Ttq => &ttq::Ttq,
        }
    }
}
