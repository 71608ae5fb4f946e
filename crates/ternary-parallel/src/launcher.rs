//! [`Launcher`]: what a cluster's launcher says of this process.

use std::env;

/// Environment variables in which launchers give the number of processes they started: Open MPI's, those of MPICH, Intel MPI and
/// Slurm's PMI-2, and Slurm's own of a job step (`SLURM_NTASKS` is also set for the one process of a batch script).
const SIZES: [(&str, &str); 3] =
    [("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpirun"), ("SLURM_STEP_NUM_TASKS", "srun")];

/// A launcher that started this process as one of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launcher {
    /// Its command.
    pub command: &'static str,
    /// Number of processes that it started.
    pub size: usize,
}

impl Launcher {
    /// The launcher of this process, as its environment says; also one that started a single process.
    pub fn of_this_process() -> Option<Self> {
        Self::from(|name| env::var(name).ok())
    }

    fn from(variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        SIZES.iter().find_map(|&(name, command)| Some(Self { command, size: variable(name)?.parse().ok()? }))
    }
}

/// Name of this machine.
pub(crate) fn host() -> String {
    let name =
        std::fs::read_to_string("/proc/sys/kernel/hostname").ok().or_else(|| env::var("HOSTNAME").ok());
    name.map_or_else(|| "unknown".into(), |name| name.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launchers_are_known_by_their_variables() {
        let launcher = |variables: &[(&str, &str)]| {
            Launcher::from(|name| {
                variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string())
            })
        };
        let mpirun = Some(Launcher { command: "mpirun", size: 4 });
        assert_eq!(launcher(&[("OMPI_COMM_WORLD_SIZE", "4")]), mpirun);
        assert_eq!(launcher(&[("PMI_SIZE", "4"), ("SLURM_STEP_NUM_TASKS", "4")]), mpirun);
        assert_eq!(launcher(&[("SLURM_STEP_NUM_TASKS", "64")]), Some(Launcher { command: "srun", size: 64 }));
        // A batch script is one process of a job that will start more.
        assert_eq!(launcher(&[("SLURM_NTASKS", "8")]), None);
        assert_eq!(launcher(&[("PMI_SIZE", "many")]), None);
    }
}
