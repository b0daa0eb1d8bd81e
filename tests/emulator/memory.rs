//! Bounds, alignment, memory that nothing wrote, and copies in flight.

use cuda_std::emulator::{FaultKind, MemoryError};
use cuda_std::{Atomics, Disjoint, Global, Launch, cp_async, f16, kernel, shared_array, thread};

use crate::{Device, all_modes, at, checked, fault};

const N: usize = 64;
const ONE_WARP: Launch = Launch::linear(1, 32);

/// A value that an access gave and nobody needs.
fn touch<T>(_: T) {}

/// Thread 3 makes the access `what` at `i`.
#[kernel(threads = 32)]
unsafe fn access(x: Global<u32>, h: Global<f16>, out: Disjoint<u32>, counts: Atomics<u32>, what: u32, i: u64) {
    let shared = shared_array!(access_array: [u32; N]);
    shared.write(2 * thread::thread_idx_x() as usize, 0);
    shared.write(2 * thread::thread_idx_x() as usize + 1, 0);
    thread::sync_threads();
    if thread::thread_idx_x() != 3 {
        return;
    }
    let i = i as usize;
    match what {
        0 => touch(x.read(i)),                         // read
        1 => touch(x[i]),                              // index
        2 => touch(x.read_unchecked(i)),               // read_unchecked
        3 => touch(x.load4(i)),                        // load4
        4 => touch(x.load8(i)),                        // load8
        5 => touch(x.load16(i)),                       // load16
        6 => touch(x.row_unchecked(i, 4)),             // row_unchecked
        7 => touch(h.load4(i)),                        // half load4
        8 => touch(h.load16(i)),                       // half load16
        9 => out.write(i, 0),                          // write
        10 => out.store16(i, [0; 4]),                  // store16
        11 => touch(out.read(i)),                      // read back
        12 => touch(counts.fetch_add(i, 1)),           // atomic
        13 => touch(shared.read(i)),                   // shared read
        14 => shared.write(i, 0),                      // shared write
        15 => touch(shared.load4(i)),                  // shared load4
        16 => touch(shared.load16(i)),                 // shared load16
        17 => shared.store4(i, 0),                     // shared store4
        18 => shared.store16(i, [0; 4]),               // shared store16
        19 => shared.copy_async(i, x, 0, true),        // copy to
        20 => shared.copy_async(0, x, i, true),        // copy from
        21 => shared.copy_async(i, x, 0, false),       // zeros to
        22 => touch(x.slice(8, 8).map(|x| x.read(i))), // slice
        _ => shared.copy_async(0, x, i, false),        // zeros from
    }
}

fn run_access(device: &Device, what: u32, i: u64) -> Result<(), cuda_std::LaunchError> {
    let (x, h, out, counts) = (device.zeros(N), device.zeros(N), device.zeros(N), device.zeros(N));
    unsafe { access::run(&device.0, ONE_WARP, x, h, out, counts, what, i) }
}

#[test]
fn accesses_past_the_end_are_faults_in_every_mode() {
    const FAR: usize = usize::MAX;
    // What, where, and the first index past the end or the last one touched, as the fault names it.
    let cases = [
        (0, "read", N, N),
        (0, "read", FAR, FAR),
        (1, "index", N, N),
        (1, "index", FAR, FAR),
        (2, "read_unchecked", N, N),
        (2, "read_unchecked", FAR, FAR),
        (3, "load4", N, N),
        (4, "load8", N, N + 1),
        (5, "load16", N - 4 + 1, N),
        (5, "load16", N, N + 3),
        (5, "load16", FAR, FAR),
        (5, "load16", FAR - 1, FAR),
        (6, "row_unchecked", 16, 67),
        (6, "row_unchecked", FAR, FAR - 1),
        (6, "row_unchecked", FAR / 4, FAR - 1),
        (7, "half load4", N - 1, N),
        (8, "half load16", N - 7, N),
        (9, "write", N, N),
        (9, "write", FAR, FAR),
        (10, "store16", N - 3, N),
        (10, "store16", FAR - 2, FAR),
        (11, "read back", N, N),
        (12, "atomic", N, N),
        (12, "atomic", FAR, FAR),
        (13, "shared read", N, N),
        (13, "shared read", FAR, FAR),
        (14, "shared write", N, N),
        (15, "shared load4", N, N),
        (16, "shared load16", N - 3, N),
        (17, "shared store4", N, N),
        (18, "shared store16", N - 1, N + 2),
        (19, "copy to", N - 3, N),
        (19, "copy to", FAR, FAR),
        (20, "copy from", N - 3, N),
        (20, "copy from", FAR, FAR),
        (21, "zeros to", N, N + 3),
    ];
    for (what, marker, i, index) in cases {
        for device in all_modes() {
            let found = fault(run_access(&device, what, i as u64));
            assert_eq!(
                (found.kernel, found.thread, found.at.as_str()),
                ("access", [3, 0, 0], &*at!(marker)),
                "{found}"
            );
            assert_eq!(found.kind, FaultKind::OutOfBounds { index, len: N }, "{marker} at {i}");
        }
    }
}

