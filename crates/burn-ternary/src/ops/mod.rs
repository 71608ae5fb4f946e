//! Tensor primitives that need a backend.
