//! `Mpi`: the processes of a training run over MPI, as a [`Group`](ternary_parallel::Group).
//!
//! It moves bytes and numbers; `ternary-parallel` adds them. With the feature `mpi` it links the MPI that `mpicc` belongs to (Open
//! MPI, MPICH, Intel MPI ...), and its build needs libclang. Without the feature the crate is empty.
//!
//! ```sh
//! apt-get install openmpi-bin libopenmpi-dev libclang-dev     # Debian
//! cargo install --path crates/duck --features mpi
//! mpirun --bind-to none -n 4 duck train mine.toml
//! ```
//!
//! An error inside MPI ends all processes, with MPI's own message: its default error handler stays in place, since the binding
//! ignores return codes.

#[cfg(feature = "mpi")]
mod mpi_group;
#[cfg(feature = "mpi")]
pub use mpi_group::Mpi;
