//! The driver's functions, one line each: every one cust 0.3.2 calls, then those this crate adds.
//!
//! Each line becomes a C function of that name, which is what the linker finds instead of `libcuda`. It looks the real
//! one up in `libcuda.so.1` at the first call and passes its arguments on unchanged. Signatures are those of `cuda.h`
//! as `cust_raw` 0.11 binds them, with enum arguments as `i32`, so that no value can be an invalid enum here.

use std::ffi::{CStr, c_char, c_void};
use std::sync::OnceLock;

use cust::sys::*;

use crate::driver;
use crate::launch::LaunchConfig;

macro_rules! forward {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?);)*) => {
        $(
            /// # Safety
            ///
            /// That of the driver function of the same name.
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C" fn $name($($argument: $type),*) -> u32 {
                type Signature = unsafe extern "C" fn($($type),*) -> u32;
                static FUNCTION: OnceLock<Result<Signature, u32>> = OnceLock::new();
                // SAFETY: `Signature` is the type `cuda.h` gives this name.
                let found = FUNCTION.get_or_init(|| unsafe { driver::resolve(stringify!($name)) });
                let code = match found {
                    // SAFETY: the caller keeps the driver function's contract.
                    Ok(function) => unsafe { function($($argument),*) },
                    Err(code) => *code,
                };
                driver::outcome(stringify!($name), code)
            }
        )*

        /// Every forwarded name, with a call of it whose arguments are all zero or null.
        #[cfg(test)]
        pub(crate) const CALLS_WITH_ZEROS: &[(&str, fn() -> u32)] = &[$(
            // SAFETY: zero is a valid integer, pointer and optional callback. Only called where there is no driver,
            // and then nothing looks at the arguments.
            (stringify!($name), || unsafe { $name($(std::mem::zeroed::<$type>()),*) }),
        )*];
    };
}

