//! `gamma bench`. In the emulator: what it prints, not how fast that is.

use std::fs;

use crate::gamma::{Run, gamma};
use crate::model;
use crate::small::Small;
use gpt_gamma::gguf::{self, Strings, TensorType};
use serde_json::Value;

fn bench(args: &[&str]) -> Run {
    gamma(["bench", "--device", "cpu"].iter().chain(args))
}

/// With the smallest model, and tests that take no time.
fn quick(args: &[&str]) -> Run {
    let small = Small::default().write();
    let fixed = ["-m", small.to_str().unwrap(), "-p", "3", "-n", "2"];
    bench(&fixed.iter().chain(args).copied().collect::<Vec<_>>())
}

fn column<'a>(rows: &'a [Value], name: &str) -> Vec<&'a Value> {
    rows.iter().map(|row| row.get(name).unwrap_or_else(|| panic!("no {name} in {row}"))).collect()
}

fn json(run: Run) -> Vec<Value> {
    let mut lines = run.json();
    assert_eq!(lines.len(), 1, "one array");
    serde_json::from_value(lines.remove(0)).unwrap()
}

#[test]
fn the_table_has_a_line_per_test() {
    let text = quick(&["-d", "0,5", "-r", "2"]).text();
    let lines: Vec<Vec<&str>> =
        text.lines().map(|line| line.split('|').map(str::trim).filter(|cell| !cell.is_empty()).collect()).collect();
    assert_eq!(lines[0], ["model", "size", "params", "device", "PTX", "test", "t/s", "GB/s"]);
    let tests: Vec<&str> = lines[2..].iter().map(|line| line[5]).collect();
    assert_eq!(tests, ["pp3", "tg2", "pp3 @ d5", "tg2 @ d5"]);
    for line in &lines[2..] {
        assert!(line[3].starts_with("SIMT emulator on") && line[3].ends_with(", not a GPU"), "{line:?}");
        assert_eq!(line[4], "none");
        let (mean, deviation) = line[6].split_once(" ± ").unwrap();
        assert!(mean.parse::<f64>().unwrap() > 0.0 && deviation.parse::<f64>().is_ok(), "{line:?}");
        // What generation reads; a prompt reads for all its tokens at once.
        assert_eq!(line.len(), if line[5].starts_with("tg") { 8 } else { 7 }, "{line:?}");
    }
    // One run has no deviation, and the way to the first token is told on demand.
    let text = quick(&["-r", "1", "--load"]).text();
    assert!(!text.contains('±') && text.contains("\nfirst token after "), "{text}");
}

#[test]
fn json_has_the_numbers_and_every_sample() {
    let rows = json(quick(&["-d", "7", "-r", "3", "-o", "json", "-b", "2"]));
    assert_eq!(column(&rows, "test"), ["pp3 @ d7", "tg2 @ d7"]);
    assert_eq!(column(&rows, "n_prompt"), [3, 0]);
    assert_eq!(column(&rows, "n_gen"), [0, 2]);
    assert_eq!(column(&rows, "n_depth"), [7, 7]);
    for row in &rows {
        let samples: Vec<f64> = serde_json::from_value(row["samples_ts"].clone()).unwrap();
        let mean = samples.iter().sum::<f64>() / 3.0;
        let squares: f64 = samples.iter().map(|x| (x - mean).powi(2)).sum();
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let close = |name: &str, expected: f64| {
            let found = row[name].as_f64().unwrap();
            // Sums of three numbers in another order, and of their differences, which cancel.
            assert!((found - expected).abs() <= 1e-9 * mean, "{name}: {found}, expected {expected}");
        };
        close("avg_ts", mean);
        close("stddev_ts", (squares / 2.0).sqrt());
        close("median_ts", sorted[1]);
        assert_eq!((&row["tool"], &row["n_batch"], &row["repetitions"]), (&"gamma".into(), &2.into(), &3.into()));
        // The emulator has no memory bandwidth to take a share of.
        assert!(row["read_ceiling_gb_per_s"].is_null() && row["read_share"].is_null() && row["ptx"].is_null());
    }
}

