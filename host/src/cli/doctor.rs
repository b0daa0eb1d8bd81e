//! `gamma doctor`: what is there to run on, and whether it computes right.

use std::sync::Arc;

use cuda_loader::Unavailable;
use cuda_loader::cust::device::{Device as CudaDevice, DeviceAttribute};
use cuda_std::emulator::Mode;
use gpt_gamma::device::{Buffer, Cuda, CudaOptions, Device, Emulated, Error as DeviceError, PtxBuild, SharedDevice};
use indicatif::BinaryBytes;
use kernels::layer_norm;
use serde::Serialize;

use super::Out;
use super::args::Doctor;
use super::error::{Error, escape, one_line};

/// Runs the command.
pub fn run(args: &Doctor) -> Result<(), Error> {
    let report = Report::make();
    let mut out = Out::new();
    if args.json {
        out.json(&report)?
    } else {
        report.print(&mut out)?
    }
    out.flush()?;
    match report.emulator.error {
        // A device is worth nothing either if the same kernel is wrong on the host: then the build is broken.
        Some(reason) => Err(Error::Doctor { reason: format!("the emulator's check failed: {reason}") }),
        None => Ok(()),
    }
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    /// The CUDA version that the driver implements.
    driver: Option<String>,
    /// Why the driver cannot be used, and what to do.
    driver_error: Option<String>,
    advice: Option<&'static str>,
    devices: Vec<Gpu>,
    ptx: Vec<Ptx>,
    emulator: Check,
    /// The devices on which all checks passed.
    usable: Vec<u32>,
}

/// One device of the driver.
#[derive(Serialize)]
struct Gpu {
    number: u32,
    name: String,
    compute_capability: String,
    memory_bytes: u64,
    /// What it would run without `--ptx`; none if it is too old.
    ptx: Option<&'static str>,
    checks: Vec<Check>,
}

/// A build of the kernels.
#[derive(Serialize)]
struct Ptx {
    name: &'static str,
    /// The PTX ISA version it is written in.
    version: String,
    /// The oldest driver that compiles it and that this program can use, by its CUDA version.
    least_cuda: Option<String>,
}

/// One kernel on one machine.
#[derive(Serialize)]
struct Check {
    machine: String,
    /// Largest error of the kernel, relative to the largest value.
    largest_error: Option<f64>,
    error: Option<String>,
}

impl Report {
    fn make() -> Self {
        let mut report = Self {
            version: env!("CARGO_PKG_VERSION"),
            driver: None,
            driver_error: None,
            advice: None,
            devices: Vec::new(),
            ptx: [PtxBuild::Sm80, PtxBuild::Sm90a].map(Ptx::of).into(),
            emulator: Check::of("emulator".to_owned(), || Ok(Arc::new(Emulated::new(Mode::Checked { seed: 0 })))),
            usable: Vec::new(),
        };
        match cuda_loader::availability() {
            Ok(driver) => {
                report.driver = Some(version(driver.version));
                for number in 0..driver.devices {
                    match Gpu::examine(number) {
                        Ok(gpu) => report.devices.push(gpu),
                        Err(error) => report.driver_error = Some(format!("device {number}: {}", one_line(&error))),
                    }
                }
                let works = |gpu: &&Gpu| !gpu.checks.is_empty() && gpu.checks.iter().all(|check| check.error.is_none());
                report.usable = report.devices.iter().filter(works).map(|gpu| gpu.number).collect();
                if report.usable.is_empty() {
                    report.advice = Some("update the driver, or use a card of compute capability 8.0 or later");
                }
            }
            Err(error) => {
                report.driver = cuda_loader::driver_version().ok().map(version);
                report.advice = Some(advice(&error));
                report.driver_error = Some(one_line(&error));
            }
        }
        report
    }

    fn print(&self, out: &mut Out) -> Result<(), Error> {
        out.line(&format!("gamma     {}", self.version))?;
        if let Some(version) = &self.driver {
            out.line(&format!("driver    implements CUDA {version}"))?;
        }
        if let Some(error) = &self.driver_error {
            out.line(&format!("driver    {error}"))?;
        }
        for gpu in &self.devices {
            let (name, memory) = (escape(&gpu.name), BinaryBytes(gpu.memory_bytes));
            let build =
                gpu.ptx.map_or("too old for the kernels: 8.0 is needed".to_owned(), |ptx| format!("runs {ptx}"));
            let capability = &gpu.compute_capability;
            out.line(&format!("device {}  {name}, compute capability {capability}, {memory}, {build}", gpu.number))?;
            for check in &gpu.checks {
                out.line(&format!("          {}: {}", check.machine, check.line()))?;
            }
        }
        for ptx in &self.ptx {
            let least = ptx.least_cuda.as_deref().unwrap_or("an unknown version");
            out.line(&format!("kernels   {}: PTX {}, needs a driver of CUDA {least} or later", ptx.name, ptx.version))?;
        }
        out.line(&format!("emulator  {}", self.emulator.line()))?;
        let numbers: Vec<String> = self.usable.iter().map(u32::to_string).collect();
        match (numbers.is_empty(), self.emulator.error.is_none()) {
            (false, _) => out.line(&format!("verdict   models run on device {}", numbers.join(", ")))?,
            (true, true) => out.line("verdict   models run in the emulator: right, but slow")?,
            (true, false) => out.line("verdict   models do not run here")?,
        }
        match self.advice {
            Some(advice) => out.line(&format!("to use a GPU: {advice}")),
            None => Ok(()),
        }
    }
}

fn version((major, minor): (u32, u32)) -> String {
    format!("{major}.{minor}")
}

