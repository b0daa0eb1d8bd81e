//! Device and engine for the commands that compute, with the progress they show.

use std::io::{IsTerminal, Write, stderr};
use std::sync::Arc;
use std::time::Instant;

use cuda_std::emulator::Mode;
use gpt_gamma::adapter::ModelSpec;
use gpt_gamma::device::{Cuda, CudaOptions, Emulated, Error as DeviceError, SharedDevice};
use gpt_gamma::engine::{Engine, Options};
use gpt_gamma::model_file::ModelFile;
use indicatif::{ProgressBar, ProgressStyle};

use super::args::{DeviceArgs, DeviceChoice};
use super::error::{Error, escape};
use super::model::{self, Model};
use super::{note, plan};

/// Where models run.
pub struct Machine {
    pub device: SharedDevice,
    /// The same as a GPU; `None` if it is the emulator.
    pub gpu: Option<Arc<Cuda>>,
}

/// Opens the device that `args` ask for. Says so if that is the emulator for want of a GPU.
pub fn device(args: &DeviceArgs) -> Result<SharedDevice, Error> {
    Ok(machine(args)?.device)
}

/// As [`device`], and tells what it is.
pub fn machine(args: &DeviceArgs) -> Result<Machine, Error> {
    if args.device == DeviceChoice::Cpu {
        return Ok(Machine { device: emulated(args), gpu: None });
    }
    match open_gpu(args) {
        Ok(gpu) => Ok(Machine { device: Arc::<Cuda>::clone(&gpu), gpu: Some(gpu) }),
        Err(DeviceError::NoDevice { reason }) if is_open(args) => {
            let device = emulated(args);
            note(&escape(&format!("no CUDA device ({reason}): running the kernels in the {}", device.name())));
            Ok(Machine { device, gpu: None })
        }
        Err(error) => Err(error.into()),
    }
}

/// Opens the GPU that `args` name.
pub fn cuda(args: &DeviceArgs) -> Result<SharedDevice, DeviceError> {
    Ok(open_gpu(args)?)
}

fn open_gpu(args: &DeviceArgs) -> Result<Arc<Cuda>, DeviceError> {
    let (ordinal, ptx, vram_limit) = (args.gpu.unwrap_or(0), args.ptx, args.vram_limit);
    Ok(Arc::new(Cuda::new(CudaOptions { ordinal, ptx, vram_limit, ..CudaOptions::default() })?))
}

/// The emulator, as if with the memory that `args` state.
pub fn emulated(args: &DeviceArgs) -> SharedDevice {
    Arc::new(Emulated::with_limit(Mode::Fast, args.vram_limit.unwrap_or(u64::MAX)))
}

/// Whether the user leaves it to us where to run: nobody who names a GPU wants the emulator.
pub fn is_open(args: &DeviceArgs) -> bool {
    args.device == DeviceChoice::Auto && args.gpu.is_none() && args.ptx.is_none()
}

/// Whether to print plan and timings.
pub fn talks(stats: bool) -> bool {
    stats || stderr().is_terminal()
}

/// Shows the memory plan if `stats`, then loads the weights of `model`.
pub fn load(model: &Model, args: &DeviceArgs, stats: bool) -> Result<Engine, Error> {
    let device = device(args)?;
    if stats {
        let budget = plan::Budget::of(&*device, args)?;
        let _ = write!(stderr(), "{}", plan::table(&model.plan, model.options.n_ctx, Some(&budget)));
    }
    let start = Instant::now();
    let engine = load_weights(device, &model.file, model.spec(), &model.options)?;
    if stats {
        let _ = writeln!(stderr(), "loaded in {:.2} s", start.elapsed().as_secs_f64());
    }
    Ok(engine)
}

/// Loads the weights of a model that needs no tokenizer.
pub fn load_weights(
    device: SharedDevice,
    file: &ModelFile,
    spec: &ModelSpec,
    options: &Options,
) -> Result<Engine, Error> {
    let bar = bar("loading", "{bytes}/{total_bytes}");
    let mut progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let engine = Engine::load(device, file, spec, options.clone(), &mut progress);
    let engine = engine.map_err(|error| model::engine_error(file, error))?;
    bar.finish_and_clear();
    Ok(engine)
}

/// Lets `engine` read the prompt; returns the seconds that took.
pub fn prefill(engine: &mut Engine, model: &Model, tokens: &[u32]) -> Result<f64, Error> {
    let bar = bar("prompt", "{pos}/{len} tokens");
    bar.set_length(tokens.len() as u64);
    let start = Instant::now();
    let result = engine.prefill(tokens, &mut |done| bar.set_position(done as u64));
    result.map_err(|error| model.engine_error(error))?;
    let seconds = start.elapsed().as_secs_f64();
    bar.finish_and_clear();
    Ok(seconds)
}

/// A progress bar on standard error; hidden where that is no terminal.
pub fn bar(what: &'static str, count: &str) -> ProgressBar {
    let template = format!("{{msg}} [{{bar:40}}] {count}");
    let style = ProgressStyle::with_template(&template).expect("the template is sound");
    ProgressBar::no_length().with_style(style.progress_chars("=> ")).with_message(what)
}

/// `n` per second, or none if there was nothing to measure.
pub fn rate(n: usize, seconds: f64) -> Option<f64> {
    (n > 0 && seconds > 0.0).then(|| n as f64 / seconds)
}
