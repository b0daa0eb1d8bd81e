//! Device and engine for the commands that compute, with the progress they show.

use std::io::{IsTerminal, Write, stderr};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

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

/// Opens the device that `args` ask for, and tells what it is. Says so if that is the emulator for want of a GPU.
pub fn machine(args: &DeviceArgs) -> Result<Machine, Error> {
    Ok(Opening::start(args).machine(args)?.0)
}

/// A device that is opened on another thread: a GPU takes about as long as a tokenizer of 200,000 tokens.
pub struct Opening(Mutex<Option<JoinHandle<Opened>>>);

type Opened = (Result<Machine, DeviceError>, Duration);

impl Opening {
    /// Begins to open what `args` ask for.
    pub fn start(args: &DeviceArgs) -> Self {
        let (is_cpu, limit, options) = (args.device == DeviceChoice::Cpu, args.vram_limit, cuda_options(args));
        let open = move || -> Result<Machine, DeviceError> {
            if is_cpu {
                return Ok(Machine { device: emulator(limit), gpu: None });
            }
            let gpu = Arc::new(Cuda::new(options)?);
            Ok(Machine { device: Arc::<Cuda>::clone(&gpu), gpu: Some(gpu) })
        };
        let thread = thread::spawn(move || {
            let start = Instant::now();
            (open(), start.elapsed())
        });
        Self(Mutex::new(Some(thread)))
    }

    /// The device, once it is open, and how long that took; can be had once. Says so if it is the emulator for want of a GPU.
    fn machine(&self, args: &DeviceArgs) -> Result<(Machine, Duration), Error> {
        let (opened, seconds) = self.join().expect("a model is loaded once");
        match opened {
            Ok(machine) => Ok((machine, seconds)),
            Err(DeviceError::NoDevice { reason }) if is_open(args) => {
                let device = emulated(args);
                note(&escape(&format!("no CUDA device ({reason}): running the kernels in the {}", device.name())));
                Ok((Machine { device, gpu: None }, seconds))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn join(&self) -> Option<Opened> {
        let thread = self.0.lock().expect("no panic under this lock").take()?;
        Some(thread.join().expect("opening a device does not panic"))
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        // The process may be about to end, and the driver does not like to start while it does.
        drop(self.join());
    }
}

/// Opens the GPU that `args` name.
pub fn cuda(args: &DeviceArgs) -> Result<SharedDevice, DeviceError> {
    Ok(Arc::new(Cuda::new(cuda_options(args))?))
}

fn cuda_options(args: &DeviceArgs) -> CudaOptions {
    let (ordinal, ptx, vram_limit) = (args.gpu.unwrap_or(0), args.ptx, args.vram_limit);
    CudaOptions { ordinal, ptx, vram_limit, ..CudaOptions::default() }
}

/// The emulator, as if with the memory that `args` state.
pub fn emulated(args: &DeviceArgs) -> SharedDevice {
    emulator(args.vram_limit)
}

fn emulator(limit: Option<u64>) -> SharedDevice {
    Arc::new(Emulated::with_limit(Mode::Fast, limit.unwrap_or(u64::MAX)).for_use())
}

/// Whether the user leaves it to us where to run: nobody who names a GPU wants the emulator.
pub fn is_open(args: &DeviceArgs) -> bool {
    args.device == DeviceChoice::Auto && args.gpu.is_none() && args.ptx.is_none()
}

/// Whether to print plan and timings.
pub fn talks(stats: bool) -> bool {
    stats || stderr().is_terminal()
}

/// Shows the memory plan if `stats`, then loads the weights of `model`, and shows where the time went.
pub fn load(model: &Model, args: &DeviceArgs, stats: bool) -> Result<Engine, Error> {
    let (Machine { device, .. }, device_time) = model.device.machine(args)?;
    if stats {
        let budget = plan::Budget::of(&*device, args)?;
        let _ = write!(stderr(), "{}", plan::table(&model.plan, model.options.n_ctx, Some(&budget)));
    }
    let start = Instant::now();
    let engine = load_weights(SharedDevice::clone(&device), &model.file, model.spec(), &model.options)?;
    if stats {
        let seconds = |time: Duration| format!("{:.2} s", time.as_secs_f64());
        let (opened, loaded) = (&model.times, engine.load_times());
        let mut err = stderr();
        let (file, tokenizer) = (seconds(opened.file), seconds(opened.tokenizer));
        let _ =
            writeln!(err, "opened     file {file}, tokenizer {tokenizer}, beside it device {}", seconds(device_time));
        let (weights, kernels) = (seconds(loaded.weights), seconds(loaded.kernels));
        let _ =
            writeln!(err, "loaded in {}: weights {weights}, beside them kernels {kernels}", seconds(start.elapsed()));
        let (planned, since) = (model.plan.total(), device.memory()?.since);
        let _ = writeln!(err, "taken      {planned} bytes as planned, {since} as the device reports");
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
