//! Holds the compiled kernels against what is committed: their interface, and the instructions that must neither
//! double nor vanish; and fails on what should never be there: spills, stack frames, panics.
//!
//! Why the counts: rustc may copy a barrier or a shuffle into both sides of a divergent branch. The flags of
//! `cuda_builder` forbid it, and a count that changed is how one would learn that they no longer do.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::PathBuf;

use comfy_table::{CellAlignment, Table, presets};

use crate::process::{Error, at};
use crate::ptx::{self, Counts, Entry, Module};
use crate::ptxas::{self, Report};
use crate::workspace::{self, ARCHITECTURES};

const COUNTS: &str = "docs/audit.csv";
const INTERFACE: &str = "docs/ffi-interface-locked.md";

/// Checks what needs the PTX text alone: no panics, the counts of `docs/audit.csv`, and the interface of
/// `docs/ffi-interface-locked.md`. With `bless`, writes both files instead of comparing.
///
/// # Errors
///
/// [`Error::Found`] naming every entry that differs.
pub fn interface(bless: bool) -> Result<(), Error> {
    let modules = read_modules()?;
    let panics = modules.iter().flat_map(|(architecture, module)| panics(architecture, module)).collect::<Vec<_>>();
    fail_if(panics)?;
    let document = interface_document(&modules).map_err(|faults| Error::Found(faults.join("\n")))?;
    let counts = counts_document(&modules);

    let (counts_path, interface_path) = (workspace::root().join(COUNTS), workspace::root().join(INTERFACE));
    if bless {
        fs::write(&counts_path, counts).map_err(at(&counts_path))?;
        return fs::write(&interface_path, document).map_err(at(&interface_path));
    }
    let committed = |path: &PathBuf| {
        fs::read_to_string(path).map_err(|error| {
            Error::Found(format!("{}: {error}; `cargo xtask audit --bless` writes it", path.display()))
        })
    };
    let mut faults = drift(COUNTS, &committed(&counts_path)?, &counts);
    faults.extend(drift(INTERFACE, &committed(&interface_path)?, &document));
    if !faults.is_empty() {
        faults.push("if this is meant, `cargo xtask audit --bless` records it".into());
    }
    fail_if(faults)
}

/// Assembles every module with ptxas, prints a table for each, and fails on spills, stack frames and lost
/// optimizations.
///
/// # Errors
///
/// [`Error::Found`] naming every entry at fault.
pub fn assembled() -> Result<(), Error> {
    let ptxas = ptxas::find()?;
    let mut faults = Vec::new();
    for (architecture, module) in read_modules()? {
        faults.extend(serialized(architecture, &module));
        let report = ptxas::assemble(&ptxas, &workspace::ptx(architecture), architecture)?;
        println!("{architecture}\n{}", table(&module, &report));
        faults.extend(assembly_faults(architecture, &module, &report));
    }
    fail_if(faults)
}

fn read_modules() -> Result<Vec<(&'static str, Module)>, Error> {
    let read = |architecture: &'static str| {
        let path = workspace::ptx(architecture);
        let text = fs::read_to_string(&path).map_err(at(&path))?;
        let module = ptx::parse(&text).map_err(|fault| Error::Found(format!("{}: {fault}", path.display())))?;
        Ok((architecture, module))
    };
    ARCHITECTURES.into_iter().map(read).collect()
}

fn fail_if(faults: Vec<String>) -> Result<(), Error> {
    if faults.is_empty() { Ok(()) } else { Err(Error::Found(faults.join("\n"))) }
}

fn panics(architecture: &str, module: &Module) -> Vec<String> {
    let faulty = module.entries.iter().filter(|(_, entry)| !entry.panics.is_empty());
    faulty
        .map(|(name, entry)| {
            let functions = entry.panics.iter().map(String::as_str).collect::<Vec<_>>();
            format!("{architecture}: {name} can panic: {}", functions.join(", "))
        })
        .collect()
}

