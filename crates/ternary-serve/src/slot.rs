//! [`Slots`]: who may keep a connection open when there are more clients than connections.

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
/// A new one is never kept waiting by idle ones: when all slots are taken, the connection of the address with the most
/// of them is closed that has been idle for longest. Connections that have not shown the API key, where there is one, have
/// a smaller number of slots, and go before those that have.
#[derive(Debug)]
pub struct Slots {
    most: usize,
    /// Connections that have not shown the key.
    unauthenticated: usize,
    epoch: Instant,
    open: Mutex<Vec<Arc<Client>>>,
}

/// What a connection is doing.
#[derive(Debug)]
pub struct Client {
    address: IpAddr,
    epoch: Instant,
    /// When it was opened, or its last request began or ended: milliseconds since the epoch.
    active: AtomicU64,
    /// Requests that are being received or answered.
    requests: AtomicUsize,
    /// The last of them is complete, and being answered.
    working: AtomicBool,
    authenticated: AtomicBool,
    /// Part of what was written is still to be sent.
    unsent: AtomicBool,
    closed: Notify,
}

/// A connection's place, which is free again when this is dropped.
#[derive(Debug)]
pub struct Slot {
    slots: Arc<Slots>,
    pub client: Arc<Client>,
}

/// A request that is being received or answered, until the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Busy(Arc<Counted>);

#[derive(Debug)]
struct Counted(Arc<Client>);

impl Slots {
    pub fn new(most: usize, unauthenticated: usize) -> Self {
        Self { most, unauthenticated, epoch: Instant::now(), open: Mutex::default() }
    }

    /// A slot for a client, if one is free or can be freed.
    pub fn take(self: &Arc<Self>, address: IpAddr) -> Option<Slot> {
        let mut open = self.lock();
        let strangers = open.iter().filter(|client| !client.authenticated.load(Relaxed)).count();
        if strangers >= self.unauthenticated {
            close(&mut open, true)?;
        } else if open.len() >= self.most {
            close(&mut open, false)?;
        }
        let client = Arc::new(Client::new(share(address), self.epoch));
        open.push(client.clone());
        Some(Slot { slots: self.clone(), client })
    }

    /// Closes a connection, as when a new one comes and all slots are taken.
    pub fn close_one(&self) -> Option<()> {
        close(&mut self.lock(), false)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Client>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Closes the connection that is the first to go; none if all are being answered.
fn close(open: &mut Vec<Arc<Client>>, only_unauthenticated: bool) -> Option<()> {
    let mut shares: HashMap<IpAddr, usize> = HashMap::new();
    open.iter().for_each(|client| *shares.entry(client.address).or_default() += 1);
    let closable = open.iter().enumerate().filter(|(_, client)| {
        let kept = only_unauthenticated && client.authenticated.load(Relaxed);
        !kept && !client.working.load(Relaxed)
    });
    let first = closable.min_by_key(|(_, client)| {
        let most = std::cmp::Reverse(shares[&client.address]);
        (client.authenticated.load(Relaxed), most, client.active.load(Relaxed))
    });
    let client = open.remove(first?.0);
    tracing::debug!(address = %client.address, "closed a connection for another");
    client.closed.notify_one();
    Some(())
}

/// Whose connections count together: a household has 2^64 addresses of IPv6.
fn share(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address => address,
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.lock().retain(|client| !Arc::ptr_eq(client, &self.client));
    }
}

impl Client {
    fn new(address: IpAddr, epoch: Instant) -> Self {
        let client = Self {
            address,
            epoch,
            active: AtomicU64::new(0),
            requests: AtomicUsize::new(0),
            working: AtomicBool::new(false),
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

    /// A request has come.
    pub fn begin(self: &Arc<Self>) -> Busy {
        self.requests.fetch_add(1, Relaxed);
        self.touch();
        Busy(Arc::new(Counted(self.clone())))
    }

    /// Whether a request is being received or answered.
    pub fn is_busy(&self) -> bool {
        self.requests.load(Relaxed) > 0
    }

    /// Ends when the connection has to make room for another.
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

impl Busy {
    /// The client has shown the key.
    pub fn authenticate(&self) {
        self.0.0.authenticated.store(true, Relaxed);
    }

    /// All of the request has come: from now on, the client waits for us.
    pub fn work(&self) {
        self.0.0.working.store(true, Relaxed);
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.working.store(false, Relaxed);
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

    fn is_open(slot: &Slot) -> bool {
        slot.slots.lock().iter().any(|client| Arc::ptr_eq(client, &slot.client))
    }

    fn wait() {
        std::thread::sleep(std::time::Duration::from_millis(3));
    }

    #[test]
    fn the_longest_idle_goes_first() {
        let slots = Arc::new(Slots::new(3, usize::MAX));
        let [a, b, c] = [(); 3].map(|()| (slots.take(address(1)).unwrap(), wait()).0);
        drop(a.client.begin());
        let d = slots.take(address(1)).unwrap();
        assert_eq!([&a, &b, &c, &d].map(is_open), [true, false, true, true]);
        // Who waits for an answer stays, who is still sending a request does not.
        let [answered, sending] = [a.client.begin(), c.client.begin()];
        answered.work();
        wait();
        drop(d.client.begin());
        let e = slots.take(address(1)).unwrap();
        assert_eq!([&a, &c, &d, &e].map(is_open), [true, false, true, true]);
        let busy = [d.client.begin(), e.client.begin()];
        busy.iter().for_each(Busy::work);
        assert!(slots.take(address(1)).is_none());
        drop((answered, sending));
        assert!(slots.take(address(1)).is_some());
        assert!(!is_open(&a));
    }

    #[test]
    fn the_address_with_the_most_connections_gives_one_up() {
        let slots = Arc::new(Slots::new(4, usize::MAX));
        let first = slots.take(address(1)).unwrap();
        wait();
        let mut many: Vec<Slot> = (0..40).map(|_| slots.take(address(2)).unwrap()).collect();
        assert!(is_open(&first));
        let third = slots.take(address(3)).unwrap();
        assert!(is_open(&first) && is_open(&third));
        assert_eq!(many.iter().filter(|slot| is_open(slot)).count(), 2);
        many.clear();
        assert_eq!(slots.lock().len(), 2);
        // One household, one share.
        let home = |last: u16| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, last]);
        assert_eq!(share(home(1)), share(home(2)));
        assert_eq!(share("::ffff:10.0.0.1".parse().unwrap()), address(1));
    }

    #[test]
    fn clients_without_the_key_have_fewer_slots() {
        let slots = Arc::new(Slots::new(8, 3));
        let owner = slots.take(address(1)).unwrap();
        owner.client.begin().authenticate();
        wait();
        let strangers: Vec<Slot> = (0..20).map(|_| slots.take(address(1)).unwrap()).collect();
        assert!(is_open(&owner));
        assert_eq!(strangers.iter().filter(|slot| is_open(slot)).count(), 3);
        let owners: Vec<Slot> = (0..5)
            .map(|_| {
                let slot = slots.take(address(1)).unwrap();
                slot.client.begin().authenticate();
                slot
            })
            .collect();
        assert!(is_open(&owner) && owners.iter().all(is_open));
    }
}
