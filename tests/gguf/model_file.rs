//! Files to models: single files, shards, and all that is no model.

use gamma_tests::write::{File, Val, text};
use gpt_gamma::gguf::{self, ShardName, Split, TensorType, decode};
use gpt_gamma::model_file::{Error, ModelFile};
use std::error::Error as _;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder for temporary files")
}

fn write(folder: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, bytes).expect("the folder is ours");
    path
}

fn small() -> File {
    File::new().key("general.architecture", text("gpt2")).tensor("a", TensorType::F32, &[8])
}

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models").join(name)
}

#[test]
fn the_bundled_models_open() {
    for (name, n_tensors, ty) in [
        ("tiny-gpt2-f16.gguf", 52, TensorType::F16),
        ("tiny-gpt2-q4_k_m.gguf", 52, TensorType::Q6_K),
        ("tiny-gpt2-mxfp4.gguf", 52, TensorType::MXFP4),
        ("tiny-gpt-oss-mxfp4.gguf", 79, TensorType::Q8_0),
    ] {
        let path = model(name);
        let file = ModelFile::open(&path).unwrap();
        assert_eq!((file.tensors().len(), file.n_shards()), (n_tensors, 1));
        assert_eq!(file.n_bytes() as u64, fs::metadata(&path).unwrap().len());
        let idx = file.tensors().iter().position(|tensor| tensor.name == "token_embd.weight").unwrap();
        let embedding = &file.tensors()[idx];
        assert_eq!((embedding.ty, embedding.shape()), (ty, &[256, 2048][..]));
        let values = decode(ty, file.tensor_data(idx)).unwrap();
        assert!(values.len() == 256 * 2048 && values.iter().all(|x| x.abs() < 100.0), "{name}");
    }
}

#[test]
fn the_quantized_models_decode_to_the_model_they_were_made_from() {
    // Norms are not quantized, weights lose what reference.md 7.2 says: 12 % (MXFP4) at most.
    let exact = ModelFile::open(model("tiny-gpt2-f16.gguf")).unwrap();
    for name in ["tiny-gpt2-q4_k_m.gguf", "tiny-gpt2-mxfp4.gguf"] {
        let file = ModelFile::open(model(name)).unwrap();
        for (idx, tensor) in file.tensors().iter().enumerate() {
            let other = exact.tensors().iter().position(|other| other.name == tensor.name).unwrap();
            let found = decode(tensor.ty, file.tensor_data(idx)).unwrap();
            let expected = decode(exact.tensors()[other].ty, exact.tensor_data(other)).unwrap();
            let square = |x: f64| x * x;
            let error: f64 = found.iter().zip(&expected).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
            let norm: f64 = expected.iter().map(|&b| square(f64::from(b))).sum();
            // Twice the table's figure, since a trained matrix is no Gaussian; a wrong nibble order gives above 1.
            let limit = if tensor.ty == TensorType::F32 { 1.0e-3 } else { 0.24 };
            assert!(error.sqrt() <= limit * norm.sqrt(), "{name}, {}: {:.3}", tensor.name, (error / norm).sqrt());
        }
    }
}

#[test]
fn a_model_in_memory_is_a_model() {
    let bytes: &'static [u8] = Box::leak(small().bytes().into_boxed_slice());
    let file = ModelFile::from_static(bytes).unwrap();
    assert_eq!(file.metadata().required("general.architecture"), Ok("gpt2"));
    assert_eq!(file.tensor_data(0), &bytes[bytes.len() - 32..]);
    assert!(matches!(ModelFile::from_static(b""), Err(Error::Empty { .. })));
    assert!(matches!(ModelFile::from_static(b"GGU"), Err(Error::Gguf { .. })));
    for (no, shard) in shards(&[1, 1]).into_iter().enumerate() {
        match (no, ModelFile::from_static(Box::leak(shard.into_boxed_slice()))) {
            (0, Err(Error::ShardName { count: 2, .. })) | (1, Err(Error::NotFirstShard { no: 1, .. })) => {}
            (_, other) => panic!("{other:?}"),
        }
    }
}

