//! Device memory: what is planned is what is taken, what does not fit is refused, what ran out comes back.

use gamma_tests::{engine_device, limited_device, models, wants_gpu};
use gpt_gamma::adapter::{InferenceAdapter, ModelSpec, detect};
use gpt_gamma::device::{self, Buffer, SharedDevice};
use gpt_gamma::engine::{Engine, Error, KvType, MemoryPlan, Options};
use gpt_gamma::gguf::TensorInfo;
use gpt_gamma::model_file::ModelFile;

const TINY: [&str; 2] = ["tiny-gpt2-q4_k_m.gguf", "tiny-gpt-oss-mxfp4.gguf"];

fn open(model: &str) -> (ModelFile, ModelSpec) {
    let file = ModelFile::open(models().join(model)).unwrap();
    let adapter = detect(file.metadata(), file.tensors()).unwrap();
    let spec = adapter.spec().clone();
    (file, spec)
}

fn load(device: &SharedDevice, file: &ModelFile, spec: &ModelSpec, options: &Options) -> Result<Engine, Error> {
    Engine::load(SharedDevice::clone(device), file, spec, options.clone(), &mut |_, _| {})
}

fn total(spec: &ModelSpec, tensors: &[TensorInfo], options: &Options) -> u64 {
    MemoryPlan::new(spec, tensors, options).unwrap().total()
}

/// A prompt of `n` tokens and a step after it.
fn run(engine: &mut Engine, n: usize) {
    let prompt: Vec<u32> = (0..n as u32).map(|i| i * 31 % 2000).collect();
    engine.prefill(&prompt, &mut |_| {}).unwrap();
    let token = engine.greedy().unwrap();
    engine.decode(token).unwrap();
    assert_eq!(engine.logits().unwrap().len(), engine.spec().n_vocab);
}

#[test]
fn the_plan_is_what_is_allocated() {
    for model in TINY {
        let (file, spec) = open(model);
        for (n_ctx, kv) in [(1, KvType::F16), (96, KvType::F16), (500, KvType::F32)] {
            let options = Options { n_ctx, kv, ..Options::for_model(&spec) };
            let device = limited_device(1 << 30);
            let before = device.memory().unwrap().free;
            let engine = load(&device, &file, &spec, &options).unwrap();
            assert_eq!(before - device.memory().unwrap().free, total(&spec, file.tensors(), &options), "{model}");
            drop(engine);
            assert_eq!(device.memory().unwrap().free, before, "{model}");
        }
    }
}

#[test]
fn the_plan_tells_layers_apart_by_what_they_attend_to() {
    let (file, spec) = open("tiny-gpt-oss-mxfp4.gguf");
    let options = Options { n_ctx: 1024, ..Options::for_model(&spec) };
    let plan = MemoryPlan::new(&spec, file.tensors(), &options).unwrap();
    // 2 (K and V) · 2 layers · 1024 tokens · 2 heads of 64 · 2 bytes
    assert_eq!(plan.kv_full, 2 * 2 * 1024 * 128 * 2);
    assert!(plan.kv_sliding > 0 && plan.kv_sliding <= plan.kv_full);
    assert_eq!(plan.total(), plan.weight_bytes() + plan.kv_full + plan.kv_sliding + plan.workspace);
}

#[test]
fn the_memory_limit_is_exact_from_both_sides_and_names_the_largest_context() {
    let (file, spec) = open(TINY[0]);
    let options = Options { n_ctx: 200, ..Options::for_model(&spec) };
    let total = total(&spec, file.tensors(), &options);
    run(&mut load(&limited_device(total), &file, &spec, &options).unwrap(), 9);

    let device = limited_device(total - 1);
    let Err(Error::DoesNotFit { needed, free, n_ctx: 200, advice }) = load(&device, &file, &spec, &options) else {
        panic!("one byte too few was not refused");
    };
    assert_eq!((needed, free), (total, total - 1));
    let (largest, taken) = (advice.0.unwrap(), device.memory().unwrap());
    assert!(largest < 200);
    assert_eq!(taken.free, total - 1, "a refusal takes nothing");
    let more = Options { n_ctx: largest + 1, ..options.clone() };
    assert!(matches!(load(&device, &file, &spec, &more), Err(Error::DoesNotFit { .. })));
    let most = Options { n_ctx: largest, ..options.clone() };
    run(&mut load(&device, &file, &spec, &most).unwrap(), largest - 1);

    let Err(Error::DoesNotFit { advice, .. }) = load(&limited_device(1000), &file, &spec, &options) else {
        panic!("1000 bytes sufficed")
    };
    assert_eq!(advice.0, None);
}

