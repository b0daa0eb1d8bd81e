//! Caches of layers that see a window of keys only: rings, in which new positions take the slots of old ones.
//!
//! Position i is in slot `i mod n_slots`. The kernels put the keys of a chunk there before they attend, so a ring has room
//! for a window and a chunk: then no query of the chunk sees a key that another of its tokens replaced.

/// Slots are a multiple of this, so that the caches of all heads start at whole cache lines.
const SLOTS_ALIGNED: usize = 64;

/// Slots of a layer's cache, for `n_ctx` positions in chunks of up to `n_batch` tokens: all of them where there is no window,
/// or where the ring would not be smaller.
pub fn n_slots(window: Option<usize>, n_ctx: usize, n_batch: usize) -> usize {
    let Some(window) = window else { return n_ctx };
    window.saturating_add(n_batch).min(n_ctx).next_multiple_of(SLOTS_ALIGNED).min(n_ctx)
}

/// Whether a sequence can go back to its first `to` tokens, as far as a layer's cache is concerned: whether the cached keys
/// that the next token sees, which are the `window − 1` last of them, are still there. `n_written` is the greatest length the
/// sequence ever had, before an earlier step back too.
pub fn can_rewind(n_written: usize, to: usize, window: Option<usize>, n_slots: usize) -> bool {
    let first_seen = window.map_or(0, |window| (to + 1).saturating_sub(window));
    let first_kept = n_written.saturating_sub(n_slots);
    to <= n_written && (first_seen == to || first_seen >= first_kept)
}

/// The fewest tokens from which on [`can_rewind`] says yes to every number up to `n_written`; going back to none is always
/// possible.
pub fn oldest_rewind(n_written: usize, window: Option<usize>, n_slots: usize) -> usize {
    match n_written.saturating_sub(n_slots) {
        0 => 0,
        // The next token sees `window − 1` cached keys, or none.
        first_kept => n_written.min(first_kept + window.unwrap_or(n_written).saturating_sub(1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_hold_a_window_and_a_chunk_and_never_more_than_the_context() {
        assert_eq!(n_slots(None, 131_072, 512), 131_072);
        assert_eq!(n_slots(Some(128), 131_072, 2048), 2176);
        assert_eq!(n_slots(Some(128), 131_072, 1), 192);
        assert_eq!(n_slots(Some(128), 500, 2048), 500);
        assert_eq!(n_slots(Some(usize::MAX), 500, 2), 500);
    }

    /// Writes positions into a ring as the kernels do, and looks whether the right ones are there.
    #[test]
    fn going_back_is_possible_while_the_ring_still_holds_what_is_seen() {
        for (window, n_slots) in [(1, 1), (1, 4), (3, 3), (3, 8), (8, 8), (8, 11)] {
            for n_written in 0..30usize {
                let mut ring = vec![None; n_slots];
                (0..n_written).for_each(|position| ring[position % n_slots] = Some(position));
                for to in 0..=n_written + 1 {
                    let seen = (to + 1usize).saturating_sub(window)..to;
                    let is_there = to <= n_written && seen.clone().all(|i| ring[i % n_slots] == Some(i));
                    let found = can_rewind(n_written, to, Some(window), n_slots);
                    assert_eq!(found, is_there, "window {window}, {n_slots} slots, from {n_written} to {to}");
                }
            }
        }
    }

    #[test]
    fn from_the_oldest_on_every_number_can_be_kept_and_the_one_before_cannot() {
        for (window, n_slots) in [(2, 2), (3, 3), (3, 8), (8, 8), (8, 11)] {
            for n_written in 1..40 {
                let oldest = oldest_rewind(n_written, Some(window), n_slots);
                assert!((oldest..=n_written).all(|to| can_rewind(n_written, to, Some(window), n_slots)));
                assert!(
                    oldest == 0 || !can_rewind(n_written, oldest - 1, Some(window), n_slots),
                    "{n_written} {oldest}"
                );
            }
        }
        assert_eq!(oldest_rewind(70, None, 100), 0);
    }

    #[test]
    fn a_cache_of_all_positions_goes_back_anywhere() {
        assert!((0..=100).all(|to| can_rewind(100, to, None, 100)));
        assert!(!can_rewind(100, 101, None, 100));
    }

    #[test]
    fn a_step_back_does_not_bring_back_what_it_had_replaced() {
        // 100 positions in 16 slots leave 84..100; after going back to 95 the same are there, not 79..95.
        assert!(can_rewind(100, 91, Some(8), 16));
        assert!(!can_rewind(100, 90, Some(8), 16));
    }
}
