//! Fetches `rust-src` from Debian's archive with the machine's own apt, without touching the system's package state.
//!
//! Which mirror is read from the machine's apt sources, so that this works behind whatever mirror the machine uses.
//! Signatures are checked with Debian's own keyring, as for any package.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::process::{self, Error, at};

/// The suite that carries the Rust releases after Debian 13's own.
pub const SUITE: &str = "trixie-backports";

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const LIMIT: Duration = Duration::from_secs(300);

/// Unpacks the package of exactly `version` somewhere under `folder`, and returns where its source tree is.
///
/// # Errors
///
/// - [`Error::Found`] if this machine has no Debian mirror or the suite has other versions only.
/// - [`Error::Program`] if apt or dpkg fails.
pub fn rust_src(version: &str, folder: &Path) -> Result<PathBuf, Error> {
    let mirror = mirror().ok_or_else(|| Error::Found("no Debian mirror among apt's sources".into()))?;
    let apt = Apt::new(folder, &mirror)?;
    apt.run("apt-get", &["update"])?;
    let offered = apt.run("apt-cache", &["madison", "rust-src"])?;
    let exact = package_version(&offered, version).ok_or_else(|| {
        let found = offered.lines().filter_map(madison_version).collect::<Vec<_>>().join(", ");
        Error::Found(format!("{SUITE} has no rust-src {version}; found: {found}"))
    })?;
    apt.run("apt-get", &["download", &format!("rust-src={exact}")])?;

    let unpacked = folder.join("unpacked");
    let package = downloaded(folder)?;
    process::output(Command::new("dpkg").arg("-x").args([&package, &unpacked]), LIMIT)?;
    let source = unpacked.join("usr/src").join(format!("rustc-{version}"));
    if !source.join("library/core/Cargo.toml").is_file() {
        let name = package.file_name().unwrap_or_default().display();
        return Err(Error::Found(format!("{name} has no usr/src/rustc-{version}/library/core/Cargo.toml")));
    }
    Ok(source)
}

/// An apt with state of its own.
struct Apt<'a> {
    folder: &'a Path,
    options: Vec<String>,
}

impl<'a> Apt<'a> {
    fn new(folder: &'a Path, mirror: &str) -> Result<Self, Error> {
        for path in ["lists/partial", "cache/archives/partial"].map(|path| folder.join(path)) {
            fs::create_dir_all(&path).map_err(at(&path))?;
        }
        let (list, status) = (folder.join("sources.list"), folder.join("status"));
        fs::write(&list, format!("deb [signed-by={KEYRING}] {mirror} {SUITE} main\n")).map_err(at(&list))?;
        fs::write(&status, "").map_err(at(&status))?;
        let settings = [
            ("Dir::Etc::sourcelist", list),
            ("Dir::Etc::sourceparts", "-".into()),
            ("Dir::State::Lists", folder.join("lists")),
            ("Dir::Cache", folder.join("cache")),
            ("Dir::State::status", status),
            // Descriptions in other languages, and waiting longer than a user would, are of no use here.
            ("Acquire::Languages", "none".into()),
            ("Acquire::Retries", "1".into()),
            // Or an unreachable mirror would be a warning, and look like a suite without the package.
            ("APT::Update::Error-Mode", "any".into()),
            ("Acquire::http::Timeout", "20".into()),
        ];
        let options = settings.iter().flat_map(|(name, value)| ["-o".into(), format!("{name}={}", value.display())]);
        Ok(Self { folder, options: options.collect() })
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String, Error> {
        let mut command = Command::new(program);
        command.current_dir(self.folder).args(&self.options).args(arguments).env("LC_ALL", "C");
        // The error is shown to a user: the subcommand says more than a screenful of options.
        process::output(&mut command, LIMIT).map(|(stdout, _)| stdout).map_err(|error| match error {
            Error::Program { reason, .. } => {
                Error::Program { command: format!("{program} {}", arguments.join(" ")), reason }
            }
            other => other,
        })
    }
}

/// The one `.deb` that `apt-get download` left in `folder`.
fn downloaded(folder: &Path) -> Result<PathBuf, Error> {
    let entries = fs::read_dir(folder).map_err(at(folder))?;
    let mut paths = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    let package = paths.find(|path| path.extension().is_some_and(|extension| extension == "deb"));
    package.ok_or_else(|| Error::Found("apt-get download left no package".into()))
}

/// The Debian version, among those `apt-cache madison` lists, that packages upstream's `version`.
fn package_version(madison: &str, version: &str) -> Option<String> {
    let of_version = |found: &&str| {
        // 1.95.0+dfsg1-1~bpo13+1: upstream's version ends where something other than a digit or a point follows.
        let rest = found.strip_prefix(version);
        rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit() || c == '.'))
    };
    madison.lines().filter_map(madison_version).find(of_version).map(str::to_owned)
}