forward! {
    fn cuArray3DCreate_v2(handle: *mut CUarray, allocate_array: *const CUDA_ARRAY3D_DESCRIPTOR);
    fn cuArray3DGetDescriptor_v2(array_descriptor: *mut CUDA_ARRAY3D_DESCRIPTOR, array: CUarray);
    fn cuArrayDestroy(array: CUarray);
    fn cuCtxCreate_v2(context: *mut CUcontext, flags: u32, device: CUdevice);
    fn cuCtxDestroy_v2(context: CUcontext);
    fn cuCtxGetApiVersion(context: CUcontext, version: *mut u32);
    fn cuCtxGetCacheConfig(pconfig: *mut CUfunc_cache);
    fn cuCtxGetCurrent(context: *mut CUcontext);
    fn cuCtxGetDevice(device: *mut CUdevice);
    fn cuCtxGetFlags(flags: *mut u32);
    fn cuCtxGetLimit(pvalue: *mut usize, limit: i32);
    fn cuCtxGetSharedMemConfig(config: *mut CUsharedconfig);
    fn cuCtxGetStreamPriorityRange(least_priority: *mut i32, greatest_priority: *mut i32);
    fn cuCtxPopCurrent_v2(context: *mut CUcontext);
    fn cuCtxPushCurrent_v2(context: CUcontext);
    fn cuCtxSetCacheConfig(config: i32);
    fn cuCtxSetCurrent(context: CUcontext);
    fn cuCtxSetLimit(limit: i32, value: usize);
    fn cuCtxSetSharedMemConfig(config: i32);
    fn cuCtxSynchronize();
    fn cuDestroyExternalMemory(ext_mem: CUexternalMemory);
    fn cuDeviceGet(device: *mut CUdevice, ordinal: i32);
    fn cuDeviceGetAttribute(value: *mut i32, attribute: i32, device: CUdevice);
    fn cuDeviceGetCount(count: *mut i32);
    fn cuDeviceGetName(name: *mut c_char, len: i32, device: CUdevice);
    fn cuDevicePrimaryCtxRelease_v2(device: CUdevice);
    fn cuDevicePrimaryCtxReset_v2(device: CUdevice);
    fn cuDevicePrimaryCtxRetain(context: *mut CUcontext, device: CUdevice);
    fn cuDevicePrimaryCtxSetFlags_v2(device: CUdevice, flags: u32);
    fn cuDeviceTotalMem_v2(bytes: *mut usize, device: CUdevice);
    fn cuDriverGetVersion(driver_version: *mut i32);
    fn cuEventCreate(event: *mut CUevent, flags: u32);
    fn cuEventDestroy_v2(event: CUevent);
    fn cuEventElapsedTime(milliseconds: *mut f32, start: CUevent, end: CUevent);
    fn cuEventQuery(event: CUevent);
    fn cuEventRecord(event: CUevent, stream: CUstream);
    fn cuEventSynchronize(event: CUevent);
    fn cuExternalMemoryGetMappedBuffer(
        device: *mut CUdeviceptr, ext_mem: CUexternalMemory, buffer_desc: *const CUDA_EXTERNAL_MEMORY_BUFFER_DESC
    );
    fn cuFuncGetAttribute(value: *mut i32, attribute: i32, function: CUfunction);
    fn cuFuncSetCacheConfig(function: CUfunction, config: i32);
    fn cuFuncSetSharedMemConfig(function: CUfunction, config: i32);
    fn cuGraphAddKernelNode(
        graph_node: *mut CUgraphNode, graph: CUgraph, dependencies: *const CUgraphNode, num_dependencies: usize,
        node_params: *const CUDA_KERNEL_NODE_PARAMS
    );
    fn cuGraphCreate(graph: *mut CUgraph, flags: u32);
    fn cuGraphDebugDotPrint(graph: CUgraph, path: *const c_char, flags: u32);
    fn cuGraphDestroy(graph: CUgraph);
    fn cuGraphGetEdges(graph: CUgraph, from: *mut CUgraphNode, to: *mut CUgraphNode, num_edges: *mut usize);
    fn cuGraphGetNodes(graph: CUgraph, nodes: *mut CUgraphNode, num_nodes: *mut usize);
    fn cuGraphKernelNodeGetParams(node: CUgraphNode, node_params: *mut CUDA_KERNEL_NODE_PARAMS);
    fn cuGraphNodeGetType(node: CUgraphNode, kind: *mut CUgraphNodeType);
    fn cuImportExternalMemory(
        ext_mem_out: *mut CUexternalMemory, mem_handle_desc: *const CUDA_EXTERNAL_MEMORY_HANDLE_DESC
    );
    fn cuInit(flags: u32);
    fn cuLaunchHostFunc(stream: CUstream, callback: CUhostFn, user_data: *mut c_void);
    fn cuLaunchKernel(
        function: CUfunction, grid_dim_x: u32, grid_dim_y: u32, grid_dim_z: u32, block_dim_x: u32, block_dim_y: u32,
        block_dim_z: u32, shared_mem_bytes: u32, stream: CUstream, kernel_params: *mut *mut c_void,
        extra: *mut *mut c_void
    );
    fn cuLinkAddData_v2(
        state: CUlinkState, kind: i32, data: *mut c_void, size: usize, name: *const c_char, num_options: u32,
        options: *mut CUjit_option, option_values: *mut *mut c_void
    );
    fn cuLinkComplete(state: CUlinkState, cubin_out: *mut *mut c_void, size_out: *mut usize);
    fn cuLinkCreate_v2(
        num_options: u32, options: *mut CUjit_option, option_values: *mut *mut c_void, state_out: *mut CUlinkState
    );
    fn cuLinkDestroy(state: CUlinkState);
    fn cuMemAdvise(device: CUdeviceptr, count: usize, advice: i32, device_out: CUdevice);
    fn cuMemAllocAsync(device: *mut CUdeviceptr, bytes: usize, stream: CUstream);
    fn cuMemAllocHost_v2(host: *mut *mut c_void, bytes: usize);
    fn cuMemAllocManaged(device: *mut CUdeviceptr, bytes: usize, flags: u32);
    fn cuMemAlloc_v2(device: *mut CUdeviceptr, bytes: usize);
    fn cuMemFreeAsync(device: CUdeviceptr, stream: CUstream);
    fn cuMemFreeHost(host: *mut c_void);
    fn cuMemFree_v2(device: CUdeviceptr);
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    fn cuMemPrefetchAsync(device: CUdeviceptr, count: usize, dst_device: CUdevice, stream: CUstream);
    fn cuMemcpy2D_v2(copy: *const CUDA_MEMCPY2D);
    fn cuMemcpyAtoH_v2(dst_host: *mut c_void, src_array: CUarray, src_offset: usize, bytes: usize);
    fn cuMemcpyDtoDAsync_v2(dst_device: CUdeviceptr, src_device: CUdeviceptr, bytes: usize, stream: CUstream);
    fn cuMemcpyDtoD_v2(dst_device: CUdeviceptr, src_device: CUdeviceptr, bytes: usize);
    fn cuMemcpyDtoHAsync_v2(dst_host: *mut c_void, src_device: CUdeviceptr, bytes: usize, stream: CUstream);
    fn cuMemcpyDtoH_v2(dst_host: *mut c_void, src_device: CUdeviceptr, bytes: usize);
    fn cuMemcpyHtoA_v2(dst_array: CUarray, dst_offset: usize, src_host: *const c_void, bytes: usize);
    fn cuMemcpyHtoDAsync_v2(dst_device: CUdeviceptr, src_host: *const c_void, bytes: usize, stream: CUstream);
    fn cuMemcpyHtoD_v2(dst_device: CUdeviceptr, src_host: *const c_void, bytes: usize);
    fn cuMemsetD16Async(dst_device: CUdeviceptr, value: u16, count: usize, stream: CUstream);
    fn cuMemsetD16_v2(dst_device: CUdeviceptr, value: u16, count: usize);
    fn cuMemsetD32Async(dst_device: CUdeviceptr, value: u32, count: usize, stream: CUstream);
    fn cuMemsetD32_v2(dst_device: CUdeviceptr, value: u32, count: usize);
    fn cuMemsetD8Async(dst_device: CUdeviceptr, value: u8, count: usize, stream: CUstream);
    fn cuMemsetD8_v2(dst_device: CUdeviceptr, value: u8, count: usize);
    fn cuModuleGetFunction(function: *mut CUfunction, module: CUmodule, name: *const c_char);
    fn cuModuleGetGlobal_v2(device: *mut CUdeviceptr, bytes: *mut usize, module: CUmodule, name: *const c_char);
    fn cuModuleLoad(module: *mut CUmodule, path: *const c_char);
    fn cuModuleLoadData(module: *mut CUmodule, image: *const c_void);
    fn cuModuleLoadDataEx(
        module: *mut CUmodule, image: *const c_void, num_options: u32, options: *mut CUjit_option,
        option_values: *mut *mut c_void
    );
    fn cuModuleUnload(module: CUmodule);
    fn cuOccupancyAvailableDynamicSMemPerBlock(
        dynamic_smem_size: *mut usize, function: CUfunction, num_blocks: i32, block_size: i32
    );
    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        num_blocks: *mut i32, function: CUfunction, block_size: i32, dynamic_smem_size: usize
    );
    fn cuOccupancyMaxPotentialBlockSize(
        min_grid_size: *mut i32, block_size: *mut i32, function: CUfunction,
        block_size_to_dynamic_smem_size: CUoccupancyB2DSize, dynamic_smem_size: usize, block_size_limit: i32
    );
    fn cuStreamCreateWithPriority(stream: *mut CUstream, flags: u32, priority: i32);
    fn cuStreamDestroy_v2(stream: CUstream);
    fn cuStreamGetFlags(stream: CUstream, flags: *mut u32);
    fn cuStreamGetPriority(stream: CUstream, priority: *mut i32);
    fn cuStreamSynchronize(stream: CUstream);
    fn cuStreamWaitEvent(stream: CUstream, event: CUevent, flags: u32);
    fn cuSurfObjectCreate(surf_object: *mut CUsurfObject, res_desc: *const CUDA_RESOURCE_DESC);
    fn cuSurfObjectDestroy(surf_object: CUsurfObject);
    fn cuSurfObjectGetResourceDesc(res_desc: *mut CUDA_RESOURCE_DESC, surf_object: CUsurfObject);
    fn cuTexObjectCreate(
        tex_object: *mut CUtexObject, res_desc: *const CUDA_RESOURCE_DESC, tex_desc: *const CUDA_TEXTURE_DESC,
        res_view_desc: *const CUDA_RESOURCE_VIEW_DESC
    );
    fn cuTexObjectDestroy(tex_object: CUtexObject);
    fn cuTexObjectGetResourceDesc(res_desc: *mut CUDA_RESOURCE_DESC, tex_object: CUtexObject);
    fn cuTexObjectGetResourceViewDesc(res_view_desc: *mut CUDA_RESOURCE_VIEW_DESC, tex_object: CUtexObject);

    fn cuStreamBeginCapture_v2(stream: CUstream, mode: i32);
    fn cuStreamEndCapture(stream: CUstream, graph: *mut CUgraph);
    fn cuGraphInstantiateWithFlags(graph_exec: *mut CUgraphExec, graph: CUgraph, flags: u64);
    fn cuGraphLaunch(graph_exec: CUgraphExec, stream: CUstream);
    fn cuGraphExecDestroy(graph_exec: CUgraphExec);
    fn cuFuncSetAttribute(function: CUfunction, attribute: i32, value: i32);
    fn cuLaunchKernelEx(
        config: *const LaunchConfig, function: CUfunction, kernel_params: *mut *mut c_void, extra: *mut *mut c_void
    );
}

