//! What a card reaches at best, so that an owner of another one knows what to expect: bytes read per second by how many are
//! on their way, and the time between two nodes of a graph.

#![allow(missing_docs, clippy::unwrap_used, reason = "a program that panics where it fails")]

use criterion::Throughput;
use cuda_std::{LaunchError, Launcher};
use gamma_benches::{Case, Gpu, Rotating, Suite};
use gamma_tests::bytes;
use gpt_gamma::device::{StreamShape, stream_read};
use kernels::probe;

/// Of a layer's query, key and value weights, of four of its experts, of a large dense layer, of an output head: gpt-oss-20b
/// and what lies between.
const MEGABYTES: [usize; 4] = [16, 35, 128, 615];
/// Loads of a thread, threads of a block, blocks of a multiprocessor.
const SHAPES: [(u32, u32, u32); 9] = [
    (4, 128, 1),
    (8, 128, 1),
    (4, 512, 1),
    (8, 512, 1),
    (16, 512, 1),
    (4, 512, 2),
    (8, 256, 2),
    (4, 256, 4),
    (4, 512, 4),
];

fn main() {
    gamma_benches::run(|suite| {
        for megabytes in MEGABYTES {
            for (depth, threads, blocks_per_sm) in SHAPES {
                bench_stream(suite, megabytes, depth, threads, blocks_per_sm);
            }
        }
        bench_nodes(suite, "programmatic");
        suite.without_programmatic_launches(|suite| bench_nodes(suite, "plain"));
    });
}

struct Streamed {
    shape: StreamShape,
    expected: u32,
    data: Rotating<u32>,
    sums: Rotating<u32>,
}

/// Sums of words are exact.
const EXACT: f64 = 0.0;

fn bench_stream(suite: &mut Suite, megabytes: usize, depth: u32, threads: u32, blocks_per_sm: u32) {
    let n_words = megabytes * 1_000_000 / 16 * 4;
    let in_flight = 16 * depth * threads * blocks_per_sm / 1024;
    let shape = format!("{megabytes}MB/{in_flight}KB_{depth}x{threads}x{blocks_per_sm}");
    suite.ceiling("stream_read", &shape, Some(Throughput::Bytes(4 * n_words as u64)), EXACT, |gpu| {
        let n_turns = gpu.n_turns(4 * n_words);
        let random = bytes(1, 4 * 1_048_573);
        let words = random.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap()));
        let data: Vec<u32> = words.cycle().take(n_words).collect();
        let shape = StreamShape { depth, threads, n_blocks: blocks_per_sm * gpu.cuda.n_sm() };
        Streamed {
            shape,
            expected: data.iter().fold(0, |sum, &word| sum.wrapping_add(word)),
            data: Rotating::copies(gpu, n_turns, &data),
            sums: Rotating::poisoned(gpu, 1, shape.n_threads()),
        }
    });
}

impl Case for Streamed {
    fn n_turns(&self) -> usize {
        self.data.n_turns()
    }

    fn launch(&self, launcher: &dyn Launcher, turn: usize) -> Result<(), LaunchError> {
        stream_read(launcher, self.shape, self.sums.at(0), self.data.at(turn))
    }

    /// 0 if every word was read once, else 1.
    fn error(&self, _turn: usize) -> f64 {
        let sum = self.sums.read(0).iter().fold(0_u32, |sum, &part| sum.wrapping_add(part));
        if sum == self.expected { 0.0 } else { 1.0 }
    }
}

/// A kernel that does nothing, many times in a graph.
struct Empty {
    threads: u32,
    n_blocks: u32,
}

fn bench_nodes(suite: &mut Suite, edges: &str) {
    for threads in [32, 512] {
        suite.ceiling(&format!("node/{edges}"), &format!("{threads}_threads"), None, EXACT, |gpu: &Gpu| Empty {
            threads,
            n_blocks: gpu.cuda.n_sm(),
        });
    }
}

impl Case for Empty {
    /// Nodes of the graph: so many that starting it does not count.
    fn n_turns(&self) -> usize {
        1024
    }

    fn launch(&self, launcher: &dyn Launcher, _turn: usize) -> Result<(), LaunchError> {
        // SAFETY: it takes nothing and does nothing.
        unsafe { probe::empty::run(launcher, probe::launch(self.n_blocks, self.threads)) }
    }

    fn error(&self, _turn: usize) -> f64 {
        0.0
    }
}
