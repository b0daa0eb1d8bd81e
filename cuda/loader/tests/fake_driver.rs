//! What this crate's functions tell a driver, seen from the driver's side: the fake in `fake_driver/libcuda.rs`.
//!
//! The fake is built as `libcuda.so.1` and loaded first, under that name, so that the crate finds it in place of a real
//! one. Tests take turns, since the fake keeps one list of calls.

use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock};

use cuda_loader::cust::error::CudaError;
use cuda_loader::cust::memory::CopyDestination;
use cuda_loader::cust::stream::{Stream, StreamFlags};
use cuda_loader::graph::{self, CaptureMode};
use cuda_loader::{Driver, Error, LaunchAttributes, PinnedBuffer, Unavailable};
use libloading::Library;

#[test]
fn availability_tells_its_causes_apart() {
    let driver = FakeDriver::turn();
    driver.answers(12080, 2, 0);
    assert_eq!(cuda_loader::availability(), Ok(Driver { version: (12, 8), devices: 2 }));
    driver.answers(11030, 2, 0);
    let too_old = Unavailable::TooOld { found: (11, 3), oldest: (11, 4) };
    assert_eq!(cuda_loader::availability(), Err(too_old));
    driver.answers(13000, 0, 0);
    assert_eq!(cuda_loader::availability(), Err(Unavailable::NoDevice { version: (13, 0) }));
    driver.answers(13000, 1, 100);
    assert_eq!(cuda_loader::availability(), Err(Unavailable::NoDevice { version: (13, 0) }));
    driver.answers(13000, 1, 803);
    let mismatch = Unavailable::Start(Error::Call { call: "cuInit", code: 803 });
    assert_eq!(cuda_loader::availability(), Err(mismatch));
    driver.answers(12080, 1, 0);
}

#[test]
fn a_function_the_driver_lacks_is_not_supported() {
    let _driver = FakeDriver::turn();
    assert_eq!(cuda_loader::cust::memory::DeviceBuffer::<u8>::zeroed(1).err(), Some(CudaError::NotSupported));
    let error = Error::from(CudaError::NotSupported);
    assert_eq!(error.to_string(), "cuMemAlloc_v2: CUDA_ERROR_NOT_SUPPORTED (801)");
}

#[test]
fn memory_info_is_free_then_total() {
    let _driver = FakeDriver::turn();
    assert_eq!(cuda_loader::memory_info(), Ok((1 << 33, 3 << 33)));
}

#[test]
fn pinned_buffers_start_as_zeros_and_are_freed() {
    let driver = FakeDriver::turn();
    let mut buffer = PinnedBuffer::<u32>::zeroed(5).expect("the fake has memory");
    assert_eq!(*buffer, [0; 5]);
    buffer[4] = 9;
    assert_eq!(buffer[4], 9);
    drop(buffer);
    drop(PinnedBuffer::<u32>::zeroed(0).expect("nothing is asked of the driver"));
    assert_eq!(driver.calls(), ["pin 20", "unpin"]);
    let error = PinnedBuffer::<u32>::zeroed(usize::MAX).expect_err("no machine has this much");
    assert_eq!(error, Error::TooLarge { elements: usize::MAX, element_bytes: 4 });
}

#[test]
fn asynchronous_copies_pass_sizes_in_bytes() {
    let driver = FakeDriver::turn();
    let (stream, mut host) = (stream(), [3_u32; 4]);
    // SAFETY: the fake touches host memory within the sizes given, and no device memory.
    unsafe {
        cuda_loader::copy_to_device_async(0xd0, &host, &stream).expect("the fake accepts it");
        cuda_loader::copy_to_host_async(&mut host, 0xd1, &stream).expect("the fake accepts it");
        cuda_loader::copy_on_device_async(0xd2, 0xd3, 24, &stream).expect("the fake accepts it");
        cuda_loader::fill_async(0xd4, 255, 8, &stream).expect("the fake accepts it");
    }
    assert_eq!(host, [0x0707_0707; 4]);
    let expected = ["upload 0xd0 3 16 0x51", "download 0xd1 16 0x51", "copy 0xd2 0xd3 24 0x51", "fill 0xd4 255 8 0x51"];
    assert_eq!(driver.calls(), expected);
}

