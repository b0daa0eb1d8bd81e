//! Whole models against logits that HF transformers computed in f32 from the same dequantized weights.

mod engine;
mod reference;