/// Kernels whose products of warpgroups would not stay under way. The host has the driver compile kernels as relocatable code, and
/// there ptxas waits for each product where a kernel has subroutines; of the same kernel alone it says nothing.
fn serialized(architecture: &str, module: &Module) -> Vec<String> {
    let is_slow = |counts: ptx::Counts| counts.wgmma > 0 && counts.subroutines + counts.calls > 0;
    let faulty = module.entries.iter().filter(|(_, entry)| is_slow(entry.counts));
    let fault = |name: &str| format!("{architecture}: {name} divides or calls beside wgmma; `div_full` does not");
    faulty.map(|(name, _)| fault(name)).collect()
}

fn assembly_faults(architecture: &str, module: &Module, report: &Report) -> Vec<String> {
    let mut faults = Vec::new();
    for name in module.entries.keys() {
        match report.entries.get(name) {
            None => faults.push(format!("{architecture}: {name}: ptxas reports nothing")),
            Some(resources) => {
                if resources.spill_bytes > 0 {
                    faults.push(format!("{architecture}: {name} spills {} bytes; expected 0", resources.spill_bytes));
                }
                if resources.stack_bytes > 0 {
                    let found = resources.stack_bytes;
                    faults.push(format!("{architecture}: {name} has a stack frame of {found} bytes; expected 0"));
                }
            }
        }
    }
    faults.extend(report.losses.iter().map(|loss| format!("{architecture}: {loss}")));
    faults
}

