//! Records the work of a stream once and replays it as one launch.
//!
//! While a stream is captured its launches and asynchronous copies are recorded, not run. What synchronizes (a blocking
//! copy, an allocation, waiting for the stream) must not happen in between: the driver then fails the capture.

use std::ptr;

use cust::stream::Stream;
use cust::sys::{CUgraph, CUgraphExec};

use crate::{Error, check, symbols};

/// Which calls of other kinds make a capture fail while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum CaptureMode {
    /// Unsafe calls of any thread.
    Global = 0,
    /// Unsafe calls of this thread only.
    ThreadLocal = 1,
    /// None.
    Relaxed = 2,
}

/// Records what `record` puts into `stream`.
///
/// The stream leaves capture also when `record` fails or panics.
///
/// # Errors
///
/// What `record` returns, or [`Error::Call`] if the driver cannot start the capture or something made it invalid.
pub fn capture<E: From<Error>>(
    stream: &Stream,
    mode: CaptureMode,
    record: impl FnOnce() -> Result<(), E>,
) -> Result<Graph, E> {
    let capture = Capture::begin(stream, mode)?;
    record()?;
    Ok(capture.end()?)
}

/// A stream that is being recorded. Dropping it ends the capture and throws the record away.
#[derive(Debug)]
pub struct Capture<'stream> {
    stream: &'stream Stream,
}

impl<'stream> Capture<'stream> {
    /// Starts recording what is put into `stream`.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] if the stream is being captured already.
    pub fn begin(stream: &'stream Stream, mode: CaptureMode) -> Result<Self, Error> {
        // SAFETY: the stream is alive, the mode one of the driver's.
        check(unsafe { symbols::cuStreamBeginCapture_v2(stream.as_inner(), mode as i32) })?;
        Ok(Self { stream })
    }

    /// Ends recording.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] if a call in between made the capture invalid.
    pub fn end(self) -> Result<Graph, Error> {
        let stream = self.stream;
        std::mem::forget(self); // It would end the capture a second time.
        end(stream)
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        // A failure here follows one that the caller has already seen.
        drop(end(self.stream));
    }
}

fn end(stream: &Stream) -> Result<Graph, Error> {
    let mut raw = ptr::null_mut();
    // SAFETY: the stream is alive and `raw` outlives the call.
    check(unsafe { symbols::cuStreamEndCapture(stream.as_inner(), &mut raw) })?;
    Ok(Graph { raw })
}

/// Recorded work: nodes and their order.
#[derive(Debug)]
pub struct Graph {
    raw: CUgraph,
}

// SAFETY: a graph belongs to no thread; the driver asks only that two do not use it at once, and it is not `Sync`.
unsafe impl Send for Graph {}

impl Graph {
    /// How many launches, copies and fills were recorded.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] if an earlier asynchronous call failed.
    pub fn node_count(&self) -> Result<usize, Error> {
        let mut count = 0;
        // SAFETY: a null array asks for the count alone, which is written to `count`.
        check(unsafe { symbols::cuGraphGetNodes(self.raw, ptr::null_mut(), &mut count) })?;
        Ok(count)
    }

    /// Makes the record launchable. The graph may be dropped afterwards.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] if the record cannot be launched on this device or memory runs out.
    pub fn instantiate(&self) -> Result<GraphExec, Error> {
        let mut raw = ptr::null_mut();
        // SAFETY: the graph is alive and `raw` outlives the call.
        check(unsafe { symbols::cuGraphInstantiateWithFlags(&mut raw, self.raw, 0) })?;
        Ok(GraphExec { raw })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: the handle is this value's own and not used again. A failure cannot be reported from here.
        unsafe { symbols::cuGraphDestroy(self.raw) };
    }
}

/// A record that can be launched any number of times.
#[derive(Debug)]
pub struct GraphExec {
    raw: CUgraphExec,
}

// SAFETY: as for `Graph`.
unsafe impl Send for GraphExec {}

impl GraphExec {
    /// Runs everything recorded, in `stream`, without waiting.
    ///
    /// # Errors
    ///
    /// [`Error::Call`] if the launch or an earlier asynchronous call failed.
    ///
    /// # Safety
    ///
    /// Every buffer and module that the recorded work names is alive until `stream` is synchronized, and the contract
    /// of each recorded launch holds again now.
    pub unsafe fn launch(&self, stream: &Stream) -> Result<(), Error> {
        // SAFETY: both handles are alive; the caller vouches for what the record touches.
        check(unsafe { symbols::cuGraphLaunch(self.raw, stream.as_inner()) })
    }
}

impl Drop for GraphExec {
    fn drop(&mut self) {
        // SAFETY: the handle is this value's own and not used again; the driver waits for a launch still running.
        unsafe { symbols::cuGraphExecDestroy(self.raw) };
    }
}
