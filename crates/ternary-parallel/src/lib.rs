//! The processes that share a training run: collectives, and sums in an order that does not depend on their number.
//!
//! | question | item |
//! |---|---|
//! | What do the processes ask of each other? | [`Group`]; [`Alone`] for one process, [`Threads`] for tests |
//! | In which order are gradients added? | [`TreeSum`], and over processes [`sum_over_ranks`] |
//! | What if a process does not answer? | [`Watchdog`] |
//! | Did a launcher start this process as one of several? | [`Launcher`] |
//!
//! The group that talks over MPI is the crate `ternary-mpi`; this one needs no MPI.
//!
//! # One result for any number of processes
//!
//! Floating-point addition is not associative, so the order of a sum must be a property of the run. A step's gradients are
//! added in a fixed binary tree over its micro-batches. Each process computes a contiguous share of them, adds up the subtrees
//! that lie in its share, and the roots of these subtrees are exchanged and added as the tree demands:
//!
//! ```text
//! micro-batches   0   1   2   3   4   5        6 of them on 2 processes
//!                 └─┬─┘   └─┬─┘   └─┬─┘
//!                   └───┬───┘       │          process 0 has 0 1 2: sends (0 1) and 2
//!                       └─────┬─────┘          process 1 has 3 4 5: sends 3 and (4 5)
//!                            sum
//! ```
//!
//! `MPI_Allreduce` and its kin promise no order, and choose one by message size and number of processes. So the group only
//! moves numbers, and this crate adds them.
//!
//! # Example
//!
//! Three processes, as threads, add five micro-batches:
//!
//! ```
//! use ternary_parallel::{Group, Threads, TreeSum, add_slices, share, sum_over_ranks};
//!
//! let gradient = |batch: usize| vec![0.1f32 * batch as f32; 4];
//! let mut alone = TreeSum::default();
//! (0..6).for_each(|batch| alone.push(batch, Some(gradient(batch)), &mut add_slices));
//! let alone = alone.finish(&mut add_slices).unwrap();
//!
//! let sums = Threads::run(3, |group| {
//!     let mut tree = TreeSum::default();
//!     for batch in share(6, group.rank(), group.size()) {
//!         tree.push(batch, Some(gradient(batch)), &mut add_slices);
//!     }
//!     sum_over_ranks(group, &[true; 6], tree.into_values())
//! });
//! assert!(sums.iter().all(|sum| *sum == alone));
//! ```

mod exchange;
mod group;
mod launcher;
mod threads;
mod tree;
mod watchdog;

pub use exchange::sum_over_ranks;
pub use group::{Alone, Group};
pub use launcher::Launcher;
pub use threads::Threads;
pub use tree::{TreeSum, add_slices, share};
pub use watchdog::{Phase, Watchdog};
