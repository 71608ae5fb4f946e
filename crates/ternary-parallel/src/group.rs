//! [`Group`]: what the processes of a run ask of each other.

/// The processes that share a run. Each has a rank from 0 to `size() - 1`; rank 0 writes the files.
///
/// All methods but `rank`, `size`, `host` and `abort` are collectives: every process of the group calls them, in the same order
/// and from one thread at a time, and they return once the others have answered. They move bytes and add nothing. A group that
/// cannot reach a process ends this one, or waits: [`Watchdog`](crate::Watchdog) sets a limit.
pub trait Group: Send + Sync {
    /// This process's number.
    fn rank(&self) -> usize;

    /// Number of processes.
    fn size(&self) -> usize;

    /// Name of this process's machine, for messages.
    fn host(&self) -> String;

    /// The bytes of every rank, in the order of ranks; they may differ in length.
    fn gather(&self, bytes: &[u8]) -> Vec<Vec<u8>>;

    /// Replaces `bytes` by those of rank 0.
    fn broadcast(&self, bytes: &mut Vec<u8>);

    /// Sends block `r` of `send` to rank `r`, and receives its block for this rank as block `r` of `receive`.
    ///
    /// # Shapes
    /// `send`, `receive`: `[size, block]`, of the same block on all ranks.
    fn all_to_all(&self, send: &[f32], receive: &mut [f32]);

    /// The numbers of every rank, in the order of ranks.
    ///
    /// # Shapes
    /// `send`: `[block]`, of the same length on all ranks -> `receive`: `[size, block]`.
    fn all_gather(&self, send: &[f32], receive: &mut [f32]);

    /// Ends every process of the group at once, this one with exit code `code`.
    fn abort(&self, code: u8) -> !;

    /// Whether this is the rank that writes files.
    fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Returns when every process has called it.
    fn barrier(&self) {
        self.gather(&[]);
    }

    /// The numbers of every rank, in the order of ranks; they may differ in count.
    fn gather_numbers(&self, numbers: &[f64]) -> Vec<f64> {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        let all = self.gather(&bytes).concat();
        all.chunks_exact(8).map(|bytes| f64::from_le_bytes(bytes.try_into().expect("eight bytes"))).collect()
    }

    /// A sentence's subject for messages: "rank 2 of 4 (host pond)".
    fn name(&self) -> String {
        format!("rank {} of {} (host {})", self.rank(), self.size(), self.host())
    }
}

/// A run in one process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Group for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn host(&self) -> String {
        crate::launcher::host()
    }

    fn gather(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        vec![bytes.to_vec()]
    }

    fn broadcast(&self, _bytes: &mut Vec<u8>) {}

    fn all_to_all(&self, send: &[f32], receive: &mut [f32]) {
        receive.copy_from_slice(send);
    }

    fn all_gather(&self, send: &[f32], receive: &mut [f32]) {
        receive.copy_from_slice(send);
    }

    fn abort(&self, code: u8) -> ! {
        std::process::exit(code.into())
    }
}

impl<G: Group + ?Sized> Group for std::sync::Arc<G> {
    fn rank(&self) -> usize {
        (**self).rank()
    }

    fn size(&self) -> usize {
        (**self).size()
    }

    fn host(&self) -> String {
        (**self).host()
    }

    fn gather(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        (**self).gather(bytes)
    }

    fn broadcast(&self, bytes: &mut Vec<u8>) {
        (**self).broadcast(bytes);
    }

    fn all_to_all(&self, send: &[f32], receive: &mut [f32]) {
        (**self).all_to_all(send, receive);
    }

    fn all_gather(&self, send: &[f32], receive: &mut [f32]) {
        (**self).all_gather(send, receive);
    }

    fn abort(&self, code: u8) -> ! {
        (**self).abort(code)
    }
}
