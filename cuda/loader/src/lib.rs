//! Lets cust start where there is no CUDA driver, and adds what cust 0.3.2 lacks.
//!
//! `cust` links against `libcuda`, so a program that uses it does not even start on a machine without NVIDIA's driver.
//! This crate supplies those functions itself: each looks up its namesake in `libcuda.so.1` when it is first called.
//! Where there is no driver it returns `CUDA_ERROR_NO_DEVICE`, and where the driver is too old to have the function
//! `CUDA_ERROR_NOT_SUPPORTED`, so that cust reports an ordinary error.
//!
//! The linker still wants a file for `-lcuda`: `stub/lib64/libcuda.a` is an empty archive, and `.cargo/config.toml`
//! points cust's build script at it through `CUDA_LIBRARY_PATH`.
//!
//! A program gets these functions by naming this crate anywhere in its source: by calling it, by using cust as
//! [`cuda_loader::cust`](cust), or by `use cuda_loader as _;`. A dependency that only `Cargo.toml` names is not linked.
//!
//! It decides nothing: which device, which module and which launch are the caller's choice.

mod driver;
mod launch;
mod memory;
mod symbols;

pub mod graph;

pub use cust;
pub use launch::{
    FunctionAttributes, LaunchAttributes, function_attributes, launch_ex, module_from_ptx_with_log, prefer_shared,
    set_max_dynamic_shared,
};
pub use memory::{
    PinnedBuffer, copy_on_device_async, copy_to_device_async, copy_to_host_async, fill_async, memory_info,
};

use cust::device::Device;
use cust::error::CudaError;
use cust::sys::CUdevice_attribute;

/// The oldest driver API this crate's functions need, as `(major, minor)`: CUDA 11.4 brought
/// `cuGraphInstantiateWithFlags`.
pub const OLDEST_DRIVER: (u32, u32) = (11, 4);

/// Why a call of the driver failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message documents the variant")]
pub enum Error {
    #[error("{call}: {} ({code})", symbols::error_name(*code))]
    Call { call: &'static str, code: u32 },
    #[error("PTX was refused: {} ({code}): {log}", symbols::error_name(*code))]
    Ptx { code: u32, log: String },
    #[error("PTX has a zero byte at offset {offset}; expected text")]
    ZeroByteInPtx { offset: usize },
    #[error("{elements} elements of {element_bytes} bytes are more than an allocation can hold")]
    TooLarge { elements: usize, element_bytes: usize },
}

impl Error {
    /// The driver's `CUresult`, where the driver was asked at all.
    pub fn code(&self) -> Option<u32> {
        match self {
            Error::Call { code, .. } | Error::Ptx { code, .. } => Some(*code),
            Error::ZeroByteInPtx { .. } | Error::TooLarge { .. } => None,
        }
    }
}

/// Adds what cust's error lost: the call's name, and the code where cust only says `UnknownError`.
///
/// Convert on the thread that made the call, before it makes another.
impl From<CudaError> for Error {
    fn from(error: CudaError) -> Self {
        match driver::last_failure() {
            Some(failure) if failure.code == error as u32 || error == CudaError::UnknownError => {
                Error::Call { call: failure.call, code: failure.code }
            }
            _ => Error::Call { call: "cust", code: error as u32 },
        }
    }
}

/// Turns the return value of a forwarded function into a result.
fn check(returned: u32) -> Result<(), Error> {
    if returned == 0 {
        return Ok(());
    }
    let failure = driver::last_failure().expect("a forwarded function notes its failure before it returns");
    Err(Error::Call { call: failure.call, code: failure.code })
}

/// A driver that can be used: new enough, initialized, and with at least one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Driver {
    /// The CUDA version the driver implements, as `(major, minor)`.
    pub version: (u32, u32),
    /// How many devices it shows this process.
    pub devices: u32,
}

/// Why there is no usable driver, in the order in which it is found out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message documents the variant")]
pub enum Unavailable {
    #[error("no CUDA driver: {loader}")]
    NoLibrary { loader: String },
    #[error(
        "the CUDA driver is too old: it implements CUDA {}.{}, expected {}.{} or later",
        found.0, found.1, oldest.0, oldest.1
    )]
    TooOld { found: (u32, u32), oldest: (u32, u32) },
    #[error("the CUDA driver {}.{} sees no device", version.0, version.1)]
    NoDevice { version: (u32, u32) },
    #[error("the CUDA driver does not start")]
    Start(#[source] Error),
}

/// Whether CUDA can be used here; initializes the driver if so.
///
/// # Errors
///
/// - [`Unavailable::NoLibrary`] if `libcuda.so.1` cannot be loaded, with the loader's message.
/// - [`Unavailable::TooOld`] if the driver implements less than [`OLDEST_DRIVER`].
/// - [`Unavailable::NoDevice`] if the driver works and finds no device, or `CUDA_VISIBLE_DEVICES` hides them all.
/// - [`Unavailable::Start`] if it fails otherwise, as when the kernel module is of another version.
pub fn availability() -> Result<Driver, Unavailable> {
    driver::library().map_err(|loader| Unavailable::NoLibrary { loader: loader.to_owned() })?;
    let version = driver_version().map_err(Unavailable::Start)?;
    if version < OLDEST_DRIVER {
        return Err(Unavailable::TooOld { found: version, oldest: OLDEST_DRIVER });
    }
    let mut devices = 0;
    // SAFETY: cuInit takes no pointer; `devices` outlives the call that writes it.
    let started = unsafe { check(symbols::cuInit(0)).and_then(|()| check(symbols::cuDeviceGetCount(&mut devices))) };
    match started {
        Ok(()) if devices > 0 => Ok(Driver { version, devices: devices.unsigned_abs() }),
        Ok(()) => Err(Unavailable::NoDevice { version }),
        Err(Error::Call { code: driver::NO_DEVICE, .. }) => Err(Unavailable::NoDevice { version }),
        Err(error) => Err(Unavailable::Start(error)),
    }
}

/// The CUDA version the installed driver implements, as `(major, minor)`. Needs no initialization.
///
/// # Errors
///
/// [`Error::Call`] with `CUDA_ERROR_NO_DEVICE` where there is no driver.
pub fn driver_version() -> Result<(u32, u32), Error> {
    let mut version = 0;
    // SAFETY: `version` outlives the call.
    check(unsafe { symbols::cuDriverGetVersion(&mut version) })?;
    // 1000 · major + 10 · minor, says the driver API's reference.
    let version = version.unsigned_abs();
    Ok((version / 1000, version % 1000 / 10))
}

/// One attribute of `device`, by the driver's own number: cust lists those up to CUDA 9, which leaves out the shared
/// memory a kernel can ask for and cooperative launches.
///
/// # Errors
///
/// [`Error::Call`] if the driver does not know the attribute.
pub fn device_attribute(device: &Device, attribute: CUdevice_attribute) -> Result<i32, Error> {
    let mut value = 0;
    // SAFETY: `value` outlives the call.
    check(unsafe { symbols::cuDeviceGetAttribute(&mut value, attribute as i32, device.as_raw()) })?;
    Ok(value)
}

#[cfg(test)]
mod tests;
