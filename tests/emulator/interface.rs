//! `#[kernel]`: the entry it records, the launcher it types, the launches it refuses.

use cuda_std::emulator::{Emulator, Mode};
use cuda_std::{Atomics, Disjoint, Global, Launch, LaunchError, Param, ParamKind, f16, kernel};

use crate::all_modes;

/// A name that the macro's own code might have used.
const THREADS: u32 = 96;

/// Every kind of parameter.
#[kernel(threads = THREADS, blocks_per_sm = 2 + 1)]
#[allow(clippy::too_many_arguments, reason = "one of each kind")]
unsafe fn every_kind(
    bytes: Global<u8>,
    shorts: Global<u16>,
    halves: Global<f16>,
    words: Global<u32>,
    integers: Disjoint<i32>,
    wide: Disjoint<u64>,
    floats: cuda_std::Disjoint<f32>,
    counts: Atomics<u32>,
    wide_counts: Atomics<u64>,
    a: u32,
    mut b: i32,
    c: u64,
    d: f32,
) {
    b += 1;
    let lengths = bytes.len() + 10 * shorts.len() + 100 * halves.len() + 1000 * words.len();
    integers.write(0, b);
    integers.write(1, lengths as i32);
    wide.write(0, c);
    wide.write(1, u64::from(bytes[0]) + u64::from(shorts[1]) + u64::from(words[3]));
    floats.write(0, d);
    floats.write(1, halves[2].to_f32());
    counts.fetch_add(0, a);
    wide_counts.fetch_add(0, c);
}

#[test]
fn the_entry_records_the_signature() {
    let entry = every_kind::ENTRY;
    assert_eq!((entry.name, entry.threads, entry.blocks_per_sm), ("every_kind", 96, 3));
    use ParamKind::*;
    let expected = [
        ("bytes", Global("u8")),
        ("shorts", Global("u16")),
        ("halves", Global("f16")),
        ("words", Global("u32")),
        ("integers", Disjoint("i32")),
        ("wide", Disjoint("u64")),
        ("floats", Disjoint("f32")),
        ("counts", Atomics("u32")),
        ("wide_counts", Atomics("u64")),
        ("a", Scalar("u32")),
        ("b", Scalar("i32")),
        ("c", Scalar("u64")),
        ("d", Scalar("f32")),
    ];
    assert_eq!(entry.params, expected.map(|(name, kind)| Param { name, kind }));
    assert_eq!(
        format!("{entry:?}"),
        "every_kind(bytes: Global<u8>, shorts: Global<u16>, halves: Global<f16>, words: Global<u32>, \
         integers: Disjoint<i32>, wide: Disjoint<u64>, floats: Disjoint<f32>, counts: Atomics<u32>, \
         wide_counts: Atomics<u64>, a: u32, b: i32, c: u64, d: f32)"
    );
}

#[test]
fn arguments_of_every_kind_arrive() {
    for device in all_modes() {
        let (bytes, shorts) = (device.upload(&[255u8]), device.upload(&[0u16, u16::MAX]));
        let halves = device.upload(&[0.0, 0.0, -1.5].map(f16::from_f32));
        let words = device.upload(&[0, 0, 0, u32::MAX]);
        let (integers, wide, floats) = (device.zeros(2), device.zeros(2), device.zeros(2));
        let (counts, wide_counts) = (device.upload(&[1u32]), device.upload(&[1u64]));
        let (a, b, c, d) = (u32::MAX - 1, i32::MIN, u64::MAX - 1, -0.0);
        unsafe {
            every_kind::run(
                &device.0,
                Launch::linear(1, 1),
                bytes,
                shorts,
                halves,
                words,
                integers,
                wide,
                floats,
                counts,
                wide_counts,
                a,
                b,
                c,
                d,
            )
        }
        .unwrap();
        assert_eq!(device.download(integers).unwrap(), [i32::MIN + 1, 4321]);
        assert_eq!(device.download(wide).unwrap(), [u64::MAX - 1, 255 + 65535 + u64::from(u32::MAX)]);
        assert_eq!(device.download(floats).unwrap().map_bits(), [(-0.0f32).to_bits(), (-1.5f32).to_bits()]);
        assert_eq!(device.download(counts).unwrap(), [u32::MAX]);
        assert_eq!(device.download(wide_counts).unwrap(), [u64::MAX]);
    }
}

