//! Turns over a queue that the guest goes on writing, at exactly the moments that matter.

use std::cell::RefCell;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::virtio::testing::{AVAILABLE, Driver, USED};

/// What a guest does at one moment.
type Deed<'a> = Box<dyn FnMut(&mut Driver) + 'a>;

fn nothing<'a>() -> Deed<'a> {
    Box::new(|_| ())
}

/// A turn in which the guest does `before` ahead of each look for a chain, and `looked` between the last look of each round
/// and its end. Returns what the turn says, the heads of the chains that it took, and how often it looked.
fn turn(
    driver: &RefCell<Driver>,
    queue: &mut Queue,
    mut before: Deed<'_>,
    mut looked: Deed<'_>,
) -> (Result<Turn, Broken>, Vec<u16>, usize) {
    let memory = driver.borrow().memory.clone();
    let (mut heads, mut looks) = (Vec::new(), 0);
    let handle = |chain: Option<DescriptorChain<&Memory>>| {
        match chain {
            Some(chain) => heads.push(chain.head_index()),
            None => {
                looks += 1;
                // Each round but the first finds a chain, and takes at most one look that finds none.
                assert!(looks <= 2 * (BUDGET + 1), "the turn never ends");
                before(&mut driver.borrow_mut());
            }
        }
        Answer::Used(0)
    };
    let result = rounds(queue, &memory, handle, || looked(&mut driver.borrow_mut()));
    (result, heads, looks)
}

fn broken(result: Result<Turn, Broken>, why: &str) {
    let Broken(said) = result.unwrap_err();
    assert!(said.contains(why), "{said:?}");
}

fn set_index(driver: &Driver, index: u16) {
    driver.memory.write_obj(index, GuestAddress(AVAILABLE + 2)).unwrap();
}

#[test]
fn a_chain_that_comes_between_the_last_look_and_the_end_of_a_round_is_taken_in_the_next() {
    // In none of the rounds, in the first one only, in several: with a chain there at the beginning or not.
    for there in [false, true] {
        for late in 0..4 {
            let driver = RefCell::new(Driver::new(16));
            let mut queue = driver.borrow().queue();
            let mut expected = Vec::new();
            let add = |driver: &mut Driver| {
                let buffer = driver.want(4);
                driver.add(&[buffer])
            };
            if there {
                expected.push(add(&mut driver.borrow_mut()));
            }
            let mut left = late;
            let looked: Deed<'_> = Box::new(|driver| {
                if left > 0 {
                    left -= 1;
                    expected.push(add(driver));
                }
            });
            let (result, heads, _) = turn(&driver, &mut queue, nothing(), looked);
            let interrupt = !heads.is_empty();
            assert_eq!(result, Ok(Turn { interrupt, more: false }), "{there} {late}");
            assert_eq!(heads, expected);
            let driver = driver.borrow();
            let used: Vec<u32> = driver.used().into_iter().map(|(head, _)| head).collect();
            assert_eq!(used, heads.iter().copied().map(u32::from).collect::<Vec<_>>());
            let flags: u16 = driver.memory.read_obj(GuestAddress(USED)).unwrap();
            assert_eq!(flags, 0, "the guest is asked to ring for the next one");
        }
    }
}

#[test]
fn a_guest_that_always_has_one_more_at_that_moment_gets_no_more_than_the_budget() {
    let driver = RefCell::new(Driver::new(16));
    let mut queue = driver.borrow().queue();
    // The same chain again and again: only the index goes on.
    let buffer = driver.borrow_mut().want(4);
    driver.borrow_mut().add(&[buffer]);
    let mut index = 1;
    let looked: Deed<'_> = Box::new(|driver| {
        index += 1;
        set_index(driver, index);
    });
    let (result, heads, _) = turn(&driver, &mut queue, nothing(), looked);
    assert_eq!(result, Ok(Turn { interrupt: true, more: true }));
    assert_eq!(heads.len(), BUDGET);
}

/// A ring at the end of memory, of which only so many entries can be read. Activation refuses such a queue; what matters
/// here is that an index promises chains and none can be taken.
fn cut_off(driver: &Driver, readable: u64) -> (Queue, GuestAddress) {
    let ring = (4 << 20) - 4 - 2 * readable;
    let mut queue = driver.queue();
    queue.set_avail_ring_address(Some(u32::try_from(ring).unwrap()), None);
    (queue, GuestAddress(ring + 2))
}

#[test]
fn an_index_that_promises_chains_which_cannot_be_taken_breaks_the_queue() {
    for readable in 0..3 {
        let driver = RefCell::new(Driver::new(16));
        let (mut queue, index) = cut_off(&driver.borrow(), readable);
        driver.borrow().memory.write_obj(3_u16, index).unwrap();
        let (result, heads, looks) = turn(&driver, &mut queue, nothing(), nothing());
        broken(result, "cannot be taken");
        assert_eq!(heads.len() as u64, readable);
        // One round that meets it, and one that does not find what the first one promised.
        assert_eq!(looks as u64, readable + 2);
    }
}

#[test]
fn so_does_one_that_makes_its_promise_at_that_moment() {
    let driver = RefCell::new(Driver::new(16));
    let (mut queue, index) = cut_off(&driver.borrow(), 0);
    let looked: Deed<'_> = Box::new(|driver| driver.memory.write_obj(1_u16, index).unwrap());
    let (result, _, looks) = turn(&driver, &mut queue, nothing(), looked);
    broken(result, "cannot be taken");
    assert_eq!(looks, 2);
}

#[test]
fn and_one_that_takes_its_promise_back() {
    let driver = RefCell::new(Driver::new(16));
    let mut queue = driver.borrow().queue();
    let (before, looked): (Deed<'_>, Deed<'_>) =
        (Box::new(|driver| set_index(driver, 0)), Box::new(|driver| set_index(driver, 1)));
    let (result, _, looks) = turn(&driver, &mut queue, before, looked);
    broken(result, "cannot be taken");
    assert_eq!(looks, 2);
}

#[test]
fn an_index_further_ahead_than_the_queue_is_long_breaks_it_at_once() {
    for (index, good) in [(16, true), (17, false), (u16::MAX, false)] {
        let driver = RefCell::new(Driver::new(16));
        let mut queue = driver.borrow().queue();
        set_index(&driver.borrow(), index);
        let (result, heads, _) = turn(&driver, &mut queue, nothing(), nothing());
        assert_eq!((result.is_ok(), heads.len()), (good, if good { 16 } else { 0 }), "{index}");
    }
}

proptest! {
    /// Whatever the index is at each moment, a turn ends, and takes no more than its budget.
    #[test]
    fn a_turn_ends_whatever_the_guest_does_meanwhile(
        moves in proptest::collection::vec(prop_oneof![9 => 0..4_u16, 1 => any::<u16>()], 1..40)
    ) {
        let driver = RefCell::new(Driver::new(16));
        let mut queue = driver.borrow().queue();
        let moves = RefCell::new(moves.into_iter().cycle());
        let meddle = || -> Deed<'_> {
            Box::new(|driver| {
                let taken: u16 = driver.memory.read_obj(GuestAddress(USED + 2)).unwrap();
                set_index(driver, taken.wrapping_add(moves.borrow_mut().next().unwrap()));
            })
        };
        let (result, heads, _) = turn(&driver, &mut queue, meddle(), meddle());
        prop_assert!(heads.len() <= BUDGET);
        if let Ok(turn) = result {
            prop_assert!(!turn.more || heads.len() == BUDGET);
        }
    }
}
