//! One query against a range of keys in f32 arithmetic: what decoding with few query heads per KV head, and every kernel of
//! the f32 cache, is made of.

use cuda_std::{Float, Global, shared_array, thread, warp};

use super::{CacheElement, NO_SCORE, Slots};

/// Threads of a block.
pub(super) const THREADS: u32 = 128;

/// Keys a group of lanes has under way: 2 · 16 bytes each (f16) for key and value, 16 KB a block.
const STEPS: usize = 4;
const SLOTS: usize = THREADS as usize;
/// Groups times columns, for every width.
const PARTIAL: usize = 8 * SLOTS;

/// Column `thread` of an attention over some keys: `o / l` is the output, `m` the largest score. Nothing past the last column.
#[derive(Clone, Copy)]
pub(super) struct Column {
    /// In units of log2 e.
    pub m: f32,
    pub l: f32,
    pub o: f32,
}

/// This thread's 8 columns of a query in `attend`: those from here on. Lanes past the head's last column repeat it.
#[inline(always)]
pub(super) fn column_of<const LANES: u32>(d_head: u32) -> u32 {
    (8 * (thread::thread_idx_x() % LANES)).min(d_head - 8)
}

/// Keys `begin..end` of `slots` in one KV head against one query, by a block of [`THREADS`]. `q` is the query's columns from
/// [`column_of`] on, times `scale · log2 e`. Groups of `LANES` lanes take a key each, a
/// lane 8 of its elements; every group has its own online softmax, and the block merges them at the end, in fixed order.
///
/// # Safety
///
/// The whole block is here, and at no second call. The slots of positions `begin..end` after the first are in `k` and `v`;
/// `d_head` is a multiple of 8, at most `8 · LANES`; `LANES` is 4, 8 or 16.
#[inline(always)]
pub(super) unsafe fn attend<E: CacheElement, const LANES: u32>(
    q: [f32; 8],
    k: Global<E>,
    v: Global<E>,
    slots: Slots,
    begin: u32,
    end: u32,
    d_head: u32,
) -> Column {
    let t = thread::thread_idx_x();
    let (warp_idx, lane) = (t / 32, t % LANES);
    let groups_per_warp = 32 / LANES;
    let keys_per_warp = STEPS as u32 * groups_per_warp;

    // Lanes past the head's last column read it again, against a zero query.
    let column = column_of::<LANES>(d_head);
    let q = if 8 * lane < d_head { q } else { [0.0; 8] };

    // A key past the end is read as the last one and then masked: no branch comes between the loads.
    let load = |source: Global<E>, at: u32| {
        core::array::from_fn::<_, STEPS, _>(|step| {
            let key = (at + step as u32 * groups_per_warp + t % 32 / LANES).min(end - 1);
            // SAFETY: `key < end`, whose row is there; `column + 8 <= d_head`, multiples of 8 elements.
            unsafe { E::load_eight(source, (slots.of(key) * d_head + column) as usize) }
        })
    };

    let (mut m, mut l, mut o) = (NO_SCORE, 0.0, [0.0f32; 8]);
    let mut at = begin + warp_idx * keys_per_warp;
    let (mut keys, mut values) = Default::default();
    if at < end {
        (keys, values) = (load(k, at), load(v, at));
    }
    while at < end {
        // A whole warp is here: `at` is the same for its lanes.
        let scores: [f32; STEPS] = core::array::from_fn(|step| {
            let key = E::widen(keys[step]);
            let mut sum = 0.0;
            let mut c = 0;
            while c < 8 {
                sum += q[c] * key[c];
                c += 1;
            }
            // SAFETY: all 32 lanes are here.
            let score = unsafe { warp::sum_of::<LANES>(sum) };
            if at + step as u32 * groups_per_warp + t % 32 / LANES < end { score } else { f32::NEG_INFINITY }
        });
        let next = at + THREADS / 32 * keys_per_warp;
        keys = load(k, next);

        let m_before = m;
        let mut step = 0;
        while step < STEPS {
            m = m.max(scores[step]);
            step += 1;
        }
        let correction = Float::exp2(m_before - m);
        l *= correction;
        let mut c = 0;
        while c < 8 {
            o[c] *= correction;
            c += 1;
        }
        let mut step = 0;
        while step < STEPS {
            let p = Float::exp2(scores[step] - m);
            let value = E::widen(values[step]);
            l += p;
            let mut c = 0;
            while c < 8 {
                o[c] += p * value[c];
                c += 1;
            }
            step += 1;
        }
        values = load(v, next);
        at = next;
    }

    // SAFETY: as this function's.
    unsafe { merge::<LANES>(m, l, o) }
}

/// The block's groups as one softmax.
///
/// # Safety
///
/// As [`attend`].
#[inline(always)]
unsafe fn merge<const LANES: u32>(m: f32, l: f32, o: [f32; 8]) -> Column {
    let t = thread::thread_idx_x();
    let all_m = shared_array!(single_query_m: [f32; SLOTS]);
    let all_l = shared_array!(single_query_l: [f32; SLOTS]);
    let all_o = shared_array!(single_query_o: [f32; PARTIAL]);
    let bits = o.map(f32::to_bits);
    // SAFETY: each thread writes its own elements, and all threads reach the barrier; `8 · THREADS = PARTIAL`.
    unsafe {
        all_m.write(t as usize, m);
        all_l.write(t as usize, l);
        all_o.store16(8 * t as usize, [bits[0], bits[1], bits[2], bits[3]]);
        all_o.store16(8 * t as usize + 4, [bits[4], bits[5], bits[6], bits[7]]);
        thread::sync_threads();
    }

    let mut whole = Column { m: NO_SCORE, l: 0.0, o: 0.0 };
    if t >= 8 * LANES {
        return whole; // Past the last column, and past the last barrier.
    }
    // Group g is threads `g · LANES..`, and its column c lies at `8 · LANES · g + c`.
    let groups = THREADS / LANES;
    let mut group = 0;
    while group < groups {
        // SAFETY: written before the barrier.
        whole.m = whole.m.max(unsafe { all_m.read((group * LANES) as usize) });
        group += 1;
    }
    let mut group = 0;
    while group < groups {
        // SAFETY: as above.
        unsafe {
            let weight = Float::exp2(all_m.read((group * LANES) as usize) - whole.m);
            whole.l += weight * all_l.read((group * LANES) as usize);
            whole.o += weight * all_o.read((8 * LANES * group + t) as usize);
        }
        group += 1;
    }
    whole
}
