//! The list of backends that have our ops.

/// Defines an extension trait of Burn backends and implements it for every backend of the list below.
///
/// `Autodiff` and `Flex` have implementations of their own, next to the trait, in `autodiff.rs` and `flex.rs`; all others
/// compute the default bodies. A backend that is missing from the list panics when one of its ops is called, which cannot
/// happen with our Cargo features.
macro_rules! backend_ops {
    ($(#[$($attribute:tt)*])* pub trait $name:ident: $bound:ident { $($methods:tt)* }) => {
        $(#[$($attribute)*])*
        #[burn::backend::backend_extension(
            Autodiff,
            Flex: cfg(feature = "flex"),
            NdArray: cfg(feature = "ndarray"),
            LibTorch: cfg(feature = "tch"),
            Cube: cfg(any(feature = "wgpu", feature = "cuda")),
            Fusion: cfg(any(feature = "wgpu", feature = "cuda")),
        )]
        pub trait $name: $bound {
            $($methods)*
        }

        #[cfg(feature = "ndarray")]
        impl $name for burn::backend::NdArray {}
        #[cfg(feature = "tch")]
        impl $name for burn::backend::LibTorch {}
        #[cfg(any(feature = "wgpu", feature = "cuda"))]
        impl $name for burn_cubecl::CubeBackend {}
    };
}

pub(super) use backend_ops;
