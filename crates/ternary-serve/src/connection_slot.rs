//! [`ConnectionSlots`]: which connections stay open when there are more clients than slots.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};
use tokio::sync::Notify;

/// The open connections.
///
/// Idle connections never keep a new one waiting: when all slots are taken, the longest idle connection of the address with
/// the most connections is closed. If the server has an API key, connections that have not presented it have fewer slots,
/// and are closed first.
#[derive(Debug)]
pub struct ConnectionSlots {
    max: usize,
    /// Maximum number of connections that have not presented the key.
    unauthenticated: usize,
    epoch: Instant,
    open: Mutex<Vec<Arc<ClientState>>>,
}

/// The state of a connection, shared by all that serve it.
#[derive(Debug)]
pub struct ClientState {
    address: IpAddr,
    epoch: Instant,
    /// When it was opened, or its last request started or ended, in milliseconds since the epoch.
    active: AtomicU64,
    /// Number of requests that are being received or answered.
    requests: AtomicUsize,
    /// A request has been received completely, and is being answered.
    answering: AtomicBool,
    authenticated: AtomicBool,
    /// Part of a response has not been sent.
    unsent: AtomicBool,
    closed: Notify,
}

/// The slot of a connection; dropping it frees the slot.
#[derive(Debug)]
pub struct ConnectionSlot {
    slots: Arc<ConnectionSlots>,
    pub client: Arc<ClientState>,
}

/// A guard for a request in flight: it is being received or answered until the last clone is dropped.
#[derive(Clone, Debug)]
pub struct InFlight(Arc<Counted>);

#[derive(Debug)]
struct Counted(Arc<ClientState>);

impl ConnectionSlots {
    pub fn new(max: usize, unauthenticated: usize) -> Self {
        Self { max, unauthenticated, epoch: Instant::now(), open: Mutex::default() }
    }

    /// A slot for a new connection, if one is free or can be freed.
    pub fn take(self: &Arc<Self>, address: IpAddr) -> Option<ConnectionSlot> {
        let mut open = self.lock();
        let unauthenticated = open.iter().filter(|client| !client.authenticated.load(Relaxed)).count();
        if unauthenticated >= self.unauthenticated {
            close(&mut open, true)?;
        } else if open.len() >= self.max {
            close(&mut open, false)?;
        }
        let client = Arc::new(ClientState::new(prefix(address), self.epoch));
        open.push(client.clone());
        Some(ConnectionSlot { slots: self.clone(), client })
    }

    /// Closes a connection, as [`take`](Self::take) does when all slots are taken.
    pub fn close_one(&self) -> Option<()> {
        close(&mut self.lock(), false)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<ClientState>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Closes the connection with the least claim to its slot. `None`: the requests of all are being answered.
fn close(open: &mut Vec<Arc<ClientState>>, only_unauthenticated: bool) -> Option<()> {
    let mut counts: HashMap<IpAddr, usize> = HashMap::new();
    open.iter().for_each(|client| *counts.entry(client.address).or_default() += 1);
    let closable = open.iter().enumerate().filter(|(_, client)| {
        let kept = only_unauthenticated && client.authenticated.load(Relaxed);
        !kept && !client.answering.load(Relaxed)
    });
    let first = closable.min_by_key(|(_, client)| {
        let count = std::cmp::Reverse(counts[&client.address]);
        (client.authenticated.load(Relaxed), count, client.active.load(Relaxed))
    });
    let client = open.remove(first?.0);
    tracing::debug!(address = %client.address, "closed a connection to make room for another");
    client.closed.notify_one();
    Some(())
}

/// The address whose connections count together: the /64 prefix of IPv6, which a single client has.
fn prefix(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address => address,
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.slots.lock().retain(|client| !Arc::ptr_eq(client, &self.client));
    }
}

impl ClientState {
    fn new(address: IpAddr, epoch: Instant) -> Self {
        let client = Self {
            address,
            epoch,
            active: AtomicU64::new(0),
            requests: AtomicUsize::new(0),
            answering: AtomicBool::new(false),
            authenticated: AtomicBool::new(false),
            unsent: AtomicBool::new(false),
            closed: Notify::new(),
        };
        client.touch();
        client
    }

    fn touch(&self) {
        self.active.store(self.epoch.elapsed().as_millis() as u64, Relaxed);
    }