#[test]
fn each_thing_that_is_no_model_has_its_own_error() {
    let folder = folder();
    let open = |name: &str| ModelFile::open(folder.path().join(name)).unwrap_err();
    write(&folder, "empty.gguf", b"");
    write(&folder, "text.gguf", b"not a model, but long enough");
    let bytes = small().bytes();
    write(&folder, "head.gguf", &bytes[..10]);
    write(&folder, "tail.gguf", &bytes[..bytes.len() - 1]);

    assert!(matches!(open("absent.gguf"), Error::NotFound { .. }));
    assert!(matches!(open(""), Error::IsDirectory { .. }));
    assert!(matches!(open("empty.gguf"), Error::Empty { .. }));
    assert!(matches!(open("text.gguf"), Error::Gguf { source: gguf::Error::BadMagic { .. }, .. }));
    assert!(matches!(open("head.gguf"), Error::Gguf { source: gguf::Error::Truncated { .. }, .. }));
    assert!(matches!(open("tail.gguf"), Error::Gguf { source: gguf::Error::TensorTruncated { .. }, .. }));
    assert!(matches!(open("empty.gguf/x"), Error::Io { .. }));
    #[cfg(unix)]
    assert!(matches!(ModelFile::open("/dev/null"), Err(Error::NotRegular { .. })));

    // The message names the file, the source the fact, and neither repeats the other.
    let error = open("head.gguf");
    assert!(error.to_string().ends_with("head.gguf"), "{error}");
    let source = error.source().unwrap().to_string();
    assert_eq!(source, "file ends inside tensor count: 8 bytes needed at offset 8, 2 left");
}

/// Shards that hold as many tensors as told, `t0`, `t1`, … in order, with the keys llama.cpp writes.
fn shard_files(n_tensors: &[usize]) -> Vec<File> {
    let mut names = (0..).map(|i| format!("t{i}"));
    let total: usize = n_tensors.iter().sum();
    let shard = |(no, &n): (usize, &usize)| {
        let file = File::new()
            .key("split.no", Val::U16(no as u16))
            .key("split.count", Val::U16(n_tensors.len() as u16))
            .key("split.tensors.count", Val::I32(total as i32));
        let file = if no == 0 { file.key("general.architecture", text("gpt2")) } else { file };
        names.by_ref().take(n).fold(file, |file, name| file.tensor(&name, TensorType::F32, &[8 + no as u64]))
    };
    n_tensors.iter().enumerate().map(shard).collect()
}

fn shards(n_tensors: &[usize]) -> Vec<Vec<u8>> {
    shard_files(n_tensors).iter().map(File::bytes).collect()
}

fn write_shards(folder: &TempDir, shards: &[Vec<u8>]) -> Vec<PathBuf> {
    let count = shards.len();
    let name = |no| ShardName { prefix: "model-of-mine", no, count }.to_string();
    shards.iter().enumerate().map(|(no, bytes)| write(folder, &name(no), bytes)).collect()
}

#[test]
fn shards_are_found_by_name_and_read_as_one() {
    // The first shard may hold metadata only; later ones may use another alignment.
    let folder = folder();
    let mut files = shard_files(&[0, 2, 1]);
    files[1] = File { alignment: 64, ..files[1].clone() }.key("general.alignment", Val::U32(64));
    let bytes: Vec<_> = files.iter().map(File::bytes).collect();
    let paths = write_shards(&folder, &bytes);
    let file = ModelFile::open(&paths[0]).unwrap();

    assert_eq!((file.n_shards(), file.path()), (3, &*paths[0]));
    assert_eq!(file.n_bytes(), bytes.iter().map(Vec::len).sum::<usize>());
    assert_eq!(file.metadata().required("general.architecture"), Ok("gpt2"));
    let names: Vec<_> = file.tensors().iter().map(|tensor| &*tensor.name).collect();
    assert_eq!(names, ["t0", "t1", "t2"]);
    assert_eq!(file.tensor_data(0), &bytes[1][bytes[1].len() - 36 - 64..][..36]);
    assert_eq!(file.tensor_data(1), &bytes[1][bytes[1].len() - 36..]);
    assert_eq!(file.tensor_data(2), &bytes[2][bytes[2].len() - 40..]);
}