#[test]
fn a_sub_slice_has_its_own_end() {
    for device in all_modes() {
        let found = fault(run_access(&device, 22, 8));
        assert_eq!((found.kind, found.at), (FaultKind::OutOfBounds { index: 8, len: 8 }, at!("slice")));
    }
}

#[test]
fn misaligned_vector_accesses_are_faults_in_every_mode() {
    let cases = [
        (4, "load8", 1, 8),
        (5, "load16", 2, 16),
        (7, "half load4", 1, 4),
        (8, "half load16", 4, 16),
        (10, "store16", 1, 16),
        (16, "shared load16", 3, 16),
        (18, "shared store16", 2, 16),
        (19, "copy to", 1, 16),
        (20, "copy from", 1, 16),
        (21, "zeros to", 1, 16),
    ];
    for (what, marker, i, expected) in cases {
        for device in all_modes() {
            let found = fault(run_access(&device, what, i));
            assert_eq!((found.thread, found.at.as_str()), ([3, 0, 0], &*at!(marker)), "{found}");
            let FaultKind::Misaligned { address, alignment } = found.kind else { panic!("{found}") };
            assert!(alignment == expected && !address.is_multiple_of(alignment), "{found}");
        }
    }
}

#[test]
fn the_last_element_of_every_access_is_inside() {
    let last = [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2), (5, 4), (7, 2), (8, 8), (9, 1), (10, 4), (11, 1), (12, 1)];
    let shared = [(13, 1), (14, 1), (15, 1), (16, 4), (17, 1), (18, 4), (19, 4), (20, 4), (21, 4)];
    for device in all_modes() {
        for (what, width) in last.into_iter().chain(shared) {
            run_access(&device, what, N as u64 - width).unwrap();
        }
        run_access(&device, 6, 15).unwrap();
        run_access(&device, 22, 7).unwrap();
    }
}

#[test]
fn a_copy_that_is_not_valid_reads_nothing() {
    for device in all_modes() {
        run_access(&device, 99, u64::MAX).unwrap();
    }
}

#[kernel(threads = 32)]
unsafe fn copy_elements(out: Disjoint<u32>, x: Global<u32>) {
    let t = thread::thread_idx_x() as usize;
    if t < x.len() {
        out.write(t, x[t]); // copy element
    }
}

#[test]
fn a_slice_argument_is_inside_one_live_allocation() {
    for device in all_modes() {
        let (out, x) = (device.zeros::<u32>(32), device.zeros::<u32>(16));
        let run = |x| unsafe { copy_elements::run(&device.0, ONE_WARP, out, x) };
        let not_allocated = |address, bytes| FaultKind::NotAllocated { index: 1, param: "x", address, bytes };

        let longer = cuda_std::DeviceSlice::new(x.address(), 17);
        assert_eq!(fault(run(longer)).kind, not_allocated(x.address(), 68));
        let shifted = cuda_std::DeviceSlice::new(x.address() + 4, 16);
        assert_eq!(fault(run(shifted)).kind, not_allocated(x.address() + 4, 64));
        let endless = cuda_std::DeviceSlice::new(x.address(), usize::MAX);
        assert_eq!(fault(run(endless)).kind, not_allocated(x.address(), u64::MAX));
        let nowhere = cuda_std::DeviceSlice::new(256, 1);
        assert_eq!(fault(run(nowhere)).kind, not_allocated(256, 4));

        let odd = cuda_std::DeviceSlice::new(x.address() + 2, 1);
        let found = fault(run(odd));
        assert_eq!(found.at, "at launch");
        assert_eq!(found.kind, FaultKind::Misaligned { address: x.address() as usize + 2, alignment: 4 });

        run(x.slice(4..16)).unwrap();
        device.0.free(x.address()).unwrap();
        assert_eq!(fault(run(x)).kind, not_allocated(x.address(), 64));
        run(x.slice(0..0)).unwrap();
        let twice = device.0.free(x.address());
        assert_eq!(twice, Err(MemoryError::NotAllocated { address: x.address(), bytes: 0 }));
    }
}

