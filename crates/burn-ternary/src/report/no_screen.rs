//! The full-screen display without the feature `tui`: none is ever opened, and runs print lines.

use super::progress::PlainRenderer;
use burn::train::{Interrupter, renderer::MetricsRenderer};
use std::io;

/// The display that [`Display::open`] does not open.
#[derive(Clone)]
pub(crate) struct Display(());

impl Display {
    /// Always `None`.
    pub fn open(_run: String, _steps: usize, _epochs_per_step: f64) -> Option<Self> {
        None
    }

    pub fn renderer(&self) -> Box<dyn MetricsRenderer> {
        Box::new(PlainRenderer)
    }

    pub fn sampled(&self, _step: usize, _samples: &[(String, String)]) {}

    pub fn rolled_back(&self, _number: usize, _step: usize) {}
}

/// The screen of a display.
pub(crate) struct Screen(());

impl Screen {
    pub fn open(_display: Display, _interrupter: Interrupter, _interrupts: bool) -> io::Result<Self> {
        Ok(Self(()))
    }

    pub fn close(self) {}
}
