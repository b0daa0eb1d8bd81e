//! A driver that runs nothing and remembers what it was told, compiled by `tests/fake_driver.rs` as `libcuda.so.1`.
//!
//! Structures are read at the byte offsets of `cuda.h`, not through the crate's own types. Functions not written here
//! are missing, as in a driver too old to have them.
#![allow(non_snake_case)]

use std::ffi::{CStr, c_char, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering::SeqCst};

static VERSION: AtomicI32 = AtomicI32::new(12080);
static DEVICES: AtomicI32 = AtomicI32::new(1);
static INIT: AtomicU32 = AtomicU32::new(0);
static CALLS: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn note(call: String) -> u32 {
    CALLS.lock().unwrap().push(call);
    0
}

/// What the next calls of `cuDriverGetVersion`, `cuDeviceGetCount` and `cuInit` answer.
#[unsafe(no_mangle)]
pub extern "C" fn fake_answers(version: i32, devices: i32, init: u32) {
    VERSION.store(version, SeqCst);
    DEVICES.store(devices, SeqCst);
    INIT.store(init, SeqCst);
}

/// Writes the calls noted since last time, one a line, into `text` and returns their length in bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fake_take_calls(text: *mut u8, capacity: usize) -> usize {
    let calls = std::mem::take(&mut *CALLS.lock().unwrap()).join("\n");
    assert!(calls.len() <= capacity);
    unsafe { text.copy_from_nonoverlapping(calls.as_ptr(), calls.len()) };
    calls.len()
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_flags: u32) -> u32 {
    INIT.load(SeqCst)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut i32) -> u32 {
    unsafe { *version = VERSION.load(SeqCst) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut i32) -> u32 {
    unsafe { *count = DEVICES.load(SeqCst) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(error: u32, name: *mut *const c_char) -> u32 {
    let text = match error {
        218 => c"CUDA_ERROR_INVALID_PTX",
        _ => return 1,
    };
    unsafe { *name = text.as_ptr() };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> u32 {
    unsafe { (*free, *total) = (1 << 33, 3 << 33) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocHost_v2(start: *mut *mut c_void, bytes: usize) -> u32 {
    let words = vec![0xa5a5_a5a5_a5a5_a5a5_u64; bytes.div_ceil(8)].into_boxed_slice();
    unsafe { *start = Box::leak(words).as_mut_ptr().cast() };
    note(format!("pin {bytes}"))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeHost(_start: *mut c_void) -> u32 {
    note("unpin".into())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, stream: usize) -> u32 {
    let first = unsafe { *from };
    note(format!("upload {to:#x} {first} {bytes} {stream:#x}"))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, stream: usize) -> u32 {
    unsafe { to.write_bytes(7, bytes) };
    note(format!("download {from:#x} {bytes} {stream:#x}"))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: usize) -> u32 {
    note(format!("copy {to:#x} {from:#x} {bytes} {stream:#x}"))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8Async(start: u64, value: u8, bytes: usize, stream: usize) -> u32 {
    note(format!("fill {start:#x} {value} {bytes} {stream:#x}"))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreateWithPriority(stream: *mut usize, _flags: u32, _priority: i32) -> u32 {
    unsafe { *stream = 0x51 };
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(_stream: usize) -> u32 {
    0
}

/// Refuses text that names an error, with a log as the driver's compiler writes it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadDataEx(
    module: *mut usize,
    image: *const c_char,
    count: u32,
    options: *const i32,
    values: *const usize,
) -> u32 {
    let text = unsafe { CStr::from_ptr(image) }.to_str().unwrap();
    if !text.contains("error") {
        unsafe { *module = 0x30d };
        return note(format!("load with {count} options"));
    }
    let option =
        |wanted: i32| unsafe { (0..count as usize).find(|&i| *options.add(i) == wanted).map(|i| *values.add(i)) };
    // CU_JIT_ERROR_LOG_BUFFER and CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES.
    if let (Some(buffer), Some(size)) = (option(5), option(6)) {
        let log = b"ptxas application ptx input, line 9; fatal: Parsing error near 'error'\n\0";
        assert!(log.len() <= size);
        unsafe { (buffer as *mut u8).copy_from_nonoverlapping(log.as_ptr(), log.len()) };
    }
    218
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(_module: usize) -> u32 {
    note("unload".into())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(function: *mut usize, _module: usize, _name: *const c_char) -> u32 {
    unsafe { *function = 0xf };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetAttribute(value: *mut i32, attribute: i32, function: usize) -> u32 {
    assert_eq!(function, 0xf);
    unsafe { *value = 100 + attribute };
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetAttribute(function: usize, attribute: i32, value: i32) -> u32 {
    note(format!("attribute {attribute} of {function:#x} is {value}"))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: usize,
    gx: u32,
    gy: u32,
    gz: u32,
    bx: u32,
    by: u32,
    bz: u32,
    shared: u32,
    stream: usize,
    arguments: *const *const u32,
    extra: usize,
) -> u32 {
    let argument = unsafe { **arguments };
    note(format!(
        "launch {function:#x} [{gx}, {gy}, {gz}] [{bx}, {by}, {bz}] {shared} {stream:#x} ({argument}) {extra}"
    ))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernelEx(
    config: *const u8,
    function: usize,
    arguments: *const *const u32,
    extra: usize,
) -> u32 {
    let word = |base: *const u8, at: usize| unsafe { base.add(at).cast::<u32>().read_unaligned() };
    let long = |base: *const u8, at: usize| unsafe { base.add(at).cast::<usize>().read_unaligned() };
    let geometry: Vec<u32> = (0..7).map(|i| word(config, 4 * i)).collect();
    let (stream, list, count) = (long(config, 32), long(config, 40) as *const u8, word(config, 48) as usize);
    let attributes: Vec<[u32; 4]> = (0..count)
        .map(|i| unsafe { list.add(72 * i) })
        .map(|attribute| [word(attribute, 0), word(attribute, 8), word(attribute, 12), word(attribute, 16)])
        .collect();
    let argument = unsafe { **arguments };
    note(format!("launch {function:#x} {geometry:?} {stream:#x} {attributes:?} ({argument}) {extra}"))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamBeginCapture_v2(stream: usize, mode: i32) -> u32 {
    note(format!("begin {stream:#x} {mode}"))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamEndCapture(stream: usize, graph: *mut usize) -> u32 {
    unsafe { *graph = 0x6 };
    note(format!("end {stream:#x}"))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphGetNodes(graph: usize, nodes: usize, count: *mut usize) -> u32 {
    unsafe { *count = 42 };
    note(format!("nodes {graph:#x} {nodes}"))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithFlags(exec: *mut usize, graph: usize, flags: u64) -> u32 {
    unsafe { *exec = 0xe };
    note(format!("instantiate {graph:#x} {flags}"))
}

/// Fails with a code that came after `cust_raw`: `CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE` is 910, this is 912.
#[unsafe(no_mangle)]
pub extern "C" fn cuGraphLaunch(exec: usize, stream: usize) -> u32 {
    note(format!("replay {exec:#x} {stream:#x}"));
    912
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphDestroy(graph: usize) -> u32 {
    note(format!("destroy graph {graph:#x}"))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphExecDestroy(exec: usize) -> u32 {
    note(format!("destroy exec {exec:#x}"))
}
