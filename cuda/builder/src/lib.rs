//! Compiles a kernel crate to PTX from a build script, with the pinned stable rustc and nothing of CUDA installed.
//!
//! Named like Rust-CUDA's crate and used like it; inside, rustc's own NVPTX backend does the work: a nested cargo builds
//! the crate as a `cdylib` for `nvptx64-nvidia-cuda` with `core` from source (`-Zbuild-std=core` under `RUSTC_BOOTSTRAP`),
//! whole-program LTO, and `--emit=asm`; the linker does nothing, since the assembly is the product.
//!
//! ```no_run
//! let ptx = cuda_builder::CudaBuilder::new("../kernels").arch("sm_80", "ptx71").build()?;
//! std::fs::write("kernels.ptx", ptx.text)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Two of the flags are correctness: without them rustc copies barriers into divergent branches. See [`FLAGS`].

mod bounds;
mod rust_src;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

pub use bounds::write_launch_bounds;
pub use rust_src::{find_rust_src, rust_src_cache};

/// What every device build is compiled with, beside target CPU and PTX version.
///
/// - `-JumpThreading` and `-simplifycfg-max-small-block-size=0`: keep barriers, shuffles and inline assembly out of the
///   branches around them (rust-lang/rust#137086; correctness, not speed).
/// - `-fp-contract=fast`: `a * b + c` is one `fma.rn`, as in CUDA C++.
/// - `-unroll-threshold=2000`: accumulator arrays stay in registers.
pub const FLAGS: &[&str] = &[
    "-Zmir-enable-passes=-JumpThreading",
    "-Cllvm-args=-simplifycfg-max-small-block-size=0",
    "-Cllvm-args=-fp-contract=fast",
    "-Cllvm-args=-unroll-threshold=2000",
];

/// A device build to be.
#[derive(Clone, Debug)]
pub struct CudaBuilder {
    crate_dir: PathBuf,
    arch: String,
    ptx_version: String,
    out_dir: Option<PathBuf>,
}

/// PTX of one architecture.
#[derive(Clone, Debug)]
pub struct Ptx {
    /// The module's text, launch bounds written in.
    pub text: String,
    /// Files the build read: a build script reruns when one changes.
    pub sources: Vec<PathBuf>,
}

/// Why there is no PTX.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message documents the variant")]
pub enum Error {
    #[error(
        "the source of `core` for rustc {version} was not found; tried the toolchain ({toolchain}), $RUST_SRC_PATH ({variable}) \
         and the cache ({cache}); run `cargo xtask setup`, or `rustup component add rust-src`, or set RUST_SRC_PATH to a \
         `library` folder of exactly this version"
    )]
    NoRustSrc { version: String, toolchain: String, variable: String, cache: String },
    #[error("cannot start {program}: {source}")]
    Start { program: String, source: io::Error },
    #[error("the device build of {crate_dir} failed ({status}):\n{output}")]
    Build { crate_dir: String, status: String, output: String },
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("PTX entry {entry}: {problem}")]
    Bounds { entry: String, problem: &'static str },
}

impl CudaBuilder {
    /// A build of the kernel crate in `crate_dir`, for sm_80 with the lowest PTX version that has its instructions, 7.1.
    pub fn new(crate_dir: impl AsRef<Path>) -> Self {
        Self {
            crate_dir: crate_dir.as_ref().to_owned(),
            arch: "sm_80".into(),
            ptx_version: "ptx71".into(),
            out_dir: None,
        }
    }

    /// The architecture (`sm_80`, `sm_90a`) and PTX version (`ptx71`, `ptx80`). Lower versions load on older drivers.
    pub fn arch(mut self, arch: &str, ptx_version: &str) -> Self {
        (self.arch, self.ptx_version) = (arch.into(), ptx_version.into());
        self
    }

    /// Where the nested cargo builds; default `$OUT_DIR/ptx-ARCH`.
    pub fn out_dir(mut self, out_dir: impl AsRef<Path>) -> Self {
        self.out_dir = Some(out_dir.as_ref().to_owned());
        self
    }

