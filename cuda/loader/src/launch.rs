//! Modules whose compile errors can be read, and launches with attributes.

use std::ffi::{CString, c_char, c_void};
use std::mem::offset_of;
use std::ptr;

use cust::function::Function;
use cust::module::Module;
use cust::stream::Stream;
use cust::sys::{CUfunction_attribute, CUjit_option, CUstream};

use crate::{Error, check, symbols};

/// Room for the driver's compile messages. A module's worth of errors is a few lines.
const LOG_BYTES: usize = 16 * 1024;

/// Compiles `ptx` for the current context's device, and keeps the compiler's messages if it cannot.
///
/// # Errors
///
/// - [`Error::ZeroByteInPtx`] if `ptx` is not text.
/// - [`Error::Ptx`] if the driver refuses it, with the log of its compiler. `CUDA_ERROR_UNSUPPORTED_PTX_VERSION` (222)
///   means that the driver is older than the PTX.
pub fn module_from_ptx_with_log(ptx: &str) -> Result<Module, Error> {
    let ptx = CString::new(ptx).map_err(|error| Error::ZeroByteInPtx { offset: error.nul_position() })?;
    // cust's module cannot be made from a handle, so cust loads it, and only a failure is repeated to get its log.
    Module::from_ptx_cstr(&ptx, &[]).map_err(|error| match compile_log(&ptx) {
        Some((code, log)) => Error::Ptx { code, log },
        None => Error::from(error),
    })
}

/// Loads `ptx` again with a log buffer; the code and the log, or nothing if it loads this time.
fn compile_log(ptx: &CString) -> Option<(u32, String)> {
    let mut log = vec![0_u8; LOG_BYTES];
    let mut options = [CUjit_option::CU_JIT_ERROR_LOG_BUFFER, CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // Each value takes the place of a pointer: the buffer's address, and the size itself, not an address of it.
    let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), ptr::without_provenance_mut(LOG_BYTES)];
    let mut module = ptr::null_mut();
    // SAFETY: `ptx` ends in a zero byte, both arrays have two entries, and `log` is as large as it says; all outlive
    // the call. A module that does load is unloaded at once.
    let refused = unsafe {
        let image = ptx.as_ptr().cast();
        let refused =
            check(symbols::cuModuleLoadDataEx(&mut module, image, 2, options.as_mut_ptr(), values.as_mut_ptr()));
        if refused.is_ok() {
            symbols::cuModuleUnload(module);
        }
        refused.err()?
    };
    let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
    Some((refused.code()?, String::from_utf8_lossy(&log[..end]).trim().to_owned()))
}

/// What the device's compiler made of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionAttributes {
    /// Registers of one thread.
    pub registers: u32,
    /// Local memory of one thread, in bytes: the stack, and registers that did not fit.
    pub local_bytes: u32,
    /// Shared memory of one block that the kernel declares itself, in bytes.
    pub static_shared_bytes: u32,
    /// Most dynamic shared memory a launch may ask for, in bytes; [`set_max_dynamic_shared`] sets it.
    pub max_dynamic_shared_bytes: u32,
    /// Most threads a block may have.
    pub max_threads_per_block: u32,
}

