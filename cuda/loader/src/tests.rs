//! What a program meets on a machine without a driver, whether or not this one has one.

use std::process::Command;

use cust::CudaFlags;
use cust::device::Device;
use cust::error::CudaError;
use cust::memory::DeviceBuffer;

use super::*;

#[test]
fn cust_reports_no_device() {
    without_driver("cust_reports_no_device", || {
        assert_eq!(cust::init(CudaFlags::empty()), Err(CudaError::NoDevice));
        assert_eq!(Device::num_devices(), Err(CudaError::NoDevice));
        assert_eq!(DeviceBuffer::from_slice(&[1.0_f32]).err(), Some(CudaError::NoDevice));
    });
}

#[test]
fn every_forwarded_function_returns_no_device() {
    without_driver("every_forwarded_function_returns_no_device", || {
        for (name, call) in symbols::CALLS_WITH_ZEROS {
            assert_eq!(call(), driver::NO_DEVICE, "{name}");
            assert_eq!(driver::last_failure().map(|failure| failure.call), Some(*name));
        }
    });
}

#[test]
fn availability_gives_the_loader_s_reason() {
    without_driver("availability_gives_the_loader_s_reason", || {
        let Err(Unavailable::NoLibrary { loader }) = availability() else {
            panic!("found {:?}", availability());
        };
        assert!(loader.contains("libcuda.so.1"), "{loader}");
    });
}

#[test]
fn errors_name_the_call_and_the_code() {
    without_driver("errors_name_the_call_and_the_code", || {
        let error = memory_info().expect_err("there is no driver");
        assert_eq!(error, Error::Call { call: "cuMemGetInfo_v2", code: 100 });
        assert_eq!(error.to_string(), "cuMemGetInfo_v2: CUDA_ERROR_NO_DEVICE (100)");
        let error = Error::from(Device::num_devices().expect_err("there is no driver"));
        assert_eq!(error, Error::Call { call: "cuDeviceGetCount", code: 100 });
    });
}

#[test]
fn cust_s_errors_can_be_printed() {
    without_driver("cust_s_errors_can_be_printed", || {
        assert_eq!(CudaError::NoDevice.to_string(), "\"no CUDA-capable device is detected\"");
        assert_eq!(CudaError::LaunchFailed.to_string(), "\"unrecognized error code\"");
    });
}

#[test]
fn codes_that_cust_does_not_list_become_unknown() {
    assert_eq!(driver::outcome("cuInit", 222), 222);
    assert_eq!(driver::outcome("cuGraphLaunch", 912), 999);
    let error = Error::from(CudaError::UnknownError);
    assert_eq!(error, Error::Call { call: "cuGraphLaunch", code: 912 });
}

/// Runs `body` in a process of its own, in which loading `libcuda.so.1` fails: the test `name` starts itself again.
#[track_caller]
fn without_driver(name: &str, body: fn()) {
    const CHILD: &str = "CUDA_LOADER_TEST_CHILD";
    if std::env::var_os(CHILD).is_some() {
        return body();
    }
    // A file of that name which is no library: the loader looks here first, and stops at what it cannot read.
    let folder = std::env::temp_dir().join(format!("cuda_loader-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("the temporary folder is writable");
    std::fs::write(folder.join("libcuda.so.1"), "not a library\n".repeat(64)).expect("it still is");
    let program = std::env::current_exe().expect("a running program has a path");
    let output = Command::new(program)
        .args(["--exact", &format!("tests::{name}"), "--nocapture"])
        .env(CHILD, "1")
        .env("LD_LIBRARY_PATH", &folder)
        .output()
        .expect("this program starts");
    std::fs::remove_dir_all(&folder).expect("this test made it");
    let text = String::from_utf8_lossy(&output.stdout);
    let ran = output.status.success() && text.contains("1 passed");
    assert!(ran, "{text}{}", String::from_utf8_lossy(&output.stderr));
}
