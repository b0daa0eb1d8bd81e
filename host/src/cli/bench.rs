//! `gamma bench`: how fast a model runs, test by test, and what share that is of the memory's speed.

use std::fs;
use std::io::{Write, stderr};
use std::time::Instant;

use chacha20::ChaCha8Rng;
use comfy_table::{CellAlignment, Table, presets};
use gpt_gamma::adapter::InferenceAdapter;
use gpt_gamma::device;
use gpt_gamma::engine::{Engine, KvType, decode_bytes};
use gpt_gamma::model_file::ModelFile;
use rand::{Rng, SeedableRng};
use serde::Serialize;

use super::args::{Bench, BenchFormat, EngineArgs, GeluForm, Kv, ModelArgs};
use super::error::{Error, escape};
use super::{Out, model, session};

/// Runs the command.
pub fn run(args: &Bench) -> Result<(), Error> {
    let mut clock = Clock(Instant::now());
    let file = model::open(&ModelArgs { model: args.model.clone(), tokenizer: None })?;
    let adapter = model::describe(&file)?;
    let spec = adapter.spec();
    let opening_s = clock.lap();
    let machine = session::machine(&args.device)?;
    let device_s = clock.lap();

    let tests = tests(args, machine.gpu.is_none());
    if let Some(test) = tests.iter().find(|test| test.n_tokens() > spec.n_ctx) {
        return Err(Error::BenchTooLong { test: test.name(), n_tokens: test.n_tokens(), n_ctx: spec.n_ctx });
    }
    let engine = EngineArgs {
        ctx_size: tests.iter().map(Test::n_tokens).max().expect("the arguments leave a test"),
        batch_size: args.batch_size,
        kv: args.kv,
        gelu: GeluForm::Exact,
        yarn_truncate: false,
    };
    let (options, _) = model::options(&engine, &file, spec)?;
    let engine = session::load_weights(machine.device.clone(), &file, spec, &options)?;
    let weights_s = clock.lap();
    let mut bench = Timing { engine, file: &file, random: ChaCha8Rng::seed_from_u64(0) };
    // A prompt of one token, and what follows from it: kernels are compiled at their first launch.
    bench.once(Test { kind: Kind::Prompt(1), depth: 0 })?;
    let load = Load { opening_s, device_s, weights_s, first_token_s: clock.lap() };

    let n_repetitions = args.repetitions.unwrap_or(if machine.gpu.is_some() { 5 } else { 2 });
    let bar = session::bar("tests", "{pos}/{len}  {prefix}");
    bar.set_length(tests.len() as u64);
    let mut timed = Vec::new();
    let mut failure = None;
    for &test in &tests {
        bar.set_prefix(test.name());
        match bench.repeated(test, n_repetitions) {
            Ok(rates) => timed.push((test, rates)),
            // What was measured before is worth its time.
            Err(error) => {
                failure = Some(error);
                break;
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();

    // Its memory is room to measure in.
    drop(bench);
    let ceiling = machine.gpu.as_ref().and_then(|gpu| {
        device::read_bandwidth(gpu).unwrap_or_else(|error| {
            failure.get_or_insert(error.into());
            None
        })
    });
    let shared = Shared {
        tool: "gamma",
        version: env!("CARGO_PKG_VERSION"),
        device: match &machine.gpu {
            Some(gpu) => gpu.card().to_owned(),
            None => format!("{}, not a GPU", machine.device.name()),
        },
        ptx: machine.gpu.as_ref().map(|gpu| gpu.ptx().name()),
        driver: machine.gpu.as_ref().and_then(|_| driver()),
        model: called(&file),
        size: file.tensors().iter().map(|tensor| tensor.n_bytes as u64).sum(),
        n_params: file.tensors().iter().map(|tensor| tensor.n_elements()).sum(),
        n_batch: args.batch_size,
        kv: args.kv,
        ceiling,
        load,
    };
    let step_bytes = |n_keys| decode_bytes(spec, file.tensors(), KvType::from(args.kv), n_keys);
    let rows: Vec<Row> = timed.into_iter().map(|(test, rates)| Row::new(&shared, test, rates, &step_bytes)).collect();
    let mut out = Out::new();
    match args.output {
        BenchFormat::Md => print_table(&mut out, &shared, &rows, args.load)?,
        BenchFormat::Json => out.json(&rows.iter().map(JsonRow::of).collect::<Vec<_>>())?,
        BenchFormat::Csv => out.write(&csv(&rows))?,
    }
    out.flush()?;
    if args.load && args.output != BenchFormat::Md {
        // Its columns are there already; standard output holds nothing but the rows.
        let _ = writeln!(stderr(), "{}", shared.load.line());
    }
    failure.map_or(Ok(()), Err)
}

/// Seconds since it was last asked.
struct Clock(Instant);

impl Clock {
    fn lap(&mut self) -> f64 {
        let now = Instant::now();
        (now - std::mem::replace(&mut self.0, now)).as_secs_f64()
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Prompt(usize),
    Generate(usize),
}

#[derive(Clone, Copy)]
struct Test {
    kind: Kind,
    depth: usize,
}

impl Test {
    /// Tokens that are timed.
    fn n_timed(&self) -> usize {
        let (Kind::Prompt(n) | Kind::Generate(n)) = self.kind;
        n
    }

    fn n_tokens(&self) -> usize {
        self.depth + self.n_timed()
    }

    /// As llama-bench has it.
    fn name(&self) -> String {
        let name = match self.kind {
            Kind::Prompt(n) => format!("pp{n}"),
            Kind::Generate(n) => format!("tg{n}"),
        };
        if self.depth == 0 { name } else { format!("{name} @ d{}", self.depth) }
    }
}

/// For each depth prompts, then generation; never none.
fn tests(args: &Bench, emulated: bool) -> Vec<Test> {
    let (prompt, generated) = if emulated { (16, 8) } else { (512, 128) };
    let prompts = args.n_prompt.clone().unwrap_or(vec![prompt]);
    let generated = args.n_gen.clone().unwrap_or(vec![generated]);
    let mut tests = Vec::new();
    for &depth in &args.n_depth {
        let of_depth = |kind| Test { kind, depth };
        tests.extend(prompts.iter().map(|&n| of_depth(Kind::Prompt(n))));
        tests.extend(generated.iter().map(|&n| of_depth(Kind::Generate(n))));
    }
    tests.retain(|test| test.n_timed() > 0);
    tests
}

struct Timing<'a> {
    engine: Engine,
    file: &'a ModelFile,
    random: ChaCha8Rng,
}

impl Timing<'_> {
    /// Tokens per second of so many runs, after one that does not count.
    fn repeated(&mut self, test: Test, n_repetitions: usize) -> Result<Vec<f64>, Error> {
        self.once(test)?;
        (0..n_repetitions).map(|_| Ok(test.n_timed() as f64 / self.once(test)?)).collect()
    }

    /// Seconds of one run, from an engine at rest to an engine at rest.
    fn once(&mut self, test: Test) -> Result<f64, Error> {
        let (depth, tokens) = (self.tokens(test.depth), self.tokens(test.n_timed()));
        let engine = &mut self.engine;
        let mut run = || {
            engine.reset();
            if !depth.is_empty() {
                engine.prefill(&depth, &mut |_| {})?;
                engine.greedy()?;
            }
            let start = Instant::now();
            match test.kind {
                Kind::Prompt(_) => {
                    engine.prefill(&tokens, &mut |_| {})?;
                    engine.greedy()?;
                }
                Kind::Generate(_) => {
                    for &token in &tokens {
                        engine.decode(token)?;
                        engine.greedy()?;
                    }
                }
            }
            Ok(start.elapsed().as_secs_f64())
        };
        run().map_err(|error| model::engine_error(self.file, error))
    }

    /// Other ones each time: a model sends them to other experts.
    fn tokens(&mut self, n: usize) -> Vec<u32> {
        let n_vocab = self.engine.spec().n_vocab as u64;
        // The upper half of the product is uniform below `n_vocab` but for 2⁻³² of it.
        (0..n).map(|_| ((u64::from(self.random.next_u32()) * n_vocab) >> 32) as u32).collect()
    }
}

/// Seconds from the start to the first token.
struct Load {
    opening_s: f64,
    device_s: f64,
    weights_s: f64,
    first_token_s: f64,
}

impl Load {
    fn line(&self) -> String {
        let Self { opening_s, device_s, weights_s, first_token_s } = self;
        let total = opening_s + device_s + weights_s + first_token_s;
        format!(
            "first token after {total:.2} s: file {opening_s:.2}, device {device_s:.2}, weights {weights_s:.2}, \
             kernels and first prompt {first_token_s:.2}"
        )
    }
}

/// What all rows say.
struct Shared {
    tool: &'static str,
    version: &'static str,
    device: String,
    ptx: Option<&'static str>,
    driver: Option<String>,
    model: String,
    size: u64,
    n_params: u64,
    n_batch: usize,
    kv: Kv,
    /// GB/s.
    ceiling: Option<f64>,
    load: Load,
}

/// A test's results, as `benches/record/README.md` documents them. Names are llama-bench's where it has one.
#[derive(Serialize)]
struct Row {
    tool: &'static str,
    version: &'static str,
    device: String,
    ptx: Option<&'static str>,
    driver: Option<String>,
    model: String,
    model_size: u64,
    model_n_params: u64,
    n_batch: usize,
    type_kv: &'static str,
    test: String,
    n_prompt: usize,
    n_gen: usize,
    n_depth: usize,
    repetitions: usize,
    avg_ts: f64,
    stddev_ts: Option<f64>,
    median_ts: f64,
    /// Of a generated token, on average over the test; none for prompts.
    bytes_per_token: Option<u64>,
    gb_per_s: Option<f64>,
    read_ceiling_gb_per_s: Option<f64>,
    read_share: Option<f64>,
    load_file_s: f64,
    load_device_s: f64,
    load_weights_s: f64,
    load_first_token_s: f64,
    #[serde(skip)]
    samples_ts: Vec<f64>,
}

/// A row with what no line of CSV can hold.
#[derive(Serialize)]
struct JsonRow<'a> {
    #[serde(flatten)]
    row: &'a Row,
    samples_ts: &'a [f64],
}

impl<'a> JsonRow<'a> {
    fn of(row: &'a Row) -> Self {
        Self { row, samples_ts: &row.samples_ts }
    }
}

impl Row {
    /// `step_bytes`: what a step reads whose query sees so many keys.
    fn new(shared: &Shared, test: Test, samples_ts: Vec<f64>, step_bytes: &dyn Fn(usize) -> u64) -> Self {
        let (n_prompt, n_gen) = match test.kind {
            Kind::Prompt(n) => (n, 0),
            Kind::Generate(n) => (0, n),
        };
        let total: u64 = (test.depth + 1..=test.depth + n_gen).map(step_bytes).sum();
        let bytes_per_token = total.checked_div(n_gen as u64);
        let avg_ts = mean(&samples_ts);
        let gb_per_s = bytes_per_token.map(|bytes| bytes as f64 * avg_ts / 1e9);
        Self {
            tool: shared.tool,
            version: shared.version,
            device: shared.device.clone(),
            ptx: shared.ptx,
            driver: shared.driver.clone(),
            model: shared.model.clone(),
            model_size: shared.size,
            model_n_params: shared.n_params,
            n_batch: shared.n_batch,
            type_kv: match shared.kv {
                Kv::F16 => "f16",
                Kv::F32 => "f32",
            },
            test: test.name(),
            n_prompt,
            n_gen,
            n_depth: test.depth,
            repetitions: samples_ts.len(),
            avg_ts,
            stddev_ts: deviation(&samples_ts),
            median_ts: median(&samples_ts),
            bytes_per_token,
            gb_per_s,
            read_ceiling_gb_per_s: shared.ceiling,
            read_share: gb_per_s.zip(shared.ceiling).map(|(reached, ceiling)| reached / ceiling),
            load_file_s: shared.load.opening_s,
            load_device_s: shared.load.device_s,
            load_weights_s: shared.load.weights_s,
            load_first_token_s: shared.load.first_token_s,
            samples_ts,
        }
    }
}

fn mean(samples: &[f64]) -> f64 {
    samples.iter().sum::<f64>() / samples.len() as f64
}

/// Of the samples, with n - 1 below, as llama-bench has it; none of a single one.
fn deviation(samples: &[f64]) -> Option<f64> {
    let mean = mean(samples);
    let squares: f64 = samples.iter().map(|x| (x - mean) * (x - mean)).sum();
    (samples.len() > 1).then(|| (squares / (samples.len() - 1) as f64).sqrt())
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// The last part of the file's path: where it lies is nobody's business.
fn called(file: &ModelFile) -> String {
    let name = file.path().file_name().unwrap_or(file.path().as_os_str());
    escape(&name.to_string_lossy())
}

/// The version of NVIDIA's kernel module, or else the CUDA version that the driver implements.
fn driver() -> Option<String> {
    let version = |text: String| {
        let is_version = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
        text.lines().next()?.split_whitespace().find(is_version).map(str::to_owned)
    };
    let module = fs::read_to_string("/proc/driver/nvidia/version").ok().and_then(version);
    module.or_else(|| cuda_loader::driver_version().ok().map(|(major, minor)| format!("CUDA {major}.{minor}")))
}

fn csv(rows: &[Row]) -> Vec<u8> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    rows.iter().for_each(|row| writer.serialize(row).expect("a row is flat, and memory takes any bytes"));
    writer.into_inner().expect("memory takes any bytes")
}

fn print_table(out: &mut Out, shared: &Shared, rows: &[Row], load: bool) -> Result<(), Error> {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    let share = shared.ceiling.map(|_| "of reading");
    let header = ["model", "size", "params", "device", "PTX", "test", "t/s", "GB/s"];
    table.set_header(header.into_iter().chain(share));
    let size = format!("{:.2} GiB", shared.size as f64 / (1_u64 << 30) as f64);
    let params = match shared.n_params {
        n if n >= 1_000_000_000 => format!("{:.2} B", n as f64 / 1e9),
        n => format!("{:.2} M", n as f64 / 1e6),
    };
    for row in rows {
        let speed = match row.stddev_ts {
            Some(deviation) => format!("{:.2} ± {deviation:.2}", row.avg_ts),
            None => format!("{:.2}", row.avg_ts),
        };
        // The emulator's would round to nothing.
        let decimals = if shared.ceiling.is_some() { 1 } else { 3 };
        let rate = row.gb_per_s.map_or(String::new(), |rate| format!("{rate:.decimals$}"));
        let reached = row.read_share.map_or(String::new(), |share| format!("{:.1} %", 100.0 * share));
        let device = row.device.clone();
        let ptx = row.ptx.unwrap_or("none").to_owned();
        let cells = [row.model.clone(), size.clone(), params.clone(), device, ptx, row.test.clone(), speed, rate];
        table.add_row(cells.into_iter().chain(share.map(|_| reached)));
    }
    for (i, column) in table.column_iter_mut().enumerate() {
        if [1, 2, 6, 7, 8].contains(&i) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    out.line(&table.to_string())?;
    if let Some(ceiling) = shared.ceiling {
        out.line(&format!("\nreading: {ceiling:.0} GB/s, measured after the tests"))?;
    }
    if load {
        out.line(&format!("\n{}", shared.load.line()))?;
    }
    Ok(())
}
