//! What the tests share: devices to run on, data, comparison, files.
//!
//! Every test runs in the checked emulator in two orders of threads. With `GAMMA_TEST_DEVICE=cuda` it runs on the GPU
//! instead, and fails where there is none; `GAMMA_PTX=sm_80` or `sm_90a` forces a PTX build.

#![allow(clippy::unwrap_used, reason = "a test that cannot get its device has failed")]

pub mod random_model;
pub mod write;

use std::env;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use cuda_std::Launcher;
use cuda_std::emulator::Mode;
use gpt_gamma::device::{Buffer, Cuda, CudaOptions, Device, Emulated, Plain, PtxBuild, SharedDevice};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// A device under test, with helpers that panic: a test has nothing better to do.
#[derive(Clone)]
pub struct TestDevice(pub SharedDevice);

/// Where kernel tests run. The GPU is one for the whole process: loading the kernels takes longer than most tests.
pub fn devices() -> Vec<TestDevice> {
    static GPU: OnceLock<SharedDevice> = OnceLock::new();
    if wants_gpu() {
        return vec![TestDevice(Arc::clone(GPU.get_or_init(|| gpu(None))))];
    }
    let emulated = |seed| TestDevice(Arc::new(Emulated::new(Mode::Checked { seed })));
    vec![emulated(0), emulated(0x5eed)]
}

/// A device of this test's own, for whole models: recording a graph wants a stream that nobody else uses. On the CPU the
/// fast emulator, since checked accesses cost about fifty times as much.
pub fn engine_device() -> SharedDevice {
    if wants_gpu() { gpu(None) } else { Arc::new(Emulated::new(Mode::Fast)) }
}

/// As [`engine_device`], as if it had only `limit` bytes.
pub fn limited_device(limit: u64) -> SharedDevice {
    if wants_gpu() { gpu(Some(limit)) } else { Arc::new(Emulated::with_limit(Mode::Fast, limit)) }
}

/// Whether tests run on the GPU.
pub fn wants_gpu() -> bool {
    match env::var("GAMMA_TEST_DEVICE") {
        Err(_) => false,
        Ok(device) if device == "cuda" => true,
        Ok(device) => panic!("GAMMA_TEST_DEVICE is {device}, expected cuda"),
    }
}

fn gpu(vram_limit: Option<u64>) -> SharedDevice {
    let ptx = env::var("GAMMA_PTX").ok().map(|name| {
        PtxBuild::from_name(&name).unwrap_or_else(|| panic!("GAMMA_PTX is {name}, expected sm_80 or sm_90a"))
    });
    let options = CudaOptions { ptx, vram_limit, ..CudaOptions::default() };
    Arc::new(Cuda::new(options).expect("GAMMA_TEST_DEVICE=cuda needs a GPU"))
}

/// The bundled models: `GAMMA_MODELS`, or the repository's `models`.
pub fn models() -> PathBuf {
    env::var_os("GAMMA_MODELS")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models"), PathBuf::from)
}

impl TestDevice {
    /// For launching.
    pub fn launcher(&self) -> &dyn Launcher {
        let device: &dyn Device = &*self.0;
        device
    }

    /// A copy on the device.
    #[track_caller]
    pub fn upload<T: Plain>(&self, elements: &[T]) -> Buffer<T> {
        Buffer::from_slice(&self.0, elements).unwrap()
    }

    /// Room for a kernel to write whole: what it forgets is NaN, or never written, which the emulator reports.
    #[track_caller]
    pub fn poisoned<T: Plain>(&self, len: usize) -> Buffer<T> {
        let buffer = Buffer::new(&self.0, len).unwrap();
        if self.is_gpu() {
            buffer.fill_bytes(0xff).unwrap();
        }
        buffer
    }

    /// An absent optional parameter.
    #[track_caller]
    pub fn none<T: Plain>(&self) -> Buffer<T> {
        Buffer::new(&self.0, 0).unwrap()
    }

    /// Whether it runs kernels for warpgroups.
    pub fn has_warpgroups(&self) -> bool {
        self.0.has_warpgroups()
    }

    /// Whether it is a GPU and not the emulator.
    pub fn is_gpu(&self) -> bool {
        !self.0.name().contains("emulator")
    }
}

/// `n` values uniform in `low..high`, drawn from `seed`.
pub fn uniform(seed: u64, n: usize, low: f32, high: f32) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(low..high)).collect()
}

/// `n` values of the standard normal distribution (Box and Muller), drawn from `seed`.
pub fn normal(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut draw = || {
        let (u, v): (f64, f64) = (rng.random_range(f64::MIN_POSITIVE..1.0), rng.random_range(0.0..1.0));
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    };
    (0..n).map(|_| draw()).collect()
}

/// `n` random bytes drawn from `seed`.
pub fn bytes(seed: u64, n: usize) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..n).map(|_| rng.random()).collect()
}

/// ‖found − expected‖ / ‖expected‖, NaN or infinity if `found` holds one. 0 / 0 is 0.
pub fn relative_error(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len(), "lengths");
    let difference: f64 = found.iter().zip(expected).map(|(&f, &e)| (f64::from(f) - e).powi(2)).sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() }
}

/// Asserts that the norm-wise relative error is within `tolerance` and each element within
/// `tolerance · (|expected| + 8 · rms(expected))`; the second finds a single wrong element in a long vector.
#[track_caller]
pub fn assert_close(found: &[f32], expected: &[f64], tolerance: f64) {
    let error = relative_error(found, expected);
    assert!(error <= tolerance, "relative error {error:.3e}, tolerance {tolerance:.3e}");
    let rms = (expected.iter().map(|e| e * e).sum::<f64>() / expected.len().max(1) as f64).sqrt();
    for (i, (&f, &e)) in found.iter().zip(expected).enumerate() {
        let bound = tolerance * (e.abs() + 8.0 * rms);
        assert!((f64::from(f) - e).abs() <= bound, "element {i}: found {f}, expected {e}, bound {bound:.3e}");
    }
}
