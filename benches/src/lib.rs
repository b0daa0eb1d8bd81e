//! Criterion benches, one target per kernel family.
