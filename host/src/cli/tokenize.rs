//! `gamma tokenize`: text to ids.

use std::os::unix::ffi::OsStrExt;

use serde_json::json;

use super::args::Tokenize;
use super::error::Error;
use super::{Out, model};

/// Runs the command.
pub fn run(args: &Tokenize) -> Result<(), Error> {
    let file = model::open(&args.model)?;
    let tokenizer = model::tokenizer(&args.model, &file)?;
    let text = match &args.text {
        Some(text) => text.as_bytes().to_vec(),
        None => model::standard_input()?,
    };
    let mut out = Out::new();
    for id in model::encode(&tokenizer, &text, args.specials, "text")? {
        if args.json {
            let failed = |source| Error::Tokenizer { file: model::name(&file), source };
            let bytes = tokenizer.token_bytes(id).map_err(failed)?;
            let kind = tokenizer.kind(id).map_err(failed)?;
            let text = str::from_utf8(bytes).ok();
            out.json(&json!({"id": id, "bytes": bytes, "text": text, "kind": kind.to_string()}))?;
        } else {
            out.line(&id.to_string())?;
        }
    }
    out.flush()
}
