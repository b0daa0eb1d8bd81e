//! Finds `libcuda.so.1` and its functions, and remembers how each thread's last failing call failed.

use std::cell::Cell;
use std::error::Error as _;
use std::sync::OnceLock;

use libloading::Library;

/// `CUDA_ERROR_NO_DEVICE`: what every function returns where there is no driver.
pub(crate) const NO_DEVICE: u32 = 100;
/// `CUDA_ERROR_NOT_SUPPORTED`: what a function returns that the installed driver does not have.
pub(crate) const NOT_SUPPORTED: u32 = 801;
const UNKNOWN: u32 = 999;

/// The loaded driver, or the loader's reason why there is none. Loaded once, never unloaded.
pub(crate) fn library() -> Result<&'static Library, &'static str> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    let library = LIBRARY.get_or_init(|| {
        // SAFETY: loading the driver runs its initializers, which is what every CUDA program does at start.
        // libloading's error says only that loading failed; its source is the loader's own message.
        unsafe { Library::new("libcuda.so.1") }
            .map_err(|error| error.source().map_or_else(|| error.to_string(), ToString::to_string))
    });
    library.as_ref().map_err(String::as_str)
}

/// The driver's function `name`, or the code to return in its place.
///
/// # Safety
///
/// `F` is the function pointer type of `name` in `cuda.h`.
pub(crate) unsafe fn resolve<F: Copy>(name: &str) -> Result<F, u32> {
    let library = library().map_err(|_| NO_DEVICE)?;
    // SAFETY: the caller names the right type, and the library is never unloaded, so the copy stays valid.
    unsafe { library.get::<F>(name) }.map(|function| *function).map_err(|_| NOT_SUPPORTED)
}

/// A driver call that returned something else than success.
#[derive(Clone, Copy)]
pub(crate) struct Failure {
    pub(crate) call: &'static str,
    pub(crate) code: u32,
}

thread_local! {
    // No destructor, so calls made while a thread ends still find it.
    static LAST: Cell<Option<Failure>> = const { Cell::new(None) };
}

/// Notes a failure of `call` on this thread and returns `code` as cust may see it.
///
/// cust receives codes as a Rust enum, in which a value it does not list would be undefined behaviour; a newer driver's
/// codes become `CUDA_ERROR_UNKNOWN`. [`last_failure`] keeps the true one.
pub(crate) fn outcome(call: &'static str, code: u32) -> u32 {
    if code == 0 {
        return 0;
    }
    LAST.set(Some(Failure { call, code }));
    if is_in_cust_raw(code) { code } else { UNKNOWN }
}

/// The failure that this thread's driver calls met last.
pub(crate) fn last_failure() -> Option<Failure> {
    LAST.get()
}

/// Whether `cust_raw` 0.11's `CUresult` has a variant of this value.
fn is_in_cust_raw(code: u32) -> bool {
    matches!(
        code,
        0..=8 | 34 | 100..=102 | 200..=202 | 205..=224 | 300..=304 | 400 | 401 | 500 | 600 | 700..=705 | 708..=720
            | 800..=809 | 900..=911 | 999
    )
}