#[test]
fn a_later_shard_is_refused_by_the_name_of_the_first() {
    let folder = folder();
    let paths = write_shards(&folder, &shards(&[1, 1]));
    let error = ModelFile::open(&paths[1]).unwrap_err();
    assert!(matches!(&error, Error::NotFirstShard { no: 1, count: 2, first: Some(first), .. }
        if first == "model-of-mine-00001-of-00002.gguf"));
    assert!(error.to_string().ends_with(": is shard 2 of 2; open the first one, model-of-mine-00001-of-00002.gguf"));
    fs::rename(&paths[1], folder.path().join("renamed.gguf")).unwrap();
    let error = ModelFile::open(folder.path().join("renamed.gguf")).unwrap_err();
    assert!(matches!(error, Error::NotFirstShard { first: None, .. }));
}

#[test]
fn a_missing_shard_is_named() {
    let folder = folder();
    let paths = write_shards(&folder, &shards(&[1, 1, 1]));
    fs::remove_file(&paths[2]).unwrap();
    let error = ModelFile::open(&paths[0]).unwrap_err();
    assert!(matches!(&error, Error::MissingShard { path, no: 2, count: 3 } if *path == paths[2]));
    assert!(error.to_string().ends_with("model-of-mine-00003-of-00003.gguf: shard 3 of 3 is missing"), "{error}");
}

#[test]
fn a_first_shard_under_another_name_is_refused() {
    let folder = folder();
    for name in ["model.gguf", "model-00001-of-00003.gguf", "model-00002-of-00002.gguf", "model-1-of-2.gguf"] {
        let path = write(&folder, name, &shards(&[1, 1])[0]);
        assert!(matches!(ModelFile::open(path), Err(Error::ShardName { count: 2, .. })), "{name}");
    }
}

#[test]
fn shards_that_do_not_belong_together_are_refused() {
    let good = shards(&[1, 1, 1]);
    let open = |shards: &[Vec<u8>]| {
        let folder = folder();
        ModelFile::open(&write_shards(&folder, shards)[0]).map(|_| ()).unwrap_err()
    };
    let swapped = [good[0].clone(), good[2].clone(), good[1].clone()];
    let found = Split { no: 2, count: 3, n_tensors: 3 };
    assert!(matches!(open(&swapped), Error::WrongShard { no: 1, count: 3, found: Some(split), .. } if split == found));
    let error = open(&[good[0].clone(), small().bytes(), good[2].clone()]);
    assert!(error.to_string().ends_with(": says that it is no shard, expected shard 2 of 3"), "{error}");
    let foreign = shards(&[1, 1]);
    assert!(matches!(open(&[good[0].clone(), foreign[1].clone(), good[2].clone()]), Error::WrongShard { .. }));

    let mut files = shard_files(&[1, 1, 1]);
    files[2].tensors[0].name = b"t0".to_vec();
    let twice: Vec<_> = files.iter().map(File::bytes).collect();
    assert!(matches!(open(&twice), Error::DuplicateTensor { tensor, path } if tensor == "t0"
        && path.ends_with("model-of-mine-00003-of-00003.gguf")));
    files[2].tensors.clear();
    let fewer: Vec<_> = files.iter().map(File::bytes).collect();
    assert!(matches!(open(&fewer), Error::TensorCount { found: 2, expected: 3, .. }));
}

#[test]
fn split_keys_must_be_whole_and_sound() {
    let folder = folder();
    let name = "m-00001-of-00002.gguf";
    let path = write(&folder, name, &small().key("split.count", Val::U16(2)).bytes());
    assert!(matches!(ModelFile::open(&path), Err(Error::SplitKeys { .. })));
    let file = small()
        .key("split.no", Val::U16(0))
        .key("split.count", Val::U64(u64::MAX))
        .key("split.tensors.count", Val::I32(1));
    write(&folder, name, &file.bytes());
    assert!(matches!(ModelFile::open(&path), Err(Error::ShardName { .. })));
}

#[test]
fn names_of_shards_have_five_digits_from_one() {
    let name = "a-b-00002-of-00010.gguf";
    let parsed = ShardName::parse(name).unwrap();
    assert_eq!(parsed, ShardName { prefix: "a-b", no: 1, count: 10 });
    assert_eq!(parsed.to_string(), name);
    for name in ["a-00000-of-00002.gguf", "a-0001-of-0002.gguf", "a-+0001-of-00002.gguf", "a-00001-of-00002.bin", ""] {
        assert_eq!(ShardName::parse(name), None, "{name}");
    }
}
