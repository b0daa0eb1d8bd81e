//! Whole models: the bundled ones, and the file that `GAMMA_BENCH_MODEL` names.

#![allow(missing_docs, reason = "a program")]

fn main() {
    gamma_benches::run(|suite| {
        for model in gamma_benches::models() {
            // A window of GPT-2's, and one that a long conversation has.
            for n_past in [0, 512, 4096] {
                suite.decode(&model, n_past);
            }
            for n_prompt in [128, 512, 2048] {
                suite.prefill(&model, n_prompt);
            }
        }
    });
}
