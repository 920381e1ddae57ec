//! [`Graphs`]: lists of a step that were captured, to be replayed in one call.

use cudarc::driver::result as cuda;
use cudarc::driver::sys;

use super::device::Work;
use super::machine::failed;
use crate::Error;

/// Graphs that are kept: the lists that generation comes by, which differ in their rows and in the splits of their attention.
const MOST: usize = 256;

struct Graph {
    list: Vec<Work>,
    executable: sys::CUgraphExec,
    /// When it was last used.
    used: u64,
}

/// The graphs of one device, whose context is the thread's in every call.
#[derive(Default)]
pub(super) struct Graphs {
    kept: Vec<Graph>,
    /// Times that something was looked for: a clock.
    now: u64,
}

impl Graphs {
    /// The graph of an equal list.
    pub fn find(&mut self, list: &[Work]) -> Option<usize> {
        self.now += 1;
        self.kept.iter().position(|graph| graph.list == list)
    }

    /// Keeps a graph, in place of the one that was not used for longest where there are many.
    pub fn keep(&mut self, list: &[Work], executable: sys::CUgraphExec) -> Result<(), Error> {
        self.kept.push(Graph {
            list: list.to_vec(),
            executable,
            used: self.now,
        });
        if self.kept.len() <= MOST {
            return Ok(());
        }
        let oldest = (0..MOST).min_by_key(|&i| self.kept[i].used);
        self.remove(oldest.unwrap_or(0))
    }

    /// Destroys a graph; the driver keeps what still runs of it.
    pub fn remove(&mut self, index: usize) -> Result<(), Error> {
        let graph = self.kept.swap_remove(index);
        // SAFETY: a graph of ours that nobody will name again.
        unsafe { cuda::graph::exec_destroy(graph.executable) }
            .map_err(|error| failed("a graph", error))
    }

    /// Puts a graph on the stream.
    pub fn replay(&mut self, index: usize, stream: sys::CUstream) -> Result<(), Error> {
        let graph = &mut self.kept[index];
        graph.used = self.now;
        // SAFETY: a graph whose memory is alive: a list that names other memory is another list. Memory that was given back is named by no list
        // that is recorded now.
        unsafe { cuda::graph::launch(graph.executable, stream) }
            .map_err(|error| failed("replaying a step", error))
    }

    /// Destroys all of them. Nothing is left to be done about an error here.
    pub fn clear(&mut self) {
        while !self.kept.is_empty() {
            let _ = self.remove(0);
        }
    }
}

/// Captures what `issue` puts on the stream.
pub(super) fn capture(
    stream: sys::CUstream,
    issue: impl FnOnce() -> Result<(), Error>,
) -> Result<sys::CUgraphExec, Error> {
    let capturing = |error| failed("capturing a step", error);
    let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    // SAFETY: a stream that is alive; the capture ends below whatever happens.
    unsafe { cuda::stream::begin_capture(stream, mode) }.map_err(capturing)?;
    let issued = issue();
    // SAFETY: as above.
    let graph = unsafe { cuda::stream::end_capture(stream) };
    if let Err(error) = issued {
        // SAFETY: a graph that was just captured, in part.
        let _ = graph.map(|graph| unsafe { cuda::graph::destroy(graph) });
        return Err(error);
    }
    let graph = graph.map_err(capturing)?;
    // SAFETY: a graph that was just captured, and is not needed once there is an executable.
    unsafe {
        let executable = cuda::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
        cuda::graph::destroy(graph).map_err(capturing)?;
        executable.map_err(capturing)
    }
}
