//! How much parsing allocates, counted by the allocator of this test target.

use gamma_tests::write::{File, Val, texts};
use gpt_gamma::gguf::{Error, TensorType, parse};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, counting for each thread what it holds and the most it ever held.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

fn count(n_bytes: isize) {
    // Not there while a thread ends; nothing is measured then.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + n_bytes);
        let _ = MOST.try_with(|most| most.set(most.get().max(held.get())));
    });
}

// SAFETY: every call goes to `System` unchanged, which upholds the contract; counting touches no allocation.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's layout, of which it promises what `System` demands.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: `pointer` came from `System` with this layout, since all allocations here do.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, n_bytes: usize) -> *mut u8 {
        // Both are held while one is copied to the other.
        count(n_bytes as isize);
        // SAFETY: as above.
        let moved = unsafe { System.realloc(pointer, layout, n_bytes) };
        count(-(layout.size() as isize));
        moved
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The result of `parse` and the most bytes held at once for it.
fn measured(file: &[u8]) -> (Result<usize, Error>, usize) {
    let before = HELD.get();
    MOST.set(before);
    let result = parse(file);
    let most = (MOST.get() - before) as usize;
    (result.map(|directory| directory.tensors.len()), most)
}

#[test]
fn the_counting_allocator_counts() {
    let before = HELD.get();
    MOST.set(before);
    drop(std::hint::black_box(vec![1_u8; 12345]));
    assert_eq!((MOST.get() - before, HELD.get()), (12345, before));
}

#[test]
fn claims_that_the_file_does_not_keep_allocate_nothing_to_speak_of() {
    let array = |element: u32, length: u64| {
        let mut bytes = element.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        Val::Raw(9, bytes)
    };
    let huge = [1 << 20, 1 << 30, 1 << 40, 1 << 63, u64::MAX];
    for n in huge {
        for file in [
            File { n_keys: Some(n), ..File::new() },
            File { n_tensors: Some(n), ..File::new() },
            File::new().key("k", Val::Raw(8, n.to_le_bytes().to_vec())),
            File::new().key("k", array(0, n)),
            File::new().key("k", array(8, n)),
            File::new().key("k", array(10, n)),
            File::new().tensor_at("t", 0, &[n, n, n, n], 0),
        ] {
            let bytes = file.head();
            let (result, most) = measured(&bytes);
            assert!(result.is_err());
            assert!(most <= 4 * bytes.len(), "{most} bytes for a file of {}: {result:?}", bytes.len());
        }
    }
    // The same with a gigabyte behind it, which nobody touches, so that the claims are credible.
    for (n_keys, n_tensors) in [(1 << 26, 0), (0, 1 << 25), (65536, 0), (0, 65536)] {
        let mut bytes = File { n_keys: Some(n_keys), n_tensors: Some(n_tensors), ..File::new() }.head();
        let header = bytes.clone();
        bytes = vec![0; 1 << 30];
        bytes[..header.len()].copy_from_slice(&header);
        let (result, most) = measured(&bytes);
        assert!(result.is_err());
        assert!(most < 8 << 20, "{most} bytes: {result:?}");
    }
}

#[test]
fn the_densest_directory_takes_four_times_its_bytes_at_most() {
    // The shortest distinct names, the smallest values, one byte of data for each tensor.
    let names = (0..30_000_u32).map(|i| format!("{i:x}"));
    let file = names.clone().fold(File { alignment: 1, ..File::new() }, |file, name| file.key(name, Val::U8(0)));
    let file = file.key("general.alignment", Val::U32(1));
    let file = names.fold(file, |file, name| file.tensor(&name, TensorType::I8, &[]));
    let bytes = file.bytes();
    let (result, most) = measured(&bytes);
    assert_eq!(result, Ok(30_000));
    assert!(most <= 4 * bytes.len(), "{most} bytes for a directory of {}", bytes.len());
}

#[test]
fn a_vocabulary_is_copied_once() {
    let tokens: Vec<String> = (0..50_000).map(|i| format!("token{i}")).collect();
    let bytes = File::new().key("tokenizer.ggml.tokens", texts(tokens.iter().map(|token| &**token))).bytes();
    let (result, most) = measured(&bytes);
    assert_eq!(result, Ok(0));
    assert!(most <= bytes.len() + 256, "{most} bytes for a vocabulary of {}", bytes.len());
}

#[test]
fn the_directory_of_a_model_takes_less_than_its_file() {
    let bytes = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-gpt2-mxfp4.gguf")).unwrap();
    let (result, most) = measured(&bytes);
    assert_eq!(result, Ok(52));
    assert!(most < bytes.len() / 10, "{most} bytes for a file of {}", bytes.len());
}
