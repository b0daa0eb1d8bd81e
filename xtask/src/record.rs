//! Reads what benches left in `benches/record/DEVICE/*.csv`; `benches/record/README.md` says what the columns are.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

use csv::{Reader, StringRecord};

use crate::process::{Error, at};

/// What is known of one device. Where two files have the same thing, the later one by name, and so by date, holds.
#[derive(Debug, Default, PartialEq)]
pub struct Device {
    /// By the bench's name.
    pub kernels: BTreeMap<String, Kernel>,
    /// Tokens per second of generation by model, tool and tokens in the context.
    pub decode: BTreeMap<String, BTreeMap<String, BTreeMap<u64, f64>>>,
}

/// A kernel that is bound by memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kernel {
    /// Bytes that a launch moves.
    pub bytes: f64,
    /// GB/s.
    pub rate: f64,
}

/// The devices below `folder`, each with the folder its records lie in.
///
/// # Errors
///
/// - [`Error::File`] if a file cannot be read.
/// - [`Error::Found`] if one is no record, or a number is none.
pub fn devices(folder: &Path) -> Result<Vec<(PathBuf, Device)>, Error> {
    let mut devices = Vec::new();
    for device in sorted(folder)?.into_iter().filter(|path| path.is_dir()) {
        let mut records = Device::default();
        for file in sorted(&device)?.into_iter().filter(|path| path.extension().is_some_and(|end| end == "csv")) {
            let text = fs::read_to_string(&file).map_err(at(&file))?;
            records.add(&text).map_err(|fault| Error::Found(format!("{}: {fault}", file.display())))?;
        }
        devices.push((device, records));
    }
    Ok(devices)
}

fn sorted(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = fs::read_dir(folder).map_err(at(folder))?;
    let paths: io::Result<Vec<PathBuf>> = entries.map(|entry| Ok(entry?.path())).collect();
    let mut paths = paths.map_err(at(folder))?;
    paths.sort();
    Ok(paths)
}

impl Device {
    fn add(&mut self, text: &str) -> Result<(), String> {
        let mut reader = Reader::from_reader(text.as_bytes());
        let header = reader.headers().map_err(|error| error.to_string())?.clone();
        let has = |column| header.iter().any(|name| name == column);
        let add = if has("median_us") {
            Self::add_kernel
        } else if has("avg_ts") {
            Self::add_engine
        } else {
            return Err("is neither a record of kernels (median_us) nor of an engine (avg_ts)".to_owned());
        };
        for (i, record) in reader.records().enumerate() {
            let record = record.map_err(|error| error.to_string())?;
            let row = Row { header: &header, record: &record };
            add(self, &row).map_err(|fault| format!("line {}: {fault}", i + 2))?;
        }
        Ok(())
    }

    fn add_kernel(&mut self, row: &Row) -> Result<(), String> {
        // What counts operations is bound by something else.
        if row.text("unit")? != "GB/s" {
            return Ok(());
        }
        let rate: f64 = row.number("throughput")?;
        let kernel = Kernel { bytes: 1e3 * rate * row.number::<f64>("median_us")?, rate };
        self.kernels.insert(row.text("bench")?.to_owned(), kernel);
        Ok(())
    }

    fn add_engine(&mut self, row: &Row) -> Result<(), String> {
        if row.number::<u64>("n_gen")? == 0 || row.number::<u64>("n_prompt")? != 0 {
            return Ok(());
        }
        // llama-bench tells its build instead of its name, and the whole path.
        let tool = match row.text("tool") {
            Ok(tool) => format!("{tool} {}", row.text("version")?),
            Err(_) => format!("llama.cpp b{}", row.text("build_number")?),
        };
        let model = row.text("model").or_else(|_| row.text("model_filename"))?;
        let model = model.rsplit('/').next().unwrap_or(model);
        let tools = self.decode.entry(model.to_owned()).or_default();
        tools.entry(tool).or_default().insert(row.number("n_depth")?, row.number("avg_ts")?);
        Ok(())
    }
}

struct Row<'a> {
    header: &'a StringRecord,
    record: &'a StringRecord,
}

impl<'a> Row<'a> {
    fn text(&self, column: &str) -> Result<&'a str, String> {
        let at = self.header.iter().position(|name| name == column).ok_or_else(|| format!("no column {column}"))?;
        self.record.get(at).ok_or_else(|| format!("ends before column {column}"))
    }

    fn number<T: std::str::FromStr>(&self, column: &str) -> Result<T, String> {
        let text = self.text(column)?;
        text.parse().map_err(|_| format!("{column} is '{text}', expected a number"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_a_kernel_follow_from_its_time_and_rate() {
        let mut device = Device::default();
        let text = "bench,median_us,throughput,unit\nkernel/a/f32/8,2.0,500.0,GB/s\nkernel/b/f32/9,2.0,5.0,TFLOP/s\n";
        device.add(text).expect("it is well formed");
        let expected = BTreeMap::from([("kernel/a/f32/8".to_owned(), Kernel { bytes: 1e6, rate: 500.0 })]);
        assert_eq!(device.kernels, expected);
    }

    #[test]
    fn later_records_replace_earlier_ones() {
        let mut device = Device::default();
        for rate in ["1.0", "2.0"] {
            let text = format!("bench,median_us,throughput,unit\nkernel/a/f32/8,1.0,{rate},GB/s\n");
            device.add(&text).expect("it is well formed");
        }
        assert_eq!(device.kernels["kernel/a/f32/8"].rate, 2.0);
    }

    #[test]
    fn both_engines_records_meet_under_the_model_s_file_name() {
        let mut device = Device::default();
        let ours = "tool,version,model,n_prompt,n_gen,n_depth,avg_ts\ngamma,0.1.0,g.gguf,512,0,0,9000.0\n\
                    gamma,0.1.0,g.gguf,0,128,4096,300.5\n";
        let theirs = "build_number,model_filename,n_prompt,n_gen,n_depth,avg_ts\n\"11434\",\"m/g.gguf\",\"0\",\"128\",\"0\",\"298.0\"\n";
        device.add(ours).expect("it is well formed");
        device.add(theirs).expect("it is well formed");
        let tools = BTreeMap::from([
            ("gamma 0.1.0".to_owned(), BTreeMap::from([(4096, 300.5)])),
            ("llama.cpp b11434".to_owned(), BTreeMap::from([(0, 298.0)])),
        ]);
        assert_eq!(device.decode, BTreeMap::from([("g.gguf".to_owned(), tools)]));
    }

    #[test]
    fn what_is_no_record_is_refused() {
        for (text, told) in [
            ("a,b\n1,2\n", "is neither a record of kernels (median_us) nor of an engine (avg_ts)"),
            ("bench,median_us,throughput,unit\nk,x,1,GB/s\n", "line 2: median_us is 'x', expected a number"),
            ("bench,median_us,throughput\nk,1,1\n", "line 2: no column unit"),
        ] {
            assert_eq!(Device::default().add(text).expect_err("it is no record"), told);
        }
    }
}