#[test]
fn csv_has_a_header_and_a_line_per_test() {
    let text = quick(&["-r", "1", "-o", "csv"]).text();
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let header: Vec<String> = reader.headers().unwrap().iter().map(str::to_owned).collect();
    let at = |name: &str| header.iter().position(|column| column == name).unwrap_or_else(|| panic!("no {name}"));
    let rows: Vec<csv::StringRecord> = reader.records().map(Result::unwrap).collect();
    let tests: Vec<&str> = rows.iter().map(|row| &row[at("test")]).collect();
    assert_eq!(tests, ["pp3", "tg2"]);
    for row in &rows {
        assert!(row[at("avg_ts")].parse::<f64>().unwrap() > 0.0);
        assert_eq!((&row[at("tool")], &row[at("n_depth")], &row[at("stddev_ts")]), ("gamma", "0", ""));
        assert!(row[at("load_first_token_s")].parse::<f64>().unwrap() > 0.0);
    }
}

/// What a generated token reads, from the file alone: by the names of its tensors.
#[test]
fn bytes_of_a_token_are_those_of_the_weights_it_uses_and_the_keys_it_sees() {
    let path = model("tiny-gpt-oss-mxfp4.gguf");
    let file = gguf::parse(&fs::read(&path).unwrap()).unwrap();
    let size = |key: &str| file.metadata.required::<u32>(&format!("gpt-oss.{key}")).unwrap() as usize;
    let n_vocab = file.metadata.required::<Strings>("tokenizer.ggml.tokens").unwrap().count();
    let (n_expert, n_used) = (size("expert_count"), size("expert_used_count"));
    let mut expected = 0;
    for tensor in &file.tensors {
        let n_elements = tensor.n_elements() as usize;
        expected += match tensor.name.as_str() {
            "token_embd.weight" => tensor.n_bytes / n_vocab,
            name if name.contains("_exps.weight") => tensor.n_bytes / n_expert * n_used,
            name if name.contains("_exps.bias") => 4 * n_elements / n_expert * n_used,
            // Decoded to f32 when the model is loaded.
            name if name.contains("ffn_gate_inp") => 4 * n_elements,
            _ if tensor.ty == TensorType::F32 => 4 * n_elements,
            _ => tensor.n_bytes,
        };
    }
    // Three steps behind 200 keys see 201 to 203 in every other layer, and the window in the rest; f32: 4 bytes.
    let (n_layer, window) = (size("block_count"), size("attention.sliding_window"));
    assert!(window < 200 && n_layer % 2 == 0);
    let key = 2 * size("attention.head_count_kv") * size("attention.key_length") * 4;
    expected += n_layer / 2 * (202 + window) * key;

    let rows = json(bench(&["-m", &path, "-p", "0", "-n", "3", "-d", "200", "-r", "1", "--kv", "f32", "-o", "json"]));
    assert_eq!(column(&rows, "bytes_per_token"), [expected]);
    let row = &rows[0];
    let rate = row["avg_ts"].as_f64().unwrap() * expected as f64 / 1e9;
    assert!((row["gb_per_s"].as_f64().unwrap() / rate - 1.0).abs() < 1e-9);
}

#[test]
fn without_arguments_the_bundled_model_runs_a_short_test() {
    let rows = json(bench(&["-o", "json"]));
    assert_eq!(column(&rows, "test"), ["pp16", "tg8"]);
    assert_eq!(column(&rows, "model"), ["bundled model", "bundled model"]);
}

#[test]
fn senseless_arguments_are_refused() {
    for (args, told) in [
        (&["-p", "0", "-n", "0"][..], "-p and -n: 0 leaves no test"),
        (&["-p", "12,x"], "expected a whole number from 0"),
        (&["-p", "-1"], "expected a whole number from 0"),
        (&["-r", "0"], "expected a whole number from 1 to 1000"),
        (&["-b", "0"], "expected a whole number from 1"),
        (&["-o", "xml"], "possible values: md, json, csv"),
        (&["--gpu", "0"], "--device cpu runs in the emulator"),
    ] {
        let run = bench(args);
        assert!(run.code == 2 && run.stderr.contains(told), "{args:?}: {}", run.stderr);
    }
    let told = bench(&["-p", "16", "-d", "0,1020"]).refused();
    assert_eq!(told, "test pp16 @ d1020: takes 1036 tokens of context, the model was made for 1024");
}
