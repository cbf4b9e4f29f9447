//! Connection limits: per listener, per address and per owner.
//!
//! ```text
//! accept ─→ admit ─→ stranger ── a signed request, or a host's certificate ─→ owned ── upgrade ─→ stream
//!                       └─ shut out when its address or the listener is full     (streams.rs counts those)
//! ```
//! A connection is a stranger until it authenticates. A full listener or address drops a stranger:
//! the oldest one of the address that has most. Connections that never authenticate, in any number,
//! therefore lock nobody out who signs the first request.

use roost_types::{ApiError, ErrorCode};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Limits of a listener.
#[derive(Debug, Clone, Copy)]
pub struct DoorLimits {
    /// Most connections.
    pub connections: usize,
    /// Most strangers of one address.
    pub per_address: usize,
    /// Most connections of one owner: an account, or a host.
    pub per_owner: usize,
}

/// Places of one listener.
pub struct Doors {
    limits: DoorLimits,
    inner: Mutex<Inner>,
    /// Notified when a place becomes free.
    freed: Notify,
}

#[derive(Default)]
struct Inner {
    next: u64,
    /// Connections by age.
    places: BTreeMap<u64, Place>,
}

struct Place {
    address: IpAddr,
    owner: Option<String>,
    leave: Arc<Notify>,
}

/// A connection's place; released on drop.
pub struct Seat {
    doors: Arc<Doors>,
    number: u64,
    leave: Arc<Notify>,
    is_stream: Arc<AtomicBool>,
}

impl Doors {
    /// Creates places within limits.
    pub fn new(limits: DoorLimits) -> Arc<Self> {
        Arc::new(Self { limits, inner: Mutex::default(), freed: Notify::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // No code panics while it holds the lock. After a panic, the map would still be a map.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a place for a connection of an address. Waits while every place has an owner.
    pub async fn admit(self: &Arc<Self>, address: IpAddr) -> Seat {
        loop {
            if let Some(seat) = self.try_admit(address) {
                return seat;
            }
            self.freed.notified().await;
        }
    }

    fn try_admit(self: &Arc<Self>, address: IpAddr) -> Option<Seat> {
        let mut inner = self.lock();
        if inner.strangers().get(&address).is_some_and(|count| *count >= self.limits.per_address) {
            inner.shut_out(address);
        }
        if inner.places.len() >= self.limits.connections {
            let (crowded, _) = inner.strangers().into_iter().max_by_key(|(_, count)| *count)?;
            inner.shut_out(crowded);
        }
        let number = inner.next;
        inner.next += 1;
        let leave = Arc::new(Notify::new());
        inner.places.insert(number, Place { address, owner: None, leave: Arc::clone(&leave) });
        Some(Seat { doors: Arc::clone(self), number, leave, is_stream: Arc::default() })
    }
}

impl Inner {
    fn strangers(&self) -> BTreeMap<IpAddr, usize> {
        let mut counts = BTreeMap::new();
        for place in self.places.values().filter(|place| place.owner.is_none()) {
            *counts.entry(place.address).or_default() += 1;
        }
        counts
    }

    /// Drops an address's oldest stranger and takes its place.
    fn shut_out(&mut self, address: IpAddr) {
        let oldest = self.places.iter().find(|(_, place)| place.owner.is_none() && place.address == address);
        if let Some(number) = oldest.map(|(number, _)| *number)
            && let Some(place) = self.places.remove(&number)
        {
            place.leave.notify_one();
        }
    }
}

impl Seat {
    /// Returns once the connection has lost its place and must end.
    pub async fn lost(&self) {
        self.leave.notified().await;
    }

    /// Records the owner of the connection.
    ///
    /// # Errors
    /// `RequestLimitExceeded` if the owner has too many; the connection then stays a stranger.
    pub fn prove(&self, owner: &str) -> Result<(), ApiError> {
        let most = self.doors.limits.per_owner;
        let mut inner = self.doors.lock();
        let others = inner.places.iter().filter(|(number, place)| {
            **number != self.number && place.owner.as_deref().is_some_and(|other| other == owner)
        });
        if others.count() >= most {
            return Err(ApiError::new(
                ErrorCode::RequestLimitExceeded,
                format!("{owner} has {most} connections open, which is the most: close some"),
            ));
        }
        if let Some(place) = inner.places.get_mut(&self.number) {
            place.owner = Some(owner.to_owned());
        }
        Ok(())
    }

    /// Marks the connection as a stream, whose ends may be silent and slow.
    pub fn becomes_stream(&self) {
        self.is_stream.store(true, Ordering::Relaxed);
    }

    /// Turns true when the connection becomes a stream.
    pub fn is_stream(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.is_stream)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.doors.lock().places.remove(&self.number);
        self.doors.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    fn doors(connections: usize, per_address: usize, per_owner: usize) -> Arc<Doors> {
        Doors::new(DoorLimits { connections, per_address, per_owner })
    }

    fn is_lost(seat: &Seat) -> bool {
        seat.lost().now_or_never().is_some()
    }

    #[test]
    fn a_full_address_loses_its_own_oldest_stranger() {
        let doors = doors(10, 2, 10);
        let enter = |last| doors.try_admit(address(last)).unwrap();
        let other = enter(9);
        let (first, second) = (enter(1), enter(1));
        first.prove("alice").unwrap();
        let (third, fourth) = (enter(1), enter(1));
        assert_eq!(
            [&other, &first, &second, &third, &fourth].map(is_lost),
            [false, false, true, false, false]
        );
    }

    #[test]
    fn a_full_listener_loses_a_stranger_of_the_most_crowded_address() {
        let doors = doors(4, 10, 10);
        let enter = |last| doors.try_admit(address(last));
        let one = enter(1).unwrap();
        let crowd: Vec<_> = (0..3).map(|_| enter(2).unwrap()).collect();
        let late = enter(3).unwrap();
        assert!(is_lost(&crowd[0]) && !is_lost(&crowd[1]) && !is_lost(&one) && !is_lost(&late));
        // A newcomer waits if every connection has an owner.
        for seat in [&one, &crowd[1], &crowd[2], &late] {
            seat.prove("alice").unwrap();
        }
        assert!(enter(4).is_none());
        drop(one);
        assert!(doors.admit(address(4)).now_or_never().is_some());
    }

    #[test]
    fn an_owner_has_so_many_connections() {
        let doors = doors(10, 10, 1);
        let (first, second) = (doors.try_admit(address(1)).unwrap(), doors.try_admit(address(1)).unwrap());
        first.prove("account a").unwrap();
        first.prove("account a").unwrap();
        let refused = second.prove("account a").unwrap_err();
        assert_eq!(refused.code, ErrorCode::RequestLimitExceeded);
        second.prove("account b").unwrap();
        drop(first);
        second.prove("account a").unwrap();
    }
}
