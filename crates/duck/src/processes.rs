//! The processes of a training run, as a launcher (`mpirun`, `srun`) has started them.

use crate::Error;
use std::sync::Arc;
use ternary_parallel::Group;

/// The processes that share this command, this one included; `None` where no launcher has started it. Call it before any thread
/// is started.
#[cfg(feature = "mpi")]
pub fn group() -> Result<Option<Arc<dyn Group>>, Error> {
    use burn_ternary::run::TrainError;
    use ternary_parallel::Launcher;

    let Some(Launcher { command, size }) = Launcher::of_this_process() else { return Ok(None) };
    let refuse = |reason| Error::Train(TrainError::Launcher { command, size, reason });
    let mpi = ternary_mpi::Mpi::init().ok_or_else(|| refuse("its MPI cannot be used by threads"))?;
    if mpi.size() == 1 && size > 1 {
        return Err(refuse("it was built with another MPI, in which each of them is alone"));
    }
    if mpi.is_first() {
        warn_of_one_core();
    }
    Ok(Some(Arc::new(mpi)))
}

/// Open MPI binds each process to one core where it starts one or two.
#[cfg(feature = "mpi")]
fn warn_of_one_core() {
    let usable = std::thread::available_parallelism().map_or(1, usize::from);
    let online = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let online = online.lines().filter(|line| line.starts_with("processor")).count();
    if usable == 1 && online > 1 {
        crate::terminal::print_stderr(format_args!(
            "warning: the launcher has bound this process to 1 of {online} cores, so that it computes with one thread; mpirun \
             --bind-to none lets it use all"
        ));
    }
}

/// Without the feature `mpi` the training refuses to be one of several processes.
#[cfg(not(feature = "mpi"))]
pub fn group() -> Result<Option<Arc<dyn Group>>, Error> {
    Ok(None)
}
