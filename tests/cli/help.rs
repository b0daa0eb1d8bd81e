//! `help.txt` holds every help text as the parser prints it, so that a change of the command line shows in review.
//! `GAMMA_BLESS=1 cargo test --test cli` writes it anew.

use crate::gamma::gamma;
use std::env;

#[test]
fn help_texts_are_those_in_help_txt() {
    let mut found = String::new();
    for command in ["", "generate", "chat", "inspect", "tokenize", "logits", "perplexity", "bench", "plan", "doctor"] {
        for flag in ["-h", "--help"] {
            let args: Vec<&str> = [command, flag].into_iter().filter(|arg| !arg.is_empty()).collect();
            let text = gamma(&args).text();
            found += &format!("$ gamma {}\n{text}\n", args.join(" "));
        }
    }
    if env::var_os("GAMMA_BLESS").is_some() {
        std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/cli/help.txt"), &found).unwrap();
        return;
    }
    let expected = include_str!("help.txt");
    for (number, (found, expected)) in found.lines().zip(expected.lines()).enumerate() {
        assert_eq!(found, expected, "line {} of help.txt", number + 1);
    }
    assert_eq!(found.len(), expected.len(), "help.txt has another length");
}

#[test]
fn without_a_command_the_help_is_a_usage_error() {
    let run = gamma([""; 0]);
    assert_eq!((run.code, run.stdout.len()), (2, 0));
    assert!(run.stderr.contains("Usage: gamma <COMMAND>"), "{}", run.stderr);
}

#[test]
fn version_is_the_package_s() {
    assert_eq!(gamma(["--version"]).text(), format!("gamma {}\n", env!("CARGO_PKG_VERSION")));
}