trait MapBits {
    fn map_bits(self) -> Vec<u32>;
}
impl MapBits for Vec<f32> {
    fn map_bits(self) -> Vec<u32> {
        self.into_iter().map(f32::to_bits).collect()
    }
}

/// Compiled for no target, so its types need not exist.
#[cfg(target_os = "none")]
#[kernel(threads = 32)]
unsafe fn configured(x: Global<NoSuchType>) {}

/// The one that is compiled; `blocks_per_sm` has its default.
#[kernel(threads = 32)]
#[cfg(not(target_os = "none"))]
unsafe fn configured() {}

#[kernel(threads = 1024)]
unsafe fn widest() {}

macro_rules! scaled {
    ($name:ident, $type:ty) => {
        #[kernel(threads = 32)]
        unsafe fn $name(out: Disjoint<$type>, by: $type) {
            out.write(0, by);
        }
    };
}
scaled!(scaled_u32, u32);
scaled!(scaled_f32, f32);

#[test]
fn attributes_and_macros_apply_to_all_that_a_kernel_becomes() {
    assert_eq!((configured::ENTRY.params.len(), configured::ENTRY.blocks_per_sm), (0, 1));
    unsafe { configured::run(&Emulator::new(Mode::Fast), Launch::linear(1, 1)) }.unwrap();
    assert_eq!(scaled_u32::ENTRY.params[0].kind, ParamKind::Disjoint("u32"));
    assert_eq!(scaled_f32::ENTRY.params[1].kind, ParamKind::Scalar("f32"));
}

#[test]
fn a_launch_outside_the_bounds_is_refused() {
    let contract = |kernel, what, found, bound| Err(LaunchError::Contract { kernel, what, found, bound });
    for device in all_modes() {
        let run = |grid, block| unsafe { widest::run(&device.0, Launch { grid, block }) };
        for axis in 0..3 {
            let mut zero = [1; 3];
            zero[axis] = 0;
            let bounds = [[0x7fff_ffff, 0xffff, 0xffff], [1024, 1024, 64]].map(|bounds| bounds[axis]);
            let names = [["grid.x", "grid.y", "grid.z"], ["block.x", "block.y", "block.z"]].map(|names| names[axis]);
            assert_eq!(run(zero, [1; 3]), contract("widest", names[0], 0, bounds[0]));
            assert_eq!(run([1; 3], zero), contract("widest", names[1], 0, bounds[1]));
            let mut over = [1; 3];
            over[axis] = bounds[0] as u32 + 1;
            assert_eq!(run(over, [1; 3]), contract("widest", names[0], bounds[0] + 1, bounds[0]));
            over[axis] = bounds[1] as u32 + 1;
            assert_eq!(run([1; 3], over), contract("widest", names[1], bounds[1] + 1, bounds[1]));
        }
        assert_eq!(run([1; 3], [32, 33, 1]), contract("widest", "threads per block", 1056, 1024));
        // 1024 · 1024 · 64 and its like must not wrap.
        assert_eq!(run([1; 3], [1024, 1024, 64]), contract("widest", "threads per block", 1 << 26, 1024));
        run([2, 1, 2], [32, 32, 1]).unwrap();
        run([1; 3], [1024, 1, 1]).unwrap();
        let narrow = unsafe { configured::run(&device.0, Launch::linear(1, 33)) };
        assert_eq!(narrow, contract("configured", "threads per block", 33, 32));
    }
}
