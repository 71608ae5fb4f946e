//! The full-screen display without the feature `tui`: there is none.

use burn::train::{Interrupter, renderer::MetricsRenderer};
use std::io;

/// No display.
#[derive(Clone)]
pub(crate) enum Display {}

impl Display {
    /// None.
    pub fn open(_run: String, _steps: usize, _epochs_per_step: f64) -> Option<Self> {
        None
    }

    pub fn renderer(&self) -> Box<dyn MetricsRenderer> {
        match *self {}
    }

    pub fn sampled(&self, _step: usize, _samples: &[(String, String)]) {
        match *self {}
    }
}

/// No screen.
pub(crate) enum Screen {}

impl Screen {
    pub fn open(display: Display, _interrupter: Interrupter, _signals: bool) -> io::Result<Self> {
        match display {}
    }
}
