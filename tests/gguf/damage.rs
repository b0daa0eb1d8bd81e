//! Breaks files at random, preferring what parsers stumble over.

use proptest::prelude::*;

/// Numbers that lengths, counts, offsets and types go wrong at.
pub const HOSTILE: [u64; 24] = [
    0,
    1,
    4,
    5,
    9,
    13,
    39,
    63,
    64,
    255,
    0xFFFF,
    0x1_0000,
    1 << 30,
    (1 << 30) + 1,
    1 << 31,
    u32::MAX as u64,
    1 << 32,
    1 << 40,
    (1 << 60) + 1,
    1 << 61,
    (1 << 63) - 1,
    1 << 63,
    u64::MAX - 31,
    u64::MAX,
];

/// One thing that goes wrong with a file. Positions are taken modulo its length.
#[derive(Debug, Clone)]
pub enum Damage {
    Flip { at: u32, bit: u8 },
    Truncate { at: u32 },
    Splice { from: u32, to: u32, n: u32 },
    Number { at: u32, value: u64, n_bytes: usize },
}

pub fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        3 => (any::<u32>(), 0..8_u8).prop_map(|(at, bit)| Damage::Flip { at, bit }),
        1 => any::<u32>().prop_map(|at| Damage::Truncate { at }),
        1 => (any::<u32>(), any::<u32>(), 0..24_u32).prop_map(|(from, to, n)| Damage::Splice { from, to, n }),
        4 => (any::<u32>(), 0..HOSTILE.len(), prop_oneof![Just(4), Just(8)])
            .prop_map(|(at, i, n_bytes)| Damage::Number { at, value: HOSTILE[i], n_bytes }),
    ]
}

pub fn apply(damage: &Damage, bytes: &mut Vec<u8>) {
    let n = bytes.len();
    if n == 0 {
        return;
    }
    match *damage {
        Damage::Flip { at, bit } => bytes[at as usize % n] ^= 1 << bit,
        Damage::Truncate { at } => bytes.truncate(at as usize % n),
        Damage::Splice { from, to, n: len } => {
            let from = from as usize % n;
            let piece = bytes[from..n.min(from + len as usize)].to_vec();
            let to = to as usize % n;
            bytes.splice(to..to, piece);
        }
        Damage::Number { at, value, n_bytes } => {
            let at = at as usize % n;
            let end = n.min(at + n_bytes);
            bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
        }
    }
}
