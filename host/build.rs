//! Compiles the kernels to PTX: `OUT_DIR/kernels-ARCH.ptx.gz`, which `device::cuda` embeds (a sixteenth of the text), and
//! the text itself under `TARGET_DIR/ptx` for `cargo xtask audit`.

use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

use cuda_builder::CudaBuilder;
use flate2::Compression;
use flate2::write::GzEncoder;

/// Architecture and the lowest PTX version that has its instructions: the lower, the older the driver that loads it.
const BUILDS: [(&str, &str); 2] = [("sm_80", "ptx71"), ("sm_90a", "ptx80")];

fn main() {
    if let Err(error) = build() {
        // Not by returning it: cargo would show the error's fields instead of its message.
        eprintln!("{error}");
        std::process::exit(1);
    }
}

fn build() -> Result<(), Box<dyn Error>> {
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);
    // OUT_DIR is TARGET_DIR/PROFILE/build/gpt-gamma-HASH/out.
    let target_dir = out_dir.ancestors().nth(4).ok_or("OUT_DIR is not inside a target folder")?;
    fs::create_dir_all(target_dir.join("ptx"))?;
    for (arch, ptx_version) in BUILDS {
        // Beside the profiles, so that a debug and a release host share one device build.
        let nested = target_dir.join("ptx").join(format!("build-{arch}"));
        let ptx = CudaBuilder::new("../kernels").arch(arch, ptx_version).out_dir(nested).build()?;
        let name = format!("kernels-{arch}.ptx");
        let mut compressed = GzEncoder::new(Vec::new(), Compression::best());
        compressed.write_all(ptx.text.as_bytes())?;
        fs::write(out_dir.join(format!("{name}.gz")), compressed.finish()?)?;
        fs::write(target_dir.join("ptx").join(&name), &ptx.text)?;
        for source in &ptx.sources {
            println!("cargo::rerun-if-changed={}", source.display());
        }
    }
    println!("cargo::rerun-if-changed={}", Path::new("../kernels/Cargo.toml").display());
    println!("cargo::rerun-if-env-changed=RUST_SRC_PATH");
    Ok(())
}