#[kernel(threads = 32)]
unsafe fn writes_even_elements(out: Disjoint<u32>) {
    let t = thread::thread_idx_x() as usize;
    if t.is_multiple_of(2) {
        out.write(t, 1);
    }
}

#[kernel(threads = 32)]
unsafe fn loads16_once(x: Global<u32>) {
    if thread::thread_idx_x() == 0 {
        x.load16(0); // load of four
    }
}

#[kernel(threads = 32)]
unsafe fn reads_halves(x: Global<f16>) {
    x.read(thread::thread_idx_x() as usize % 2); // read of a half
}

#[kernel(threads = 32)]
unsafe fn counts_in(counts: Atomics<u64>) {
    counts.fetch_add(0, 1); // count
}

#[kernel(threads = 32)]
unsafe fn reads_shared_that_only_the_first_wrote() {
    let shared = shared_array!(first_only: [f16; N]);
    let t = thread::thread_idx_x() as usize;
    if t == 0 {
        shared.write(0, f16::from_bits(0));
    }
    thread::sync_threads();
    shared.read(usize::from(t == 17)); // shared half
}

#[test]
fn reading_what_nothing_wrote_is_a_fault() {
    let device = checked();
    let (fresh, out) = (device.uninitialized::<u32>(32), device.zeros::<u32>(32));
    let found = fault(unsafe { copy_elements::run(&device.0, ONE_WARP, out, fresh) });
    assert_eq!((found.kind, found.at), (FaultKind::Uninitialized { index: 0 }, at!("copy element")));

    device.0.copy_to_device(fresh.address(), &[0; 12]).unwrap();
    let found = fault(unsafe { loads16_once::run(&device.0, ONE_WARP, fresh) });
    assert_eq!((found.kind, found.at), (FaultKind::Uninitialized { index: 3 }, at!("load of four")));

    let halves = device.uninitialized::<f16>(2);
    device.0.fill(halves.address(), 0, 2).unwrap();
    let found = fault(unsafe { reads_halves::run(&device.0, ONE_WARP, halves) });
    assert_eq!((found.kind, found.thread), (FaultKind::Uninitialized { index: 1 }, [1, 0, 0]));

    let counts = device.uninitialized::<u64>(1);
    let found = fault(unsafe { counts_in::run(&device.0, ONE_WARP, counts) });
    assert_eq!((found.kind, found.at), (FaultKind::Uninitialized { index: 0 }, at!("count")));

    let found = fault(unsafe { reads_shared_that_only_the_first_wrote::run(&device.0, ONE_WARP) });
    assert_eq!((found.kind, found.thread), (FaultKind::Uninitialized { index: 1 }, [17, 0, 0]));
}

#[test]
fn shared_memory_of_the_block_before_counts_as_unwritten() {
    for seed in 0..4 {
        let device = Device::new(cuda_std::emulator::Mode::Checked { seed });
        let out = device.zeros::<u32>(2);
        let found = fault(unsafe { inherits_shared::run(&device.0, Launch::linear(2, 1), out) });
        assert_eq!(found.kind, FaultKind::Uninitialized { index: 0 }, "seed {seed}");
    }
}

/// Block 0 writes, and block 1 reads, or the other way round: whoever comes second finds nothing.
#[kernel(threads = 1)]
unsafe fn inherits_shared(out: Disjoint<u32>) {
    let shared = shared_array!(inherited: [u32; 1]);
    if thread::block_idx_x() == 0 {
        shared.write(0, 7);
    } else {
        out.write(0, shared.read(0));
    }
}

#[test]
fn the_host_may_not_read_what_nothing_wrote() {
    let device = checked();
    let out = device.uninitialized::<u32>(32);
    let uninitialized = |slice: cuda_std::DeviceSlice<u32>, bytes, byte| MemoryError::Uninitialized {
        address: slice.address(),
        bytes,
        byte,
    };
    assert_eq!(device.download(out), Err(uninitialized(out, 128, 0)));
    unsafe { writes_even_elements::run(&device.0, ONE_WARP, out) }.unwrap();
    assert_eq!(device.download(out), Err(uninitialized(out, 128, 4)));
    assert_eq!(device.download(out.slice(2..4)), Err(uninitialized(out.slice(2..4), 8, 4)));
    assert_eq!(device.download(out.slice(4..5)), Ok(vec![1]));
    assert_eq!(device.download(out.slice(1..1)), Ok(vec![]));
    // Byte 3 is the last of element 0; the first unwritten one is byte 1 of the two.
    let found = device.0.copy_to_host(out.address() + 3, &mut [0; 2]);
    assert_eq!(found, Err(MemoryError::Uninitialized { address: out.address() + 3, bytes: 2, byte: 1 }));
    // An odd address and no bytes.
    assert_eq!(device.0.copy_to_host(out.address() + 5, &mut []), Ok(()));
}

