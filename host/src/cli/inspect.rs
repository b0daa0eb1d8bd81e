//! `gamma inspect`: what is in a model file, and what this engine makes of it.

use std::borrow::Cow;

use gpt_gamma::adapter::{GptInferenceAdapter, InferenceAdapter};
use gpt_gamma::gguf::{Array, TensorInfo, TensorType, Value};
use gpt_gamma::model_file::ModelFile;
use gpt_gamma::tokenizer::Tokenizer;
use indicatif::BinaryBytes;
use serde_json::json;

use super::args::Inspect;
use super::error::{Error, escape, one_line};
use super::{Out, model};

/// How many elements of an array are shown.
const MOST_ELEMENTS: usize = 6;
/// How many characters of a text are shown.
const MOST_CHARACTERS: usize = 120;

/// Runs the command.
pub fn run(args: &Inspect) -> Result<(), Error> {
    let file = model::open(&args.model)?;
    let report = Report {
        adapter: model::describe(&file),
        tokenizer: model::tokenizer(&args.model, &file),
        types: types(file.tensors()),
        file: &file,
    };
    let mut out = Out::new();
    if args.json {
        out.json(&report.json())?
    } else {
        report.print(&mut out)?
    }
    out.flush()
}

struct Report<'a> {
    file: &'a ModelFile,
    adapter: Result<GptInferenceAdapter, Error>,
    tokenizer: Result<Tokenizer, Error>,
    /// Type, number of tensors, bytes; largest first.
    types: Vec<(TensorType, usize, u64)>,
}

fn types(tensors: &[TensorInfo]) -> Vec<(TensorType, usize, u64)> {
    let mut types: Vec<(TensorType, usize, u64)> = Vec::new();
    for tensor in tensors {
        let known = types.iter().position(|(ty, ..)| *ty == tensor.ty);
        let at = known.unwrap_or_else(|| {
            types.push((tensor.ty, 0, 0));
            types.len() - 1
        });
        types[at].1 += 1;
        types[at].2 += tensor.n_bytes as u64;
    }
    types.sort_by_key(|&(ty, _, n_bytes)| (std::cmp::Reverse(n_bytes), ty.id()));
    types
}

/// What was found out, without the name of the file, which stands above it.
fn reason(error: &Error) -> String {
    match error {
        Error::Adapter { source, .. } => one_line(source),
        Error::Vocabulary { source, .. } => one_line(source),
        Error::Tokenizer { source, .. } => one_line(source),
        Error::NoTensors { .. } => "vocabulary only: no tensors".to_owned(),
        other => one_line(other),
    }
}