#[test]
fn refused_ptx_brings_the_compiler_s_log() {
    let driver = FakeDriver::turn();
    let error = cuda_loader::module_from_ptx_with_log(".version 7.0 error").expect_err("the fake refuses it");
    let log = "ptxas application ptx input, line 9; fatal: Parsing error near 'error'".to_owned();
    assert_eq!(error.to_string(), format!("PTX was refused: CUDA_ERROR_INVALID_PTX (218): {log}"));
    assert_eq!(error, Error::Ptx { code: 218, log });
    let error = cuda_loader::module_from_ptx_with_log("a\0b").expect_err("a zero byte ends the text early");
    assert_eq!(error, Error::ZeroByteInPtx { offset: 1 });
    assert_eq!(driver.calls(), [""; 0]);
}

#[test]
fn launches_pass_geometry_attributes_and_arguments() {
    let driver = FakeDriver::turn();
    let (stream, argument) = (stream(), 77_u32);
    let module = cuda_loader::module_from_ptx_with_log(".version 7.0").expect("the fake accepts it");
    let function = module.get_function("kernel").expect("the fake has any");
    let args = [(&raw const argument).cast_mut().cast::<c_void>()];
    let launch = |attributes| {
        // SAFETY: the fake reads one argument of this type and runs nothing.
        unsafe { cuda_loader::launch_ex(&function, [2, 3, 4], [5, 6, 7], 8, &stream, &args, attributes) }
            .expect("the fake accepts it");
    };
    launch(LaunchAttributes::default());
    launch(LaunchAttributes { programmatic_stream_serialization: true, ..Default::default() });
    launch(LaunchAttributes { cooperative: true, cluster: Some([8, 1, 2]), ..Default::default() });
    drop(module);
    let expected = [
        "load with 0 options",
        "launch 0xf [2, 3, 4] [5, 6, 7] 8 0x51 (77) 0",
        "launch 0xf [2, 3, 4, 5, 6, 7, 8] 0x51 [[6, 1, 0, 0]] (77) 0",
        "launch 0xf [2, 3, 4, 5, 6, 7, 8] 0x51 [[2, 1, 0, 0], [4, 8, 1, 2]] (77) 0",
        "unload",
    ];
    assert_eq!(driver.calls(), expected);
}

#[test]
fn function_attributes_are_the_driver_s() {
    let driver = FakeDriver::turn();
    let module = cuda_loader::module_from_ptx_with_log(".version 7.0").expect("the fake accepts it");
    let function = module.get_function("kernel").expect("the fake has any");
    let attributes = cuda_loader::function_attributes(&function).expect("the fake answers");
    // CU_FUNC_ATTRIBUTE_*: MAX_THREADS_PER_BLOCK 0, SHARED_SIZE_BYTES 1, LOCAL_SIZE_BYTES 3, NUM_REGS 4,
    // MAX_DYNAMIC_SHARED_SIZE_BYTES 8; the fake answers 100 more.
    assert_eq!((attributes.max_threads_per_block, attributes.static_shared_bytes), (100, 101));
    assert_eq!((attributes.local_bytes, attributes.registers), (103, 104));
    assert_eq!(attributes.max_dynamic_shared_bytes, 108);
    cuda_loader::set_max_dynamic_shared(&function, 99 * 1024).expect("the fake accepts it");
    assert_eq!(driver.calls()[1], "attribute 8 of 0xf is 101376");
    let error = cuda_loader::set_max_dynamic_shared(&function, 1 << 31).expect_err("no device has 2 GiB");
    assert_eq!(error, Error::TooLarge { elements: 1 << 31, element_bytes: 1 });
}

#[test]
fn a_captured_stream_becomes_a_launchable_graph() {
    let driver = FakeDriver::turn();
    let stream = stream();
    let graph = graph::capture(&stream, CaptureMode::ThreadLocal, || {
        // SAFETY: the fake touches no device memory.
        unsafe { cuda_loader::fill_async(0xd0, 0, 4, &stream) }
    });
    let graph = graph.expect("the fake accepts it");
    assert_eq!(graph.node_count(), Ok(42));
    let exec = graph.instantiate().expect("the fake accepts it");
    drop(graph);
    // SAFETY: the fake runs nothing.
    let error = unsafe { exec.launch(&stream) }.expect_err("the fake refuses it");
    assert_eq!(error, Error::Call { call: "cuGraphLaunch", code: 912 });
    drop(exec);
    let expected = ["begin 0x51 1", "fill 0xd0 0 4 0x51", "end 0x51", "nodes 0x6 0", "instantiate 0x6 0"];
    assert_eq!(driver.calls(), [&expected[..], &["destroy graph 0x6", "replay 0xe 0x51", "destroy exec 0xe"]].concat());
}