fn table(module: &Module, report: &Report) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    let header = ["entry", "instructions", "registers", "shared", "stack", "spill"].map(str::to_owned).into_iter();
    table.set_header(header.chain(Counts::default().audited().map(|(name, _)| name.to_owned())));
    for (name, entry) in &module.entries {
        let resources = report.entries.get(name).copied().unwrap_or_default();
        let numbers = [
            entry.counts.instructions,
            resources.registers,
            resources.shared_bytes,
            resources.stack_bytes,
            resources.spill_bytes,
        ];
        let counts = entry.counts.audited().map(|(_, count)| count);
        table.add_row(std::iter::once(name.clone()).chain(numbers.into_iter().chain(counts).map(|n| n.to_string())));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// `docs/audit.csv`: a line per entry and architecture, by entry.
fn counts_document(modules: &[(&str, Module)]) -> String {
    let columns = Counts::default().audited().map(|(name, _)| name).join(",");
    let mut lines = Vec::new();
    for (architecture, module) in modules {
        for (name, entry) in &module.entries {
            let counts = entry.counts.audited().map(|(_, count)| count.to_string()).join(",");
            lines.push(format!("{name},{architecture},{counts}"));
        }
    }
    lines.sort();
    format!("entry,arch,{columns}\n{}\n", lines.join("\n"))
}

/// `docs/ffi-interface-locked.md`, or how the architectures differ.
fn interface_document(modules: &[(&str, Module)]) -> Result<String, Vec<String>> {
    let names: BTreeSet<&str> =
        modules.iter().flat_map(|(_, module)| module.entries.keys().map(String::as_str)).collect();
    let (mut rows, mut faults) = (Vec::new(), Vec::new());
    for name in names {
        let entries: Vec<(&str, &Entry)> = modules
            .iter()
            .filter_map(|(architecture, module)| Some((*architecture, module.entries.get(name)?)))
            .collect();
        // `wgmma` is of one architecture; everything else is of all.
        if entries.len() < modules.len() && !entries.iter().all(|(_, entry)| entry.counts.wgmma > 0) {
            let found: Vec<&str> = entries.iter().map(|(architecture, _)| *architecture).collect();
            faults.push(format!("{name} is only in {}", found.join(", ")));
            continue;
        }
        let ((first, entry), others) = entries.split_first().expect("as many as modules, of which there is one");
        for (other, other_entry) in others {
            let (a, b) = (parameters_cell(name, entry), parameters_cell(name, other_entry));
            if a != b || launch_bound(entry) != launch_bound(other_entry) {
                let bound = |entry: &Entry| launch_bound(entry).map_or("no .maxntid", String::as_str).to_owned();
                let (a, b) = (format!("{a}, {}", bound(entry)), format!("{b}, {}", bound(other_entry)));
                faults.push(format!("{name} of {first} and {other} differ:\n  {a}\n  {b}"));
            }
        }
        let only = if entries.len() < modules.len() { format!(" (only {first})") } else { String::new() };
        rows.push(format!("| `{name}`{only} | {} | {} |", parameters_cell(name, entry), bounds_cell(&entries)));
    }
    if !faults.is_empty() {
        return Err(faults);
    }

    let mut text = String::from(
        "# The kernels' interface\n\n\
         What the host launches: the entries of the PTX, the same for every architecture but for those that multiply by\n\
         warpgroups. Written by `cargo xtask audit --bless`; `cargo xtask test` fails when the PTX no longer matches it.\n\n\
         A slice is two parameters, its address (`.ptr`) and its length in elements. Bounds are the directives that\n\
         `#[kernel]` declares; a launch has to keep `.maxntid`.\n\n\
         | entry | parameters | bounds |\n| --- | --- | --- |\n",
    );
    for row in rows {
        writeln!(text, "{row}").expect("a String takes any text");
    }
    Ok(text)
}

fn parameters_cell(name: &str, entry: &Entry) -> String {
    // Parameter names repeat the entry's; what is left is the index, or the size of an array.
    let parameter = |p: &ptx::Parameter| {
        let index = p.name.strip_prefix(name).and_then(|rest| rest.strip_prefix("_param_")).unwrap_or(&p.name);
        format!("`{index}: {}`", p.ty)
    };
    entry.parameters.iter().map(parameter).reduce(|a, b| a + ", " + &b).unwrap_or_else(|| "none".to_owned())
}

/// What a launch has to keep; the other bounds are for the assembler.
fn launch_bound(entry: &Entry) -> Option<&String> {
    entry.directives.iter().find(|directive| directive.starts_with(".maxntid"))
}

/// The directives of an entry, with the architecture beside those that not all have.
fn bounds_cell(entries: &[(&str, &Entry)]) -> String {
    let mut cells: Vec<String> = Vec::new();
    for (architecture, entry) in entries {
        for directive in &entry.directives {
            let is_common = entries.iter().all(|(_, other)| other.directives.contains(directive));
            let cell = if is_common { format!("`{directive}`") } else { format!("`{directive}` ({architecture})") };
            if !cells.contains(&cell) {
                cells.push(cell);
            }
        }
    }
    if cells.is_empty() { "none".to_owned() } else { cells.join(", ") }
}

/// The lines of a committed file that the PTX no longer gives, and those it gives instead.
fn drift(file: &str, committed: &str, current: &str) -> Vec<String> {
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let (committed, current) = (lines(committed), lines(current));
    let gone = committed.iter().filter(|line| !current.contains(line)).map(|line| format!("{file}: - {line}"));
    let new = current.iter().filter(|line| !committed.contains(line)).map(|line| format!("{file}: + {line}"));
    let mut faults = gone.chain(new).collect::<Vec<_>>();
    if faults.is_empty() && committed != current {
        faults.push(format!("{file}: the lines are the same, but not their order or number"));
    }
    faults
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::ptxas::Resources;

    const PTX: &str = ".visible .entry scale(\n\t.param .u64 .ptr .align 1 scale_param_0,\n\t.param .u64 scale_param_1\n)\
                       \n.maxntid 256, 1, 1\n{\n\tbar.sync 0;\n\tret;\n}\n";

    fn module(text: &str) -> Module {
        ptx::parse(text).expect("it is well formed")
    }

    #[test]
    fn documents_list_every_entry() {
        let modules = [("sm_80", module(PTX)), ("sm_90a", module(PTX))];
        let counts = "entry,arch,barriers,shuffles,votes,mma,wgmma,ldmatrix,cp_async,mbarrier,griddep,calls\n\
                      scale,sm_80,1,0,0,0,0,0,0,0,0,0\nscale,sm_90a,1,0,0,0,0,0,0,0,0,0\n";
        assert_eq!(counts_document(&modules), counts);
        let document = interface_document(&modules).expect("they agree");
        let row = "| `scale` | `0: .u64 .ptr .align 1`, `1: .u64` | `.maxntid 256, 1, 1` |\n";
        assert!(document.ends_with(row), "{document}");
    }

    #[test]
    fn architectures_must_agree() {
        let other = PTX.replace(".maxntid 256", ".maxntid 128") + ".visible .entry only() { ret; }";
        let faults =
            interface_document(&[("sm_80", module(PTX)), ("sm_90a", module(&other))]).expect_err("they differ");
        assert_eq!(faults.len(), 2, "{faults:?}");
        let bounds = faults.iter().find(|fault| fault.contains("differ")).expect("the bounds differ");
        assert!(bounds.contains(".maxntid 256") && bounds.contains(".maxntid 128"), "{faults:?}");
        assert!(faults.contains(&"only is only in sm_90a".to_owned()), "{faults:?}");
        let beside =
            module(&PTX.replace("bar.sync 0", "wgmma.mma_async.sync.aligned.m64n16k16 0; div.rn.f32 %f1, %f2, %f3"));
        let expected = ["sm_90a: scale divides or calls beside wgmma; `div_full` does not"];
        assert_eq!(serialized("sm_90a", &beside), expected);
        assert!(serialized("sm_80", &module(PTX)).is_empty());
        let wide = PTX.replace("scale", "wide").replace("bar.sync 0", "{ wgmma.mma_async.sync.aligned.m64n16k16 0; }");
        let both = module(&format!("{PTX}{wide}"));
        let document = interface_document(&[("sm_80", module(PTX)), ("sm_90a", both)]).expect("wgmma may be missing");
        assert!(document.contains("\n| `wide` (only sm_90a) | "), "{document}");
    }

    #[test]
    fn registers_may_be_bounded_for_one_architecture() {
        let other = PTX.replace("1\n{", "1\n.maxnreg 88\n{");
        let document = interface_document(&[("sm_80", module(PTX)), ("sm_90a", module(&other))]).expect("they agree");
        assert!(document.ends_with("| `.maxntid 256, 1, 1`, `.maxnreg 88` (sm_90a) |\n"), "{document}");
    }

    #[test]
    fn spills_stack_frames_losses_and_panics_are_faults() {
        let module = module(&PTX.replace("bar.sync 0;", "call.uni core_panic, ();"));
        assert_eq!(panics("sm_80", &module), ["sm_80: scale can panic: core_panic"]);
        let resources = Resources { registers: 8, shared_bytes: 0, stack_bytes: 16, spill_bytes: 4 };
        let report = Report { entries: BTreeMap::from([("scale".into(), resources)]), losses: vec!["(C7510)".into()] };
        let faults = [
            "sm_80: scale spills 4 bytes; expected 0",
            "sm_80: scale has a stack frame of 16 bytes; expected 0",
            "sm_80: (C7510)",
        ];
        assert_eq!(assembly_faults("sm_80", &module, &report), faults);
        assert_eq!(assembly_faults("sm_80", &module, &Report::default()), ["sm_80: scale: ptxas reports nothing"]);
    }

    #[test]
    fn drift_shows_both_lines() {
        assert_eq!(drift("f", "a\nb\n", "a\nc\n"), ["f: - b", "f: + c"]);
        assert_eq!(drift("f", "a\nb\n", "b\na\n"), ["f: the lines are the same, but not their order or number"]);
        assert_eq!(drift("f", "a\n", "a\n"), [""; 0]);
    }
}