    /// A request has started.
    pub fn begin_request(self: &Arc<Self>) -> InFlight {
        self.requests.fetch_add(1, Relaxed);
        self.touch();
        InFlight(Arc::new(Counted(self.clone())))
    }

    /// Whether a request is being received or answered.
    pub fn has_requests(&self) -> bool {
        self.requests.load(Relaxed) > 0
    }

    /// Completes when the connection has to make room for another.
    pub async fn closed(&self) {
        self.closed.notified().await;
    }

    pub fn has_unsent(&self) -> bool {
        self.unsent.load(Relaxed)
    }

    pub fn set_unsent(&self, unsent: bool) {
        self.unsent.store(unsent, Relaxed);
    }
}

impl InFlight {
    /// The client has presented the API key.
    pub fn authenticate(&self) {
        self.0.0.authenticated.store(true, Relaxed);
    }

    /// The request has been received completely. From now on the client waits for the server.
    pub fn received(&self) {
        self.0.0.answering.store(true, Relaxed);
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.answering.store(false, Relaxed);
        self.0.requests.fetch_sub(1, Relaxed);
        self.0.touch();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    fn is_open(slot: &ConnectionSlot) -> bool {
        slot.slots.lock().iter().any(|client| Arc::ptr_eq(client, &slot.client))
    }

    fn wait() {
        std::thread::sleep(std::time::Duration::from_millis(3));
    }

    #[test]
    fn the_longest_idle_connection_is_closed_first() {
        let slots = Arc::new(ConnectionSlots::new(3, usize::MAX));
        let [a, b, c] = [(); 3].map(|()| (slots.take(address(1)).unwrap(), wait()).0);
        drop(a.client.begin_request());
        let d = slots.take(address(1)).unwrap();
        assert_eq!([&a, &b, &c, &d].map(is_open), [true, false, true, true]);
        // A client that waits for a response stays, one that is still sending a request does not.
        let [answered, sending] = [a.client.begin_request(), c.client.begin_request()];
        answered.received();
        wait();
        drop(d.client.begin_request());
        let e = slots.take(address(1)).unwrap();
        assert_eq!([&a, &c, &d, &e].map(is_open), [true, false, true, true]);
        let in_flight = [d.client.begin_request(), e.client.begin_request()];
        in_flight.iter().for_each(InFlight::received);
        assert!(slots.take(address(1)).is_none());
        drop((answered, sending));
        assert!(slots.take(address(1)).is_some());
        assert!(!is_open(&a));
    }

    #[test]
    fn the_address_with_the_most_connections_loses_one() {
        let slots = Arc::new(ConnectionSlots::new(4, usize::MAX));
        let first = slots.take(address(1)).unwrap();
        wait();
        let mut many: Vec<ConnectionSlot> = (0..40).map(|_| slots.take(address(2)).unwrap()).collect();
        assert!(is_open(&first));
        let third = slots.take(address(3)).unwrap();
        assert!(is_open(&first) && is_open(&third));
        assert_eq!(many.iter().filter(|slot| is_open(slot)).count(), 2);
        many.clear();
        assert_eq!(slots.lock().len(), 2);
        // The addresses of a /64 prefix count together.
        let home = |last: u16| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, last]);
        assert_eq!(prefix(home(1)), prefix(home(2)));
        assert_eq!(prefix("::ffff:10.0.0.1".parse().unwrap()), address(1));
    }

    #[test]
    fn connections_without_the_key_have_fewer_slots() {
        let slots = Arc::new(ConnectionSlots::new(8, 3));
        let owner = slots.take(address(1)).unwrap();
        owner.client.begin_request().authenticate();
        wait();
        let unauthenticated: Vec<ConnectionSlot> = (0..20).map(|_| slots.take(address(1)).unwrap()).collect();
        assert!(is_open(&owner));
        assert_eq!(unauthenticated.iter().filter(|slot| is_open(slot)).count(), 3);
        let owners: Vec<ConnectionSlot> = (0..5)
            .map(|_| {
                let slot = slots.take(address(1)).unwrap();
                slot.client.begin_request().authenticate();
                slot
            })
            .collect();
        assert!(is_open(&owner) && owners.iter().all(is_open));
    }
}