/// The version of a line `rust-src | VERSION | REPOSITORY`.
fn madison_version(line: &str) -> Option<&str> {
    line.split('|').nth(1).map(str::trim)
}

/// The first Debian mirror among the machine's apt sources.
fn mirror() -> Option<String> {
    let folder = PathBuf::from("/etc/apt");
    let mut files = vec![folder.join("sources.list")];
    if let Ok(entries) = fs::read_dir(folder.join("sources.list.d")) {
        files.extend(entries.filter_map(|entry| entry.ok().map(|entry| entry.path())));
        files[1..].sort();
    }
    files.iter().find_map(|path| {
        let text = fs::read_to_string(path).ok()?;
        match path.extension()?.to_str()? {
            "list" => mirror_in_list(&text),
            "sources" => mirror_in_sources(&text),
            _ => None,
        }
    })
}

/// In the one-line format: `deb [OPTIONS] URI SUITE COMPONENT…`.
fn mirror_in_list(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let rest = line.trim_start().strip_prefix("deb")?;
        let rest = rest.strip_prefix(char::is_whitespace)?.trim_start();
        let rest = match rest.strip_prefix('[') {
            Some(options) => options.split_once(']')?.1,
            None => rest,
        };
        rest.split_whitespace().next().filter(|uri| serves_debian(uri)).map(str::to_owned)
    })
}

/// In the deb822 format: stanzas of `Field: values`, where `URIs` may name several and go on in indented lines.
fn mirror_in_sources(text: &str) -> Option<String> {
    let lines = text.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>();
    lines.split(|line| line.trim().is_empty()).find_map(|stanza| {
        let (mut field, mut binary, mut enabled, mut uris) = (String::new(), false, true, Vec::new());
        for line in stanza {
            let values = match line.split_once(':') {
                Some((name, values)) if !line.starts_with(char::is_whitespace) => {
                    field = name.to_ascii_lowercase();
                    values
                }
                _ => line,
            };
            for value in values.split_whitespace() {
                match field.as_str() {
                    "types" => binary |= value == "deb",
                    "enabled" => enabled = value != "no",
                    "uris" => uris.push(value),
                    _ => {}
                }
            }
        }
        let uri = uris.into_iter().find(|uri| serves_debian(uri))?;
        (binary && enabled).then(|| uri.to_owned())
    })
}

/// A mirror of Debian itself, not of its security updates or of something built on it.
fn serves_debian(uri: &str) -> bool {
    uri.contains("://") && uri.trim_end_matches('/').ends_with("/debian")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_debian_mirror_of_a_list_is_taken() {
        let text = "# deb http://old.example/debian bookworm main\n\
                    deb-src http://source.example/debian bookworm main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://security.example/debian-security bookworm-security main\n\
                    deb\t[ arch=amd64 ] https://mirror.example/debian/ bookworm main contrib\n\
                    deb http://later.example/debian bookworm main\n";
        assert_eq!(mirror_in_list(text).as_deref(), Some("https://mirror.example/debian/"));
        assert_eq!(mirror_in_list("deb http://ubuntu.example/ubuntu noble main\n"), None);
    }

    #[test]
    fn the_first_debian_mirror_of_a_sources_file_is_taken() {
        let text = "Types: deb\nURIs: http://a.example/debian\nSuites: sid\nEnabled: no\n\
                    \n\
                    Types: deb-src\nURIs: http://b.example/debian\nSuites: sid\n\
                    \n\
                    # a comment: with a colon\nTypes: deb deb-src\n# http://c.example/debian\n\
                    URIs: http://d.example/debian-security\n  http://e.example/debian\nSuites: bookworm\n\
                    \n\
                    types: deb\nuris: http://f.example/debian\n";
        assert_eq!(mirror_in_sources(text).as_deref(), Some("http://e.example/debian"));
        let lower = text.rsplit("\n\n").next().expect("the text has stanzas");
        assert_eq!(mirror_in_sources(lower).as_deref(), Some("http://f.example/debian"));
    }

    #[test]
    fn exactly_this_version_is_chosen() {
        let madison = "  rust-src | 1.96.1+dfsg1-1~bpo13+1 | http://m.example/debian trixie-backports/main amd64\n \
                       rust-src | 1.95.01-1 | http://m.example/debian trixie-backports/main amd64\n \
                       rust-src | 1.95.0+dfsg1-2~bpo13+1 | http://m.example/debian trixie-backports/main amd64\n";
        assert_eq!(package_version(madison, "1.95.0").as_deref(), Some("1.95.0+dfsg1-2~bpo13+1"));
        assert_eq!(package_version(madison, "1.95"), None);
        assert_eq!(package_version(madison, "1.96.0"), None);
    }
}
