//! How many may wait.
#![allow(clippy::unwrap_used)]

mod common;

use common::{add, config, request, step};
use quire_scheduler::{AddError, Config, Scheduler, Time};

#[test]
fn those_that_were_preempted_take_no_newcomers_place() {
    // 40 positions: two that grow to 30 do not fit together.
    let mut scheduler = Scheduler::new(Config {
        max_waiting: 2,
        prefix_cache: false,
        ..config(&[0], 10)
    })
    .unwrap();
    add(&mut scheduler, request(0..8, 30));
    add(&mut scheduler, request(100..108, 30));
    while scheduler.stats().preemptions == 0 {
        step(&mut scheduler, 7, false);
    }
    assert_eq!(scheduler.stats().waiting, 1);
    for _ in 0..2 {
        add(&mut scheduler, request(0..8, 30));
        scheduler.check_invariants();
    }
    assert_eq!(
        scheduler.add(request(0..8, 30), Time(0)),
        Err(AddError::QueueFull { waiting: 2 })
    );
}
