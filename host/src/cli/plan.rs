//! `gamma plan`: what a model needs in device memory, against what there is.

use std::fmt::Write;

use gpt_gamma::adapter::InferenceAdapter;
use gpt_gamma::device::{Device, Error as DeviceError};
use gpt_gamma::engine::MemoryPlan;
use indicatif::BinaryBytes;
use serde_json::json;

use super::args::{DeviceArgs, DeviceChoice, Plan};
use super::error::{Error, one_line};
use super::{Out, model, session};

/// What a plan has to fit.
pub struct Budget {
    /// Free bytes: of the device, or of `--vram-limit` if that is less.
    pub bytes: u64,
    /// The device, if there is one.
    pub device: Option<String>,
    /// What it reported as taken when it was opened.
    pub in_use: Option<u64>,
    /// Bytes of `--vram-limit`.
    pub limit: Option<u64>,
}

impl Budget {
    /// What `device` has left.
    pub fn of(device: &dyn Device, args: &DeviceArgs) -> Result<Self, Error> {
        let memory = device.memory()?;
        let (device, in_use) = (Some(device.name()), Some(memory.before));
        Ok(Self { bytes: memory.free, device, in_use, limit: args.vram_limit })
    }
}

/// Runs the command.
pub fn run(args: &Plan) -> Result<(), Error> {
    let file = model::open(&args.model)?;
    let adapter = model::describe(&file)?;
    let (spec, tensors) = (adapter.spec(), file.tensors());
    let (options, plan) = model::options(&args.engine, &file, spec)?;
    let (budget, missing) = budget(&args.device)?;

    let largest = |budget: &Budget| MemoryPlan::largest_context(spec, tensors, &options, budget.bytes);
    let fits = budget.as_ref().map(|budget| plan.total() <= budget.bytes);
    let largest_ctx = budget.as_ref().and_then(largest);

    let mut out = Out::new();
    if args.json {
        let weights: Vec<_> = plan.weights.iter().map(|(ty, n)| json!({"type": ty.name(), "bytes": n})).collect();
        out.json(&json!({
            "n_ctx": options.n_ctx,
            "weights": weights,
            "kv_cache_bytes": plan.kv_cache(),
            "kv_full_bytes": plan.kv_full,
            "kv_sliding_bytes": plan.kv_sliding,
            "workspace_bytes": plan.workspace,
            "total_bytes": plan.total(),
            "device": budget.as_ref().and_then(|budget| budget.device.as_deref()),
            "in_use_bytes": budget.as_ref().and_then(|budget| budget.in_use),
            "vram_limit_bytes": args.device.vram_limit,
            "budget_bytes": budget.as_ref().map(|budget| budget.bytes),
            "fits": fits,
            "largest_ctx": largest_ctx,
        }))?;
    } else {
        out.write(table(&plan, options.n_ctx, budget.as_ref()).as_bytes())?;
        if let Some(reason) = &missing {
            out.line(&format!("budget     unknown ({reason}); --vram-limit states one"))?;
        }
        if let Some(n) = largest_ctx {
            let all = if n == spec.n_ctx { ", all that the model was made for" } else { "" };
            out.line(&format!("largest    {n} tokens of context fit{all}"))?;
        }
    }
    out.flush()?;
    let Some(Budget { bytes, .. }) = budget else { return Ok(()) };
    plan.check(spec, tensors, &options, bytes).map_err(|error| model::engine_error(&file, error))
}

/// What there is, or why nobody knows.
fn budget(args: &DeviceArgs) -> Result<(Option<Budget>, Option<String>), Error> {
    if args.device == DeviceChoice::Cpu {
        return Ok((Some(Budget::of(&*session::emulated(args), args)?), None));
    }
    match session::cuda(args) {
        Ok(device) => Ok((Some(Budget::of(&*device, args)?), None)),
        Err(error @ DeviceError::NoDevice { .. }) if session::is_open(args) => match args.vram_limit {
            Some(bytes) => Ok((Some(Budget { bytes, device: None, in_use: None, limit: Some(bytes) }), None)),
            None => Ok((None, Some(one_line(&error)))),
        },
        Err(error) => Err(error.into()),
    }
}

/// The plan for people: weights by type, the rest, and how that fits.
pub fn table(plan: &MemoryPlan, n_ctx: usize, budget: Option<&Budget>) -> String {
    let mut text = String::new();
    let mut row = |name: &str, bytes: u64, remark: &str| {
        let size = BinaryBytes(bytes).to_string();
        let line = format!("{name:<10} {size:>12} {bytes:>15} bytes  {remark}");
        let _ = writeln!(text, "{}", line.trim_end());
    };
    for (ty, bytes) in &plan.weights {
        row("weights", *bytes, ty.name());
    }
    for (bytes, layers) in [(plan.kv_full, "full"), (plan.kv_sliding, "sliding")] {
        if bytes > 0 {
            row("KV cache", bytes, &format!("{n_ctx} tokens, layers of {layers} attention"));
        }
    }
    row("workspace", plan.workspace, "");
    row("total", plan.total(), "");
    if let Some(budget) = budget {
        let device = match (&budget.device, budget.limit) {
            (Some(device), None) => format!("free on {device}"),
            (Some(device), Some(_)) => format!("free on {device} under --vram-limit"),
            (None, _) => "--vram-limit".to_owned(),
        };
        if let Some(in_use) = budget.in_use.filter(|&bytes| bytes > 0) {
            row("in use", in_use, "by the driver and others, before any of this");
        }
        row("budget", budget.bytes, &device);
        let total = plan.total();
        match budget.bytes.checked_sub(total) {
            Some(left) => row("left", left, "fits"),
            None => row("missing", total - budget.bytes, "does not fit"),
        }
    }
    text
}