    /// Compiles, and writes the kernels' launch bounds into the PTX.
    ///
    /// # Errors
    ///
    /// - [`Error::NoRustSrc`] if `core`'s source is nowhere.
    /// - [`Error::Start`], [`Error::Build`] if cargo or the compiler fail; the compiler's output is in the message.
    /// - [`Error::Bounds`] if an entry was not made by `#[kernel]`.
    /// - [`Error::Io`] on files.
    pub fn build(&self) -> Result<Ptx, Error> {
        let rust_src = find_rust_src()?;
        let out_dir = self.out_dir.clone().unwrap_or_else(|| {
            PathBuf::from(env::var_os("OUT_DIR").expect("a build script, or a call of `out_dir`"))
                .join(format!("ptx-{}", self.arch))
        });
        let io = |what: &str| {
            let what = what.to_owned();
            move |source| Error::Io { what, source }
        };
        fs::create_dir_all(&out_dir).map_err(io("cannot make the build folder"))?;
        let linker = out_dir.join("no-linker");
        write_no_linker(&linker).map_err(io("cannot write the linker that does nothing"))?;

        let flags = [
            format!("-Ctarget-cpu={}", self.arch),
            format!("-Ctarget-feature=+{}", self.ptx_version),
            format!("-Clinker={}", linker.display()),
        ];
        // `griddepcontrol` came with Hopper; `cuda_std::grid` does without before.
        let hopper = self.arch.strip_prefix("sm_").and_then(|arch| arch.get(..2)).is_some_and(|arch| arch >= "90");
        let programmatic = hopper.then(|| "--cfg=programmatic_launch".to_owned());
        // `wgmma` is of this architecture alone, not of those after it.
        let warpgroups = (self.arch == "sm_90a").then(|| "--cfg=warpgroups".to_owned());
        let flags: Vec<String> = flags
            .into_iter()
            .chain(programmatic)
            .chain(warpgroups)
            .chain(FLAGS.iter().map(|flag| (*flag).to_owned()))
            .collect();
        let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(&cargo);
        command
            .current_dir(&self.crate_dir)
            .args(["rustc", "--lib", "--crate-type=cdylib", "--profile=release"])
            .args(["--target=nvptx64-nvidia-cuda", "-Zbuild-std=core", "--message-format=short"])
            .args(["--config=profile.release.lto='fat'", "--config=profile.release.codegen-units=1"])
            .args(["--config=profile.release.panic='abort'", "--config=profile.release.opt-level=3"])
            .args(["--config=profile.release.debug=false"])
            .arg("--target-dir")
            .arg(&out_dir)
            .args(["--", "--emit=asm,dep-info"])
            // The device has its own flags; the host's, and those of a wrapping clippy or coverage run, do not apply.
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
            .env("RUSTC_BOOTSTRAP", "1")
            .env("__CARGO_TESTS_ONLY_SRC_ROOT", &rust_src)
            .env_remove("RUSTFLAGS")
            .env_remove("RUSTC_WRAPPER")
            .env_remove("RUSTC_WORKSPACE_WRAPPER")
            .env_remove("CARGO_TARGET_DIR")
            .env_remove("CARGO_BUILD_TARGET")
            .env_remove("CARGO_MAKEFLAGS")
            .env_remove("MAKEFLAGS");
        let output = command
            .output()
            .map_err(|source| Error::Start { program: cargo.to_string_lossy().into_owned(), source })?;
        if !output.status.success() {
            return Err(Error::Build {
                crate_dir: self.crate_dir.display().to_string(),
                status: output.status.to_string(),
                output: String::from_utf8_lossy(&output.stderr).into_owned(),
            });
        }

        let deps = out_dir.join("nvptx64-nvidia-cuda/release/deps");
        let assembly = newest(&deps, "s").map_err(io("cannot read the assembly"))?;
        let text = fs::read_to_string(&assembly).map_err(io("cannot read the assembly"))?;
        let sources =
            sources_of(&out_dir.join("nvptx64-nvidia-cuda/release")).map_err(io("cannot read the dep-info"))?;
        Ok(Ptx { text: write_launch_bounds(&text, hopper)?, sources })
    }
}

fn write_no_linker(path: &Path) -> io::Result<()> {
    fs::write(path, "#!/bin/sh\nexit 0\n")?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// The newest file with this extension: an incremental rebuild may leave older ones of other hashes behind.
fn newest(folder: &Path, extension: &str) -> io::Result<PathBuf> {
    let mut found = None;
    for file in fs::read_dir(folder)? {
        let path = file?.path();
        if path.extension().is_some_and(|e| e == extension) {
            let modified = fs::metadata(&path)?.modified()?;
            if found.as_ref().is_none_or(|(latest, _)| modified > *latest) {
                found = Some((modified, path));
            }
        }
    }
    found.map(|(_, path)| path).ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "rustc wrote no assembly"))
}

/// The source files in the make-style `.d` files cargo writes beside the artifact.
fn sources_of(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut sources = Vec::new();
    for file in fs::read_dir(folder)? {
        let path = file?.path();
        if path.extension().is_some_and(|e| e == "d") {
            let text = fs::read_to_string(&path)?;
            let Some((_, files)) = text.lines().next().and_then(|line| line.split_once(": ")) else {
                continue;
            };
            // Make escapes spaces in names with a backslash.
            sources.extend(files.replace("\\ ", "\0").split(' ').map(|file| PathBuf::from(file.replace('\0', " "))));
        }
    }
    Ok(sources)
}
