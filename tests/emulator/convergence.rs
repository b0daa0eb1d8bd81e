//! Barriers and warp operations that not everyone reaches.

use cuda_std::emulator::FaultKind;
use cuda_std::{Launch, kernel, mma, thread, warp};

use crate::{all_modes, at, fault};

#[kernel(threads = 128)]
unsafe fn upper_half_skips_the_barrier() {
    if thread::thread_idx_x() < 64 {
        thread::sync_threads(); // skipped
    }
}

#[kernel(threads = 128)]
unsafe fn branches_have_their_own_barriers() {
    if thread::thread_idx_x() < 64 {
        thread::sync_threads(); // first of two
    } else {
        thread::sync_threads(); // second of two
    }
}

#[kernel(threads = 128)]
unsafe fn one_thread_leaves_early() {
    if thread::thread_idx_x() == 77 {
        return;
    }
    thread::sync_threads(); // left
}

#[kernel(threads = 128)]
unsafe fn one_thread_loops_longer() {
    let n = 3 + u32::from(thread::thread_idx_x() == 5);
    for _ in 0..n {
        thread::sync_threads(); // looped
    }
}

#[test]
fn a_barrier_that_half_of_the_block_skips_is_divergent() {
    for device in all_modes() {
        let found = fault(unsafe { upper_half_skips_the_barrier::run(&device.0, Launch::linear(2, 128)) });
        assert_eq!(found.at, at!("skipped"));
        let FaultKind::DivergentBarrier { others } = found.kind else { panic!("{found}") };
        assert_eq!(others, "have returned, such as [64, 0, 0]");
    }
}

#[test]
fn two_barriers_in_two_branches_are_divergent() {
    for device in all_modes() {
        let found = fault(unsafe { branches_have_their_own_barriers::run(&device.0, Launch::linear(1, 128)) });
        assert_eq!((found.thread, &found.at), ([0; 3], &at!("first of two")));
        let others = format!("are at {}, such as [64, 0, 0]", at!("second of two"));
        assert_eq!(found.kind, FaultKind::DivergentBarrier { others });
    }
}

#[test]
fn a_barrier_after_one_thread_returned_is_divergent() {
    for device in all_modes() {
        let found = fault(unsafe { one_thread_leaves_early::run(&device.0, Launch::linear(1, 128)) });
        assert_eq!(found.at, at!("left"));
        assert_eq!(found.kind, FaultKind::DivergentBarrier { others: "have returned, such as [77, 0, 0]".into() });
    }
}

#[test]
fn a_barrier_that_one_thread_reaches_once_more_is_divergent() {
    for device in all_modes() {
        let found = fault(unsafe { one_thread_loops_longer::run(&device.0, Launch::linear(1, 128)) });
        assert_eq!((found.thread, &found.at), ([5, 0, 0], &at!("looped")));
        assert!(matches!(found.kind, FaultKind::DivergentBarrier { .. }), "{found}");
    }
}

#[kernel(threads = 64)]
unsafe fn shuffle_here_ballot_there() {
    if thread::thread_idx_x().is_multiple_of(2) {
        warp::shuffle_xor(1u32, 2); // shuffle branch
    } else {
        warp::ballot(true); // ballot branch
    }
}

#[kernel(threads = 64)]
unsafe fn same_operation_twice() {
    if thread::thread_idx_x() < 40 {
        warp::sum(1.0); // low sum
    } else {
        warp::sum(1.0); // high sum
    }
}

#[kernel(threads = 64)]
unsafe fn a_lane_has_returned() {
    if thread::thread_idx_x() == 63 {
        return;
    }
    mma::m16n8k16_f16([0; 4], [0; 2], [0.0; 4]); // lonely mma
}

#[kernel(threads = 64)]
unsafe fn a_lane_waits_at_the_barrier() {
    if thread::thread_idx_x() == 9 {
        thread::sync_threads(); // barrier of one
    }
    warp::sync(); // sync of the others
}

#[test]
fn different_operations_in_two_branches_of_a_warp_are_divergent() {
    for device in all_modes() {
        let found = fault(unsafe { shuffle_here_ballot_there::run(&device.0, Launch::linear(1, 64)) });
        assert_eq!(found.at, at!("shuffle branch"));
        let FaultKind::DivergentWarp { others } = &found.kind else { panic!("{found}") };
        assert!(others.starts_with(&format!("are at {}, such as", at!("ballot branch"))), "{found}");
    }
}

#[test]
fn one_operation_at_two_places_is_divergent_within_a_warp_only() {
    for device in all_modes() {
        // Threads 40 to 63 are of the second warp; the first is whole.
        let found = fault(unsafe { same_operation_twice::run(&device.0, Launch::linear(1, 64)) });
        assert_eq!((found.thread, &found.at), ([32, 0, 0], &at!("low sum")));
        let others = format!("are at {}, such as [40, 0, 0]", at!("high sum"));
        assert_eq!(found.kind, FaultKind::DivergentWarp { others });
    }
}

#[test]
fn a_warp_operation_without_a_returned_lane_is_divergent() {
    for device in all_modes() {
        let found = fault(unsafe { a_lane_has_returned::run(&device.0, Launch::linear(1, 64)) });
        assert_eq!((found.thread, &found.at), ([32, 0, 0], &at!("lonely mma")));
        assert_eq!(found.kind, FaultKind::DivergentWarp { others: "have returned, such as [63, 0, 0]".into() });
    }
}

#[test]
fn a_warp_operation_without_a_lane_at_the_barrier_is_divergent() {
    for device in all_modes() {
        let found = fault(unsafe { a_lane_waits_at_the_barrier::run(&device.0, Launch::linear(1, 64)) });
        assert_eq!((found.thread, &found.at), ([0; 3], &at!("sync of the others")));
        let others = format!("are at {}, such as [9, 0, 0]", at!("barrier of one"));
        assert_eq!(found.kind, FaultKind::DivergentWarp { others });
    }
}

#[kernel(threads = 64)]
unsafe fn every_warp_sums() {
    warp::sum(1.0); // partial
}

#[kernel(threads = 64)]
unsafe fn barriers_only() {
    thread::sync_threads();
}

#[test]
fn a_warp_operation_of_a_partial_warp_is_a_fault() {
    for device in all_modes() {
        let found = fault(unsafe { every_warp_sums::run(&device.0, Launch::linear(1, 48)) });
        assert_eq!((found.thread[0] / 32, &found.at), (1, &at!("partial")));
        assert_eq!(found.kind, FaultKind::PartialWarp { lanes: 16 });
    }
}

#[test]
fn a_partial_warp_may_use_barriers() {
    for device in all_modes() {
        unsafe { barriers_only::run(&device.0, Launch::linear(3, 33)) }.unwrap();
        unsafe { barriers_only::run(&device.0, Launch::linear(3, 1)) }.unwrap();
    }
}

#[kernel(threads = 128)]
unsafe fn warps_go_their_own_ways() {
    match thread::thread_idx_x() / 32 {
        0 => {}
        1 => assert_eq!(warp::sum(1.0), 32.0),
        2 => assert!(warp::all(warp::ballot(true) == !0)),
        _ => warp::sync(),
    }
}

#[test]
fn whole_warps_may_diverge_from_each_other() {
    for device in all_modes() {
        unsafe { warps_go_their_own_ways::run(&device.0, Launch::linear(2, 128)) }.unwrap();
    }
}
