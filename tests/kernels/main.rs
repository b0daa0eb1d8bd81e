//! Every kernel against its f64 reference, in the checked emulator and, where asked, on the GPU.

#![allow(clippy::unwrap_used, reason = "a test that cannot run its kernel has failed")]

mod argmax;
mod attention;
mod candidates;
mod embed;
mod experts;
mod experts_grouped;
mod experts_token;
mod gelu;
mod layer_norm;
mod matmul;
mod matmul_rows;
mod matvec;
mod matvec_stream;
mod norm_rows;
mod probe;
mod rms_norm;
mod rope;
mod router;
mod swiglu;
mod weights;