#[test]
fn host_copies_stay_inside_one_allocation() {
    for device in all_modes() {
        let address = device.0.allocate(100).unwrap();
        assert_eq!(address % 256, 0);
        let outside = |bytes| Err(MemoryError::NotAllocated { address: address + 90, bytes });
        assert_eq!(device.0.copy_to_device(address + 90, &[0; 11]), outside(11));
        assert_eq!(device.0.copy_to_host(address + 90, &mut [0; 11]), outside(11));
        assert_eq!(device.0.fill(address + 90, 0, 11), outside(11));
        assert_eq!(device.0.fill(address + 90, 0, usize::MAX), outside(usize::MAX));
        device.0.fill(address + 90, 0x5a, 10).unwrap();
        let mut bytes = [0; 10];
        device.0.copy_to_host(address + 90, &mut bytes).unwrap();
        assert_eq!(bytes, [0x5a; 10]);
        let huge = device.0.allocate(usize::MAX);
        assert_eq!(huge, Err(MemoryError::OutOfMemory { bytes: usize::MAX }));
    }
}

/// Each thread copies its four elements in; `plan` says what it does wrong.
#[kernel(threads = 64)]
unsafe fn copies(out: Disjoint<u32>, x: Global<u32>, plan: u32) {
    let shared = shared_array!(copied: [u32; N * 4]);
    let t = thread::thread_idx_x() as usize;
    if plan == READ_BY_OTHERS_AT_ISSUE {
        shared.store16(4 * t, [0; 4]);
        thread::sync_threads();
        shared.read(4 * ((t + 1) % 64)); // still reading
    }
    shared.copy_async(4 * t, x, 4 * t, true); // issue
    if plan == ISSUED_TWICE {
        shared.copy_async(4 * t, x, 4 * t, true); // issue again
    }
    if plan == OVERWRITTEN {
        shared.write(4 * t + 3, 0); // overwrite
    }
    if plan == OVERWRITTEN_AFTER_A_BARRIER {
        thread::sync_threads();
        shared.write(4 * (t ^ 1) + 3, 0); // overwrite after a barrier
    }
    if plan == NEVER_WAITED {
        return;
    }
    if plan != NOT_COMMITTED {
        cp_async::commit();
    }
    if plan == NOT_WAITED {
        cp_async::wait::<1>();
    } else {
        cp_async::wait::<0>();
    }
    let own = shared.load16(4 * t)[1]; // own element
    out.write(t, own);
    if plan != NO_BARRIER {
        thread::sync_threads();
    }
    out.write(t + 64, shared.read(4 * (t ^ 1))); // other's element
}
const RIGHT: u32 = 0;
const NOT_WAITED: u32 = 1;
const NOT_COMMITTED: u32 = 2;
const NO_BARRIER: u32 = 3;
const READ_BY_OTHERS_AT_ISSUE: u32 = 4;
const ISSUED_TWICE: u32 = 5;
const OVERWRITTEN: u32 = 6;
const OVERWRITTEN_AFTER_A_BARRIER: u32 = 7;
const NEVER_WAITED: u32 = 8;

#[test]
fn a_copy_arrives_when_it_was_waited_for_and_a_barrier_passed() {
    let source: Vec<u32> = (100..100 + 256).collect();
    for device in all_modes() {
        let (out, x) = (device.uninitialized::<u32>(128), device.upload(&source));
        // Copies in flight when a thread returns are dropped, and do not reach the next launch.
        for plan in [RIGHT, NEVER_WAITED, RIGHT] {
            unsafe { copies::run(&device.0, Launch::linear(1, 64), out, x, plan) }.unwrap();
        }
        let own = (0..64).map(|t| source[4 * t + 1]);
        let others = (0..64).map(|t| source[4 * (t ^ 1)]);
        assert_eq!(device.download(out).unwrap(), own.chain(others).collect::<Vec<_>>());
    }
}