fn advice(reason: &Unavailable) -> &'static str {
    match reason {
        Unavailable::NoLibrary { .. } => {
            "install NVIDIA's driver; in a container, start it with access to the GPU (docker run --gpus all)"
        }
        Unavailable::TooOld { .. } => "update NVIDIA's driver",
        Unavailable::NoDevice { .. } => {
            "see that nvidia-smi lists a card and that CUDA_VISIBLE_DEVICES does not hide it"
        }
        Unavailable::Start(_) => "see what nvidia-smi says; after an update of the driver, restart the machine",
    }
}

impl Gpu {
    fn examine(number: u32) -> Result<Self, cuda_loader::Error> {
        let device = CudaDevice::get_device(number)?;
        let major = device.get_attribute(DeviceAttribute::ComputeCapabilityMajor)?;
        let minor = device.get_attribute(DeviceAttribute::ComputeCapabilityMinor)?;
        let builds: &[PtxBuild] = match (major, minor) {
            (9, 0) => &[PtxBuild::Sm90a, PtxBuild::Sm80],
            (8.., _) => &[PtxBuild::Sm80],
            _ => &[],
        };
        let check = |&build: &PtxBuild| {
            let options = CudaOptions { ordinal: number, ptx: Some(build), ..CudaOptions::default() };
            Check::of(build.name().to_owned(), || Ok(Arc::new(Cuda::new(options)?)))
        };
        Ok(Self {
            number,
            name: device.name()?,
            compute_capability: format!("{major}.{minor}"),
            memory_bytes: device.total_memory()? as u64,
            ptx: builds.first().map(|build| build.name()),
            checks: builds.iter().map(check).collect(),
        })
    }
}

impl Ptx {
    fn of(build: PtxBuild) -> Self {
        let directive = build.text().lines().find_map(|line| line.trim().strip_prefix(".version "));
        let directive = directive.unwrap_or("unknown").trim().to_owned();
        let least_cuda = cuda_of(&directive).map(|cuda| version(cuda.max(cuda_loader::OLDEST_DRIVER)));
        Self { name: build.name(), version: directive, least_cuda }
    }
}

/// The CUDA release that brought a version of PTX: 7.n came with CUDA 11.n and 8.n with 12.n, up to 8.5
/// (PTX ISA, release notes).
fn cuda_of(ptx_version: &str) -> Option<(u32, u32)> {
    let (major, minor) = ptx_version.split_once('.')?;
    match (major, minor.parse().ok()?) {
        ("7", minor @ 0..=8) => Some((11, minor)),
        ("8", minor @ 0..=5) => Some((12, minor)),
        _ => None,
    }
}

impl Check {
    fn of(machine: String, open: impl FnOnce() -> Result<SharedDevice, DeviceError>) -> Self {
        match open().and_then(|device| layer_norm_error(&device)) {
            // Errors of a few roundings of values up to 2: wrong code is off by far more.
            Ok(found) if found <= 1e-5 => Self { machine, largest_error: Some(found), error: None },
            Ok(found) => {
                let error = format!("layer_norm is wrong by {found:.1e}, expected 1e-5 at most");
                Self { machine, largest_error: Some(found), error: Some(error) }
            }
            Err(error) => Self { machine, largest_error: None, error: Some(one_line(&error)) },
        }
    }

    fn line(&self) -> String {
        match (&self.error, self.largest_error) {
            (None, Some(found)) => format!("kernels load, layer_norm is right (error {found:.1e})"),
            (error, _) => format!("failed: {}", error.as_deref().unwrap_or("no result")),
        }
    }
}

/// The largest error of `layer_norm` on `device`, relative to the largest value. NaN counts as infinite.
fn layer_norm_error(device: &SharedDevice) -> Result<f64, DeviceError> {
    const N_TOKENS: usize = 9; // One more than a block takes.
    const D_MODEL: usize = 77; // No multiple of a warp.
    const EPSILON: f32 = 1e-5;
    let wave = |len: usize, step: f32| (0..len).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
    let (x, gamma, beta) = (wave(N_TOKENS * D_MODEL, 0.7), wave(D_MODEL, 0.3), wave(D_MODEL, 1.1));
    let found = run_layer_norm(device, &x, &gamma, &beta, EPSILON)?;

    let (mut largest, mut largest_error) = (0.0_f64, 0.0_f64);
    for (found, x) in found.chunks(D_MODEL).zip(x.chunks(D_MODEL)) {
        let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / D_MODEL as f64;
        let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / D_MODEL as f64;
        for (c, &found) in found.iter().enumerate() {
            let normal = (f64::from(x[c]) - mean) / (variance + f64::from(EPSILON)).sqrt();
            let expected = normal * f64::from(gamma[c]) + f64::from(beta[c]);
            let error = (f64::from(found) - expected).abs();
            largest_error = largest_error.max(if error.is_nan() { f64::INFINITY } else { error });
            largest = largest.max(expected.abs());
        }
    }
    Ok(largest_error / largest)
}

#[expect(unsafe_code, reason = "launches a kernel")]
fn run_layer_norm(
    device: &SharedDevice,
    x: &[f32],
    gamma: &[f32],
    beta: &[f32],
    epsilon: f32,
) -> Result<Vec<f32>, DeviceError> {
    let out = Buffer::<f32>::new(device, x.len())?;
    let launch = layer_norm::launch((x.len() / gamma.len()) as u32);
    let upload = |values| Buffer::from_slice(device, values);
    let (x, gamma, beta) = (upload(x)?, upload(gamma)?, upload(beta)?);
    let device: &dyn Device = &**device;
    // SAFETY: `x` is whole rows of `gamma.len()`, `out` as long, `beta` as long as `gamma`; all live until `to_vec` has
    // waited for the kernel.
    unsafe {
        layer_norm::layer_norm::run(device, launch, out.slice(), x.slice(), gamma.slice(), beta.slice(), epsilon)?;
    }
    out.to_vec()
}