#[test]
fn a_failed_recording_leaves_the_stream_usable() {
    let driver = FakeDriver::turn();
    let stream = stream();
    let failure = Error::Call { call: "recording", code: 1 };
    let graph = graph::capture(&stream, CaptureMode::Global, || Err(failure.clone()));
    assert_eq!(graph.err(), Some(failure));
    assert_eq!(driver.calls(), ["begin 0x51 0", "end 0x51", "destroy graph 0x6"]);
}

/// Names every kind of cust's functions that the engine may use, so that a missing symbol fails to link.
#[test]
fn cust_links_without_libcuda() {
    use cuda_loader::cust::{context, device, event, memory, module};
    let _driver = FakeDriver::turn();
    let uses: &[(&str, usize)] = &[
        ("context", context::Context::new as *const () as usize),
        ("synchronize", context::CurrentContext::synchronize as *const () as usize),
        ("attribute", device::Device::get_attribute as *const () as usize),
        ("name", device::Device::name as *const () as usize),
        ("total memory", device::Device::total_memory as *const () as usize),
        ("cubin", module::Module::from_cubin::<&[u8]> as *const () as usize),
        ("event", event::Event::new as *const () as usize),
        ("record", event::Event::record as *const () as usize),
        ("elapsed", event::Event::elapsed_time_f32 as *const () as usize),
        ("wait", Stream::wait_event as *const () as usize),
        ("buffer", memory::DeviceBuffer::<f32>::from_slice as *const () as usize),
        ("buffer async", memory::DeviceBuffer::<f32>::from_slice_async as *const () as usize),
        ("copy to", <memory::DeviceSlice<u8> as CopyDestination<Vec<u8>>>::copy_to as *const () as usize),
        ("locked", memory::LockedBuffer::<f32>::from_slice as *const () as usize),
        ("unified", memory::UnifiedBuffer::<f32>::from_slice as *const () as usize),
        ("memory info", memory::mem_get_info as *const () as usize),
    ];
    for (name, address) in std::hint::black_box(uses) {
        assert_ne!(*address, 0, "{name}");
    }
}

fn stream() -> Stream {
    Stream::new(StreamFlags::DEFAULT, None).expect("the fake makes streams")
}

/// The fake, for as long as a test has its turn.
struct FakeDriver {
    library: &'static Library,
    _turn: MutexGuard<'static, ()>,
}

impl FakeDriver {
    fn turn() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        // A test that failed in its turn has said so itself.
        let turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // SAFETY: the fake has no initializers.
        let load = || unsafe { Library::new(build()) }.expect("the fake loads");
        let driver = Self { library: LIBRARY.get_or_init(load), _turn: turn };
        driver.calls();
        driver
    }

    fn answers(&self, version: i32, devices: i32, init: u32) {
        // SAFETY: the signature in the fake's source.
        unsafe {
            let set = self.library.get::<extern "C" fn(i32, i32, u32)>("fake_answers").expect("the fake has it");
            set(version, devices, init);
        }
    }

    /// The calls since the last time this was asked.
    fn calls(&self) -> Vec<String> {
        let mut text = vec![0; 4096];
        // SAFETY: the signature in the fake's source, and a buffer of the size given.
        let len = unsafe {
            let take = self.library.get::<unsafe extern "C" fn(*mut u8, usize) -> usize>("fake_take_calls");
            take.expect("the fake has it")(text.as_mut_ptr(), text.len())
        };
        let text = std::str::from_utf8(&text[..len]).expect("the fake writes text");
        text.lines().map(str::to_owned).collect()
    }
}

/// Compiles the fake; the name inside the file is what makes the loader take it for `libcuda.so.1`.
fn build() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_driver/libcuda.rs");
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join("libcuda.so.1");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let status = Command::new(rustc)
        .args(["--edition=2024", "--crate-type=cdylib", "--crate-name=cuda", "-Clink-arg=-Wl,-soname,libcuda.so.1"])
        .arg("-o")
        .args([&library, &source])
        .status();
    assert!(status.expect("rustc starts").success());
    library
}