/// The driver's text for `error`, and our own where there is no driver or it has none: cust's `Display` panics without.
///
/// # Safety
///
/// `text` is valid for a write.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorString(error: u32, text: *mut *const c_char) -> u32 {
    type Signature = unsafe extern "C" fn(u32, *mut *const c_char) -> u32;
    static FUNCTION: OnceLock<Result<Signature, u32>> = OnceLock::new();
    // SAFETY: the type `cuda.h` gives this name; the caller's pointer is passed on.
    unsafe {
        let found = FUNCTION.get_or_init(|| driver::resolve("cuGetErrorString"));
        if !found.is_ok_and(|function| function(error, text) == 0) {
            *text = match error {
                driver::NO_DEVICE => c"no CUDA-capable device is detected".as_ptr(),
                driver::NOT_SUPPORTED => c"the driver lacks this function".as_ptr(),
                _ => c"unrecognized error code".as_ptr(),
            };
        }
    }
    0
}

/// The driver's name of `error`, as `CUDA_ERROR_NO_DEVICE`.
pub(crate) fn error_name(error: u32) -> &'static str {
    type Signature = unsafe extern "C" fn(u32, *mut *const c_char) -> u32;
    static FUNCTION: OnceLock<Result<Signature, u32>> = OnceLock::new();
    let mut name: *const c_char = std::ptr::null();
    // SAFETY: the type `cuda.h` gives this name, and `name` outlives the call. What it writes is a string constant of
    // the driver, which is never unloaded.
    let text = unsafe {
        let found = FUNCTION.get_or_init(|| driver::resolve("cuGetErrorName"));
        match found {
            Ok(function) if function(error, &mut name) == 0 && !name.is_null() => CStr::from_ptr(name).to_str().ok(),
            _ => None,
        }
    };
    text.unwrap_or(match error {
        driver::NO_DEVICE => "CUDA_ERROR_NO_DEVICE",
        driver::NOT_SUPPORTED => "CUDA_ERROR_NOT_SUPPORTED",
        _ => "unrecognized error code",
    })
}