/// Asks the driver what `function` needs.
///
/// # Errors
///
/// [`Error::Call`] if the driver refuses to say.
pub fn function_attributes(function: &Function) -> Result<FunctionAttributes, Error> {
    let ask = |attribute: CUfunction_attribute| {
        let mut value = 0;
        // SAFETY: the function's module is borrowed by it, and `value` outlives the call.
        check(unsafe { symbols::cuFuncGetAttribute(&mut value, attribute as i32, function.to_raw()) })?;
        Ok::<u32, Error>(value.unsigned_abs())
    };
    Ok(FunctionAttributes {
        registers: ask(CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
        local_bytes: ask(CUfunction_attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
        static_shared_bytes: ask(CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
        max_dynamic_shared_bytes: ask(CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)?,
        max_threads_per_block: ask(CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
    })
}

/// Lets launches of `function` ask for up to `bytes` of dynamic shared memory; the driver's default is 48 KiB.
///
/// # Errors
///
/// - [`Error::Call`] with `CUDA_ERROR_INVALID_VALUE` if the device has less than `bytes` and the kernel's own together.
/// - [`Error::TooLarge`] from 2 GiB on, which the driver's call cannot express.
pub fn set_max_dynamic_shared(function: &Function, bytes: u32) -> Result<(), Error> {
    let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as i32;
    let bytes = i32::try_from(bytes).map_err(|_| Error::TooLarge { elements: bytes as usize, element_bytes: 1 })?;
    // SAFETY: the function's module is borrowed by it.
    check(unsafe { symbols::cuFuncSetAttribute(function.to_raw(), attribute, bytes) })
}

/// Asks that the multiprocessor's cache be all shared memory while `function` runs, as far as that goes. A multiprocessor has
/// to be idle to change its split, so kernels that are to run side by side should ask for the same.
///
/// # Errors
///
/// [`Error::Call`] if the driver refuses.
pub fn prefer_shared(function: &Function) -> Result<(), Error> {
    let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT as i32;
    // SAFETY: the function's module is borrowed by it.
    check(unsafe { symbols::cuFuncSetAttribute(function.to_raw(), attribute, 100) })
}

/// What a launch may ask for beyond its geometry. The default asks for nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaunchAttributes {
    /// May start before the kernel ahead of it in the stream has finished. The kernel waits by itself, with
    /// `griddepcontrol.wait`, before it reads what that one writes. Needs compute capability 9.0 and CUDA 11.8.
    pub programmatic_stream_serialization: bool,
    /// All blocks run at once, so that they can wait for each other.
    pub cooperative: bool,
    /// Blocks per cluster in x, y and z. Needs compute capability 9.0 and CUDA 11.8.
    pub cluster: Option<[u32; 3]>,
}

/// Launches `function` in `stream`, without waiting. `args` holds the address of each argument, `shared_bytes` is the
/// dynamic shared memory of one block.
///
/// # Errors
///
/// [`Error::Call`]:
/// - `CUDA_ERROR_INVALID_VALUE` for a geometry or a shared size that the device does not have.
/// - `CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE` (720) if the blocks of a cooperative launch do not fit at once.
/// - `CUDA_ERROR_NOT_SUPPORTED` if attributes are asked of a driver older than CUDA 11.8.
/// - Whatever an earlier asynchronous call failed with.
///
/// # Safety
///
/// - `args` has as many entries as `function` has parameters, each the address of a value of that parameter's type.
/// - The kernel's own contract holds for this geometry and these arguments, until `stream` has passed the launch.
pub unsafe fn launch_ex(
    function: &Function,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    stream: &Stream,
    args: &[*mut c_void],
    attributes: LaunchAttributes,
) -> Result<(), Error> {
    // The driver only reads the array, though its signature does not say so.
    let (args, extra) = (args.as_ptr().cast_mut(), ptr::null_mut());
    if attributes == LaunchAttributes::default() {
        let ([gx, gy, gz], [bx, by, bz]) = (grid, block);
        let (function, stream) = (function.to_raw(), stream.as_inner());
        // SAFETY: the caller's promise.
        return check(unsafe {
            symbols::cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared_bytes, stream, args, extra)
        });
    }

    let mut list = Vec::with_capacity(3);
    if attributes.programmatic_stream_serialization {
        list.push(LaunchAttribute::new(6, [1, 0, 0]));
    }
    if attributes.cooperative {
        list.push(LaunchAttribute::new(2, [1, 0, 0]));
    }
    if let Some(cluster) = attributes.cluster {
        list.push(LaunchAttribute::new(4, cluster));
    }
    let config = LaunchConfig {
        grid,
        block,
        shared_bytes,
        stream: stream.as_inner(),
        attributes: list.as_ptr(),
        attribute_count: list.len() as u32,
    };
    // SAFETY: `config` and the list it points to outlive the call; the rest is the caller's promise.
    check(unsafe { symbols::cuLaunchKernelEx(&config, function.to_raw(), args, extra) })
}

/// `CUlaunchConfig` of `cuda.h`.
#[repr(C)]
pub(crate) struct LaunchConfig {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    stream: CUstream,
    attributes: *const LaunchAttribute,
    attribute_count: u32,
}

/// `CUlaunchAttribute` of `cuda.h`: an id, padded to 8 bytes, and a union of 64 bytes. All attributes used here are one
/// to three 32-bit numbers at the union's start.
#[repr(C, align(8))]
struct LaunchAttribute {
    id: u32,
    pad: [c_char; 4],
    value: [u32; 16],
}

impl LaunchAttribute {
    fn new(id: u32, numbers: [u32; 3]) -> Self {
        let mut value = [0; 16];
        value[..3].copy_from_slice(&numbers);
        Self { id, pad: [0; 4], value }
    }
}

const _: () = {
    assert!(size_of::<LaunchConfig>() == 56 && align_of::<LaunchConfig>() == 8);
    assert!(offset_of!(LaunchConfig, shared_bytes) == 24 && offset_of!(LaunchConfig, stream) == 32);
    assert!(offset_of!(LaunchConfig, attributes) == 40 && offset_of!(LaunchConfig, attribute_count) == 48);
    assert!(size_of::<LaunchAttribute>() == 72 && align_of::<LaunchAttribute>() == 8);
    assert!(offset_of!(LaunchAttribute, value) == 8);
};
