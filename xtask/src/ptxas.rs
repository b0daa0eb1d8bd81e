//! Runs NVIDIA's `ptxas`, the assembler inside the driver as a program of its own, and reads what it reports.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::process::{self, Error, at};
use crate::workspace;

/// The PyPI package that carries `ptxas`, and the releases whose numbers are comparable.
const PACKAGE: &str = "nvidia-cuda-nvcc";
const RELEASE: &str = "13.0";

const LIMIT: Duration = Duration::from_secs(600);

/// What one kernel became.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Resources {
    /// Registers of one thread.
    pub registers: u32,
    /// Static shared memory of one block, in bytes.
    pub shared_bytes: u32,
    /// Stack of one thread, in bytes.
    pub stack_bytes: u32,
    /// Spill stores and loads of one thread, in bytes.
    pub spill_bytes: u32,
}

/// What ptxas said of a module.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// By entry.
    pub entries: BTreeMap<String, Resources>,
    /// Lines that name a lost optimization, as `C7510`: wgmma serialized.
    pub losses: Vec<String>,
}

/// Assembles the file `ptx` for `architecture`.
///
/// # Errors
///
/// [`Error::Program`] with the assembler's words if it refuses the file; [`Error::Found`] if its report is not
/// understood.
pub fn assemble(ptxas: &Path, ptx: &Path, architecture: &str) -> Result<Report, Error> {
    let cubin = ptx.with_extension("cubin");
    let mut command = Command::new(ptxas);
    command.args(["-v", &format!("-arch={architecture}")]).arg(ptx).arg("-o").arg(&cubin);
    let (stdout, stderr) = process::output(&mut command, LIMIT)?;
    parse(&format!("{stdout}\n{stderr}"))
        .map_err(|reason| Error::Found(format!("ptxas's report on {}: {reason}", ptx.display())))
}

/// Reads the lines that `ptxas -v` writes about each entry.
fn parse(text: &str) -> Result<Report, String> {
    let mut report = Report::default();
    let mut current = None;
    for line in text.lines() {
        let said = line.split_once(" : ").map_or(line, |(_, said)| said).trim();
        if said.contains("(C75") {
            report.losses.push(said.to_owned());
        } else if let Some(rest) = said.strip_prefix("Compiling entry function '") {
            let name = rest.split('\'').next().unwrap_or(rest).to_owned();
            report.entries.insert(name.clone(), Resources::default());
            current = Some(name);
        } else if said.contains("bytes stack frame") || said.starts_with("Used ") {
            let entry = current.as_ref().and_then(|name| report.entries.get_mut(name));
            let entry = entry.ok_or_else(|| format!("'{said}' before any entry"))?;
            for part in said.trim_start_matches("Used ").split(", ") {
                let (number, what) = part.split_once(' ').unwrap_or((part, ""));
                let number = || number.parse::<u32>().map_err(|_| format!("no number in '{part}'"));
                match what {
                    "registers" => entry.registers = number()?,
                    "bytes smem" => entry.shared_bytes = number()?,
                    // Functions an entry calls have lines of their own; what they need, it needs too.
                    "bytes stack frame" => entry.stack_bytes += number()?,
                    "bytes spill stores" | "bytes spill loads" => entry.spill_bytes += number()?,
                    _ => {}
                }
            }
        }
    }
    match report.entries.iter().find(|(_, resources)| resources.registers == 0) {
        Some((name, _)) => Err(format!("no register count for {name}")),
        None => Ok(report),
    }
}

/// The assembler: `$PTXAS`, or the one in the cache, which is fetched from PyPI the first time.
///
/// # Errors
///
/// [`Error::Found`] if there is none and it cannot be fetched.
pub fn find() -> Result<PathBuf, Error> {
    if let Some(path) = env::var_os("PTXAS").map(PathBuf::from) {
        return if path.is_file() { Ok(path) } else { Err(Error::Found(format!("PTXAS: no {}", path.display()))) };
    }
    let cached = workspace::cache()?.join(format!("ptxas-{RELEASE}"));
    if cached.is_file() {
        return Ok(cached);
    }
    eprintln!("fetching ptxas {RELEASE} from PyPI ({PACKAGE})");
    let venv = cached.with_extension(format!("partial-{}", std::process::id()));
    let fetched = fetch(&venv, &cached);
    // Nothing but the assembler is kept.
    let _ = fs::remove_dir_all(&venv);
    fetched.map_err(|error| {
        Error::Found(format!("no ptxas: {error}; set PTXAS to one of CUDA {RELEASE}, or provide python3 with venv"))
    })?;
    Ok(cached)
}

fn fetch(venv: &Path, cached: &Path) -> Result<(), Error> {
    fs::create_dir_all(venv).map_err(at(venv))?;
    process::output(Command::new("python3").args(["-m", "venv"]).arg(venv), LIMIT)?;
    let mut install = Command::new(venv.join("bin/pip"));
    install.args(["install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]);
    process::output(install.arg(format!("{PACKAGE}=={RELEASE}.*")), LIMIT)?;
    let found =
        search(&venv.join("lib"))?.ok_or_else(|| Error::Found(format!("{PACKAGE} {RELEASE} holds no bin/ptxas")))?;
    // Same file system, so the file appears whole or not at all.
    fs::rename(&found, cached).map_err(at(cached))
}

/// The file `bin/ptxas` somewhere below `folder`.
fn search(folder: &Path) -> Result<Option<PathBuf>, Error> {
    for entry in fs::read_dir(folder).map_err(at(folder))? {
        let entry = entry.map_err(at(folder))?;
        let path = entry.path();
        if path.ends_with("bin/ptxas") && path.is_file() {
            return Ok(Some(path));
        }
        if entry.file_type().map_err(at(&path))?.is_dir()
            && let Some(found) = search(&path)?
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_are_read_by_entry() {
        let text = "ptxas info    : 12 bytes gmem\n\
            ptxas info    : Compiling entry function 'foo' for 'sm_80'\n\
            ptxas info    : Function properties for foo\n    \
                0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Used 96 registers, used 1 barriers, 1024 bytes smem, 368 bytes cmem[0]\n\
            ptxas info    : Compile time = 1.578 ms\n\
            ptxas info    : Compiling entry function 'bar' for 'sm_80'\n\
            ptxas info    : Function properties for bar\n    \
                16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n\
            ptxas info    : Used 255 registers, 352 bytes cmem[0]\n";
        let report = parse(text).expect("it is well formed");
        let foo = Resources { registers: 96, shared_bytes: 1024, stack_bytes: 0, spill_bytes: 0 };
        let bar = Resources { registers: 255, shared_bytes: 0, stack_bytes: 16, spill_bytes: 12 };
        assert_eq!(report.entries, BTreeMap::from([("foo".into(), foo), ("bar".into(), bar)]));
        assert_eq!(report.losses, [""; 0]);
    }

    #[test]
    fn lost_optimizations_are_kept() {
        let text = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized";
        let report = parse(text).expect("it is well formed");
        assert_eq!(report.losses, ["(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"]);
    }

    #[test]
    fn a_report_without_registers_is_not_taken_for_zero() {
        let text = "ptxas info    : Compiling entry function 'foo' for 'sm_80'\n";
        assert_eq!(parse(text), Err("no register count for foo".into()));
        assert_eq!(parse("Used 3 registers"), Err("'Used 3 registers' before any entry".into()));
    }
}
