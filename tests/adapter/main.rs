//! Directory to description: what a spec says about a model, and every reason to refuse one.

#[path = "../gguf/damage.rs"]
mod damage;
mod gpt2;
mod gpt_oss;
mod rope;
