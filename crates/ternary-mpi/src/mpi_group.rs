//! [`Mpi`]: all processes of an MPI job.

use mpi::Threading;
use mpi::datatype::PartitionMut;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::*;
use ternary_parallel::Group;

/// Bytes per call of a broadcast: counts of MPI are 32-bit.
const CHUNK: usize = 64 << 20;

/// Memory for an empty message.
static NOTHING: [u8; 1] = [0];

/// All processes of an MPI job. Dropping it ends MPI; a process that ends without that makes `mpirun` call a good run a failure.
pub struct Mpi {
    universe: Universe,
}

impl Mpi {
    /// Begins MPI; `None` if it was begun before, or if this MPI does not serve a thread other than the main one.
    ///
    /// Call it before other threads start, from the thread that drops it.
    pub fn init() -> Option<Self> {
        let (universe, threading) = mpi::initialize_with_threading(Threading::Serialized)?;
        (threading >= Threading::Serialized).then_some(Self { universe })
    }

    fn world(&self) -> SimpleCommunicator {
        self.universe.world()
    }
}

impl Group for Mpi {
    fn rank(&self) -> usize {
        self.world().rank() as usize
    }

    fn size(&self) -> usize {
        self.world().size() as usize
    }

    fn host(&self) -> String {
        mpi::environment::processor_name().unwrap_or_else(|_| "unknown".into())
    }

    fn gather(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let own = i32::try_from(bytes.len()).expect("messages are below 2 GiB");
        let mut lengths = vec![0i32; self.size()];
        self.world().all_gather_into(&own, &mut lengths[..]);
        let mut starts = Vec::with_capacity(lengths.len());
        let mut total = 0i32;
        for length in &lengths {
            starts.push(total);
            total = total.checked_add(*length).expect("messages are below 2 GiB");
        }
        if total == 0 {
            return vec![Vec::new(); lengths.len()];
        }
        let mut all = vec![0u8; total as usize];
        let mut parts = PartitionMut::new(&mut all[..], &lengths[..], &starts[..]);
        // The pointer of an empty slice may be 1, which is MPI_IN_PLACE.
        let bytes = if bytes.is_empty() { &NOTHING[..0] } else { bytes };
        self.world().all_gather_varcount_into(bytes, &mut parts);
        lengths.iter().zip(starts).map(|(&n, start)| all[start as usize..][..n as usize].to_vec()).collect()
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        let world = self.world();
        let root = world.process_at_rank(0);
        let mut length = bytes.len() as u64;
        root.broadcast_into(&mut length);
        bytes.resize(length as usize, 0);
        for chunk in bytes.chunks_mut(CHUNK) {
            root.broadcast_into(chunk);
        }
    }

    fn all_to_all(&self, send: &[f32], receive: &mut [f32]) {
        self.world().all_to_all_into(send, receive);
    }

    fn all_gather(&self, send: &[f32], receive: &mut [f32]) {
        self.world().all_gather_into(send, receive);
    }

    fn abort(&self, code: u8) -> ! {
        self.world().abort(code.into())
    }
}