#[test]
fn a_request_that_runs_out_of_memory_leaves_room_for_the_next() {
    let (file, spec) = open(TINY[0]);
    let options = Options { n_ctx: 64, ..Options::for_model(&spec) };
    // The logits of a few tokens fit beside the model.
    check_running_out(&limited_device(total(&spec, file.tensors(), &options) + (1 << 20)), 0);
}

/// The same with all that the card has, so that it is the driver who refuses.
#[test]
#[ignore = "fills the GPU: alone, with --ignored --test-threads 1"]
fn a_request_that_runs_out_of_a_whole_card_leaves_room_for_the_next() {
    assert!(wants_gpu(), "set GAMMA_TEST_DEVICE=cuda");
    // The driver keeps a piece or two of 2 MiB for small buffers to come.
    check_running_out(&engine_device(), 4 << 20);
}

/// `kept`: bytes that the driver may keep when buffers are freed.
fn check_running_out(device: &SharedDevice, kept: u64) {
    let (file, spec) = open(TINY[0]);
    let options = Options { n_ctx: 64, ..Options::for_model(&spec) };
    let prompt: Vec<u32> = (0..40).collect();
    let mut engine = load(device, &file, &spec, &options).unwrap();
    run(&mut engine, 8);
    let (n_past, logits) = (engine.n_past(), engine.logits().unwrap());

    let before = device.memory().unwrap().free;
    let ballast = fill(device);
    let full = device.memory().unwrap().free;
    let failed = engine.prefill_all(&prompt, &mut |_, _| panic!("there was no memory for logits"));
    assert!(matches!(failed, Err(Error::Device(device::Error::OutOfMemory { .. }))), "{failed:?}");
    // Whatever the request took it gave back, and the sequence is as it was.
    assert_eq!(device.memory().unwrap().free, full);
    assert_eq!((engine.n_past(), engine.logits().unwrap()), (n_past, logits));
    // What needs no more memory runs on.
    let token = engine.greedy().unwrap();
    engine.decode(token).unwrap();

    drop(ballast);
    let mut n_rows = 0;
    engine.prefill_all(&prompt, &mut |_, _| n_rows += 1).unwrap();
    assert_eq!((n_rows, engine.n_past()), (prompt.len(), n_past + 1 + prompt.len()));
    assert!(device.memory().unwrap().free + kept >= before);
}

/// Takes memory until the device has none for the logits of a few tokens.
fn fill(device: &SharedDevice) -> Vec<Buffer<u8>> {
    let mut ballast = Vec::new();
    let mut step = 1 << 30;
    while step >= 1 << 10 {
        match Buffer::new(device, step) {
            Ok(buffer) => ballast.push(buffer),
            Err(device::Error::OutOfMemory { .. }) => step /= 2,
            Err(error) => panic!("{error}"),
        }
    }
    ballast
}

#[test]
fn a_load_that_does_not_fit_any_more_fails_and_a_later_one_succeeds() {
    let (file, spec) = open(TINY[0]);
    let options = Options { n_ctx: 64, ..Options::for_model(&spec) };
    let device = limited_device(total(&spec, file.tensors(), &options));
    let ballast = Buffer::<u8>::new(&device, 1).unwrap();
    assert!(matches!(load(&device, &file, &spec, &options), Err(Error::DoesNotFit { .. })));
    drop(ballast);
    run(&mut load(&device, &file, &spec, &options).unwrap(), 3);
}

#[test]
fn turns_take_no_memory() {
    let (file, spec) = open(TINY[0]);
    let options = Options { n_ctx: 96, ..Options::for_model(&spec) };
    let device = limited_device(1 << 30);
    let mut engine = load(&device, &file, &spec, &options).unwrap();
    run(&mut engine, 20);
    let first = device.memory().unwrap().free;
    for turn in 0..30 {
        engine.rewind(engine.n_past().min(10 + turn % 20)).unwrap();
        run(&mut engine, 6);
        assert_eq!(device.memory().unwrap().free, first, "turn {turn}");
    }
}

/// A GiB of keys and values: what the driver reports counts graphs and the like, too, a few MB.
#[test]
#[ignore = "counts what the whole GPU has: alone, with --ignored --test-threads 1"]
fn the_plan_is_what_the_driver_reports_within_one_percent() {
    assert!(wants_gpu(), "set GAMMA_TEST_DEVICE=cuda");
    let (file, mut spec) = open(TINY[1]);
    // Positions are turned, not looked up, so the spec may promise more than the training did.
    spec.n_ctx = 1 << 20;
    let options = Options::for_model(&spec);
    let device = engine_device();
    let planned = total(&spec, file.tensors(), &options);
    let mut engine = load(&device, &file, &spec, &options).unwrap();
    run(&mut engine, 9);
    let reported = device.memory().unwrap().since;
    println!("planned {planned}, reported {reported}");
    assert!(reported.abs_diff(planned) * 100 <= planned, "planned {planned}, the driver reports {reported}");
}