impl Report<'_> {
    fn architecture(&self) -> Option<Cow<'_, str>> {
        match self.file.metadata().value("general.architecture") {
            Some(Value::String(name)) => Some(String::from_utf8_lossy(name)),
            _ => None,
        }
    }

    fn print(&self, out: &mut Out) -> Result<(), Error> {
        let file = self.file;
        let (size, shards) = (BinaryBytes(file.n_bytes() as u64), file.n_shards());
        let shards = if shards == 1 { String::new() } else { format!(" in {shards} files") };
        out.line(&format!("file          {}: {size}{shards}", escape(&model::name(file))))?;
        let verdict = match &self.adapter {
            Ok(adapter) => format!("runs: {}", sizes(adapter)),
            Err(Error::NoTensors { .. }) => "vocabulary only, no tensors".to_owned(),
            Err(error) => format!("does not run: {}", reason(error)),
        };
        let name = self.architecture().map_or("none".to_owned(), |name| escape(&name));
        out.line(&format!("architecture  {name}; {verdict}"))?;
        let tokenizer = match &self.tokenizer {
            Ok(tokenizer) => escape(&tokenizer.description()),
            Err(error) => format!("none that can be used: {}", reason(error)),
        };
        out.line(&format!("tokenizer     {tokenizer}"))?;

        let pairs = file.metadata();
        out.line(&format!("\nmetadata, {} keys", pairs.len()))?;
        let width = pairs.iter().map(|(key, _)| escape(key).chars().count()).max().unwrap_or(0);
        for (key, value) in pairs.iter() {
            out.line(&format!("  {:<width$}  {:<15}  {}", escape(key), value.kind().to_string(), shown(value)))?;
        }

        let tensors = file.tensors();
        out.line(&format!("\ntensors, {}", tensors.len()))?;
        let width = tensors.iter().map(|tensor| escape(&tensor.name).chars().count()).max().unwrap_or(0);
        for tensor in tensors {
            let shape: Vec<String> = tensor.shape().iter().map(u64::to_string).collect();
            let (name, shape) = (escape(&tensor.name), shape.join(" × "));
            out.line(&format!("  {name:<width$}  {:<7}  {shape:<20}  {:>12} bytes", tensor.ty, tensor.n_bytes))?;
        }

        let total: u64 = self.types.iter().map(|(.., n_bytes)| n_bytes).sum();
        out.line("\nby type")?;
        for &(ty, count, n_bytes) in &self.types {
            let remark = if ty.is_supported() { "" } else { "  not supported as a weight" };
            let size = BinaryBytes(n_bytes).to_string();
            out.line(&format!("  {ty:<7}  {count:>5} tensors  {size:>12}  {n_bytes:>15} bytes{remark}"))?;
        }
        let (count, size) = (tensors.len(), BinaryBytes(total).to_string());
        out.line(&format!("  {:<7}  {count:>5} tensors  {size:>12}  {total:>15} bytes", "total"))
    }

    fn json(&self) -> serde_json::Value {
        let metadata: Vec<_> = self.file.metadata().iter().map(|(key, value)| pair(key, value)).collect();
        let tensor = |tensor: &TensorInfo| json!({"name": tensor.name, "type": tensor.ty.name(), "shape": tensor.shape(), "bytes": tensor.n_bytes});
        let by_type = |&(ty, count, n_bytes): &(TensorType, usize, u64)| json!({"type": ty.name(), "tensors": count, "bytes": n_bytes, "supported": ty.is_supported()});
        json!({
            "file": model::name(self.file),
            "bytes": self.file.n_bytes(),
            "files": self.file.n_shards(),
            "architecture": self.architecture(),
            "runs": self.adapter.is_ok(),
            "reason": self.adapter.as_ref().err().map(reason),
            "tokenizer": self.tokenizer.as_ref().ok().map(Tokenizer::description),
            "tokenizer_reason": self.tokenizer.as_ref().err().map(reason),
            "metadata": metadata,
            "tensors": self.file.tensors().iter().map(tensor).collect::<Vec<_>>(),
            "types": self.types.iter().map(by_type).collect::<Vec<_>>(),
        })
    }
}

fn sizes(adapter: &GptInferenceAdapter) -> String {
    let spec = adapter.spec();
    format!(
        "{} layers, width {}, {} heads of {} over {} KV heads, feed-forward {}, vocabulary {}, context {}",
        spec.n_layer, spec.d_model, spec.n_head, spec.d_head, spec.n_head_kv, spec.d_ff, spec.n_vocab, spec.n_ctx
    )
}

/// A value on one line: long texts and arrays by their start and their length.
fn shown(value: &Value) -> String {
    match value {
        Value::String(bytes) => {
            let text = escape(&String::from_utf8_lossy(bytes));
            match text.char_indices().nth(MOST_CHARACTERS) {
                Some((at, _)) => format!("{}… ({} bytes)", &text[..at], bytes.len()),
                None => text,
            }
        }
        Value::Array(array) => {
            let first: Vec<String> = array.iter().take(MOST_ELEMENTS).map(|element| shown(&element)).collect();
            let more = if array.len() > MOST_ELEMENTS { ", …" } else { "" };
            format!("[{}{more}] ({})", first.join(", "), array.len())
        }
        scalar => scalar.to_string(),
    }
}

fn pair(key: &str, value: &Value) -> serde_json::Value {
    let kind = value.kind().to_string();
    match value {
        Value::Array(array) => json!({"key": key, "type": kind, "length": array.len(), "first": first(array)}),
        value => json!({"key": key, "type": kind, "value": scalar(value)}),
    }
}

fn first(array: &Array) -> Vec<serde_json::Value> {
    array.iter().take(MOST_ELEMENTS).map(|element| scalar(&element)).collect()
}

/// A value in JSON. Bytes that are no text become U+FFFD, numbers that JSON lacks become null.
fn scalar(value: &Value) -> serde_json::Value {
    match value {
        Value::U8(x) => json!(x),
        Value::I8(x) => json!(x),
        Value::U16(x) => json!(x),
        Value::I16(x) => json!(x),
        Value::U32(x) => json!(x),
        Value::I32(x) => json!(x),
        Value::F32(x) => json!(x),
        Value::Bool(x) => json!(x),
        Value::String(bytes) => json!(String::from_utf8_lossy(bytes)),
        Value::Array(array) => json!(first(array)),
        Value::U64(x) => json!(x),
        Value::I64(x) => json!(x),
        Value::F64(x) => json!(x),
    }
}
