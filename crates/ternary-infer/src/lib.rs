//! Generates text from model files with ternary weights, on CPUs.