#[test]
fn touching_the_destination_of_a_copy_too_early_is_a_race() {
    let cases = [
        (NOT_WAITED, "own element", "read", "copy under way"),
        (NOT_COMMITTED, "own element", "read", "copy under way"),
        (READ_BY_OTHERS_AT_ISSUE, "issue", "copy under way", "read"),
        (ISSUED_TWICE, "issue again", "copy under way", "copy under way"),
        (OVERWRITTEN, "overwrite", "write", "copy under way"),
        (OVERWRITTEN_AFTER_A_BARRIER, "overwrite after a barrier", "write", "copy under way"),
    ];
    for (plan, marker, expected, expected_other) in cases {
        let device = checked();
        let (out, x) = (device.uninitialized::<u32>(128), device.zeros::<u32>(256));
        let found = fault(unsafe { copies::run(&device.0, Launch::linear(1, 64), out, x, plan) });
        assert_eq!(found.at, at!(marker), "{found}");
        let FaultKind::Race { this, other, .. } = found.kind else { panic!("{found}") };
        assert_eq!((this, other), (expected, expected_other), "plan {plan}");
    }
}

#[test]
fn a_barrier_must_pass_before_others_see_a_copy() {
    // Thread 0 is too early for thread 1's copy in one order, and too late in another: the order decides what it finds.
    for seed in 0..4 {
        let device = Device::new(cuda_std::emulator::Mode::Checked { seed });
        let (out, x) = (device.uninitialized::<u32>(128), device.zeros::<u32>(256));
        let found = fault(unsafe { copies::run(&device.0, Launch::linear(1, 64), out, x, NO_BARRIER) });
        assert_eq!(found.at, at!("other's element"));
        assert!(
            matches!(found.kind, FaultKind::Race { this: "read", .. } | FaultKind::Uninitialized { .. }),
            "{found}"
        );
    }
}

/// Three groups; `wait::<1>` leaves the newest under way.
#[kernel(threads = 1)]
unsafe fn three_groups(out: Disjoint<u32>, x: Global<u32>, group: u32) {
    let shared = shared_array!(groups: [u32; N]);
    for i in 0..3 {
        shared.copy_async(8 * i, x, 4 * i, true);
        shared.copy_async(8 * i + 4, x, 4 * i, false);
        cp_async::commit();
    }
    cp_async::wait::<1>();
    let at = 8 * group as usize;
    out.write(0, shared.read(at)); // group
    out.write(1, shared.read(at + 7));
    cp_async::wait::<0>();
    out.write(2, shared.read(16));
}

#[test]
fn wait_leaves_the_newest_groups_under_way() {
    for device in all_modes() {
        let (out, x) = (device.uninitialized::<u32>(3), device.upload(&(1..13).collect::<Vec<u32>>()));
        for group in 0..2 {
            unsafe { three_groups::run(&device.0, Launch::linear(1, 1), out, x, group) }.unwrap();
            assert_eq!(device.download(out).unwrap(), [1 + 4 * group, 0, 9]);
        }
    }
    let device = checked();
    let (out, x) = (device.uninitialized::<u32>(3), device.zeros::<u32>(12));
    let found = fault(unsafe { three_groups::run(&device.0, Launch::linear(1, 1), out, x, 2) });
    assert_eq!(found.at, at!("group"));
    assert!(matches!(found.kind, FaultKind::Race { index: 16, other: "copy under way", .. }), "{found}");
}

const HALF_OF_THE_LIMIT: usize = 24 * 1024 / 4;

#[kernel(threads = 32)]
unsafe fn uses_all_shared_memory(out: Disjoint<u32>, more: u32) {
    let a = shared_array!(first_half: [u32; HALF_OF_THE_LIMIT]);
    let b = shared_array!(second_half: [u32; HALF_OF_THE_LIMIT]);
    let t = thread::thread_idx_x() as usize;
    let mirrored = HALF_OF_THE_LIMIT - 1 - t;
    a.write(mirrored, 1);
    b.write(t, 2);
    if more == 1 {
        shared_array!(too_much: [f16; 1]); // one more
    }
    out.write(t, a.read(mirrored) + b.read(t));
}

#[test]
fn shared_memory_ends_at_48_kib() {
    for device in all_modes() {
        let out = device.zeros::<u32>(32);
        unsafe { uses_all_shared_memory::run(&device.0, ONE_WARP, out, 0) }.unwrap();
        assert_eq!(device.download(out).unwrap(), [3; 32]);
        let found = fault(unsafe { uses_all_shared_memory::run(&device.0, ONE_WARP, out, 1) });
        assert_eq!(found.kind, FaultKind::SharedMemory { bytes: 48 * 1024 + 16, limit: 48 * 1024 });
        assert_eq!(found.at, at!("one more"));
    }
}
