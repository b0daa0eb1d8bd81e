//! Launch bounds: rustc cannot write `.maxntid`, `.minnctapersm` and `.maxnreg`, and without them ptxas squeezes a streaming kernel into
//! 31 registers and keeps 6 of 24 loads in flight instead of 22. `#[kernel]` leaves them as a comment; this writes them.

use std::collections::HashMap;

use crate::Error;

const MARK: &str = "//@ bounds ";

/// Turns the `//@ bounds NAME threads=T blocks_per_sm=B registers=R` lines that `#[kernel]` left into directives of the
/// entries. R is 0 where nothing bounds registers but B; it counts only where `grids_overlap`, since it is for room beside
/// the next grid.
///
/// # Errors
///
/// [`Error::Bounds`] for an entry without such a line, or a line without its entry.
pub fn write_launch_bounds(ptx: &str, grids_overlap: bool) -> Result<String, Error> {
    let problem = |entry: &str, problem| Error::Bounds { entry: entry.to_owned(), problem };
    let mut bounds = HashMap::new();
    for line in ptx.lines().filter_map(|line| line.trim().strip_prefix(MARK)) {
        let mut words = line.split(' ');
        let entry = words.next().unwrap_or_default();
        let mut number = |name: &str| words.next()?.strip_prefix(name)?.strip_prefix('=')?.parse::<u32>().ok();
        let (Some(threads), Some(blocks), Some(registers)) =
            (number("threads"), number("blocks_per_sm"), number("registers"))
        else {
            return Err(problem(entry, "its bounds line is malformed"));
        };
        let of_registers = if registers > 0 && grids_overlap {
            format!(".maxnreg {registers}")
        } else {
            format!(".minnctapersm {blocks}")
        };
        bounds.insert(entry, format!(".maxntid {threads}, 1, 1\n{of_registers}\n"));
    }

    let mut out = String::with_capacity(ptx.len() + 64 * bounds.len());
    let mut entry: Option<&str> = None;
    for line in ptx.lines() {
        if line.trim().starts_with(MARK) {
            continue;
        }
        if let Some(rest) = line.strip_prefix(".visible .entry ") {
            entry = Some(rest.split('(').next().unwrap_or_default());
        }
        if line == "{"
            && let Some(entry) = entry.take()
        {
            let directives =
                bounds.remove(entry).ok_or_else(|| problem(entry, "it has no bounds line; make it with #[kernel]"))?;
            out.push_str(&directives);
        }
        out.push_str(line);
        out.push('\n');
    }
    match bounds.keys().next() {
        Some(entry) => Err(problem(entry, "its bounds line has no entry")),
        None => Ok(out),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRY: &str = ".visible .entry scale(\n\t.param .u64 scale_param_0\n)\n{\n\tret;\n}\n";

    #[test]
    fn directives_stand_between_parameters_and_body() {
        for (registers, overlap, directive) in
            [(0, true, ".minnctapersm 2"), (96, true, ".maxnreg 96"), (96, false, ".minnctapersm 2")]
        {
            let ptx = format!("//@ bounds scale threads=256 blocks_per_sm=2 registers={registers}\n{ENTRY}");
            let expected = format!(
                ".visible .entry scale(\n\t.param .u64 scale_param_0\n)\n.maxntid 256, 1, 1\n{directive}\n{{\n\tret;\n}}\n"
            );
            assert_eq!(write_launch_bounds(&ptx, overlap).unwrap(), expected);
        }
    }

    #[test]
    fn an_entry_without_bounds_is_an_error() {
        let error = write_launch_bounds(ENTRY, false).unwrap_err();
        assert!(matches!(error, Error::Bounds { entry, .. } if entry == "scale"));
    }

    #[test]
    fn bounds_without_an_entry_are_an_error() {
        let error = write_launch_bounds("//@ bounds gone threads=1 blocks_per_sm=1 registers=0\n", false).unwrap_err();
        assert!(matches!(error, Error::Bounds { entry, .. } if entry == "gone"));
    }
}
