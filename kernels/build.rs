//! Compiles the CUDA kernels: with nvcc for GPUs (feature `cuda`), as C++ for tests without one (feature `cuda-emulation`).

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    nvcc::compile();
    #[cfg(feature = "cuda-emulation")]
    emulation::compile();
}

/// One fatbin for each kernel file: machine code for Ampere and Hopper, PTX for what comes later. The driver takes what fits.
#[cfg(feature = "cuda")]
mod nvcc {
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::{env, fs};

    /// Machine code and PTX that go into the binary.
    const TARGETS: [&str; 3] = [
        "arch=compute_80,code=sm_80",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_90,code=compute_90",
    ];

    pub fn compile() {
        for name in ["QUIRE_NVCC", "CUDA_HOME", "PATH"] {
            println!("cargo::rerun-if-env-changed={name}");
        }
        println!("cargo::rerun-if-changed=src/cuda");
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        let Some(nvcc) = find() else {
            println!(
                "cargo::error=the feature `cuda` needs nvcc to compile its kernels, and there is none in QUIRE_NVCC, CUDA_HOME/bin or PATH. \
                 `kernels/nvcc.sh` installs one from PyPI (no GPU, no driver, no root) and prints its path: QUIRE_NVCC=$(kernels/nvcc.sh) cargo build \
                 --features cuda"
            );
            return;
        };
        let mut table = Vec::new();
        for source in sources(Path::new("src/cuda")) {
            let name = source.file_stem().expect("a source has a name");
            let fatbin = out.join(name).with_extension("fatbin");
            if let Err(error) = run(&nvcc, &source, &fatbin) {
                println!("cargo::error={error}");
                return;
            }
            let (name, fatbin) = (name.to_string_lossy(), fatbin.to_string_lossy());
            table.push(format!("({name:?}, &Aligned(*include_bytes!({fatbin:?})))"));
        }
        let table = format!("[{}]", table.join(",\n"));
        fs::write(out.join("fatbins.rs"), table).expect("OUT_DIR can be written to");
    }

    fn find() -> Option<PathBuf> {
        if let Some(nvcc) = env::var_os("QUIRE_NVCC") {
            return Some(PathBuf::from(nvcc));
        }
        let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
        let path = env::var_os("PATH").unwrap_or_default();
        home.into_iter()
            .chain(env::split_paths(&path))
            .map(|folder| folder.join("nvcc"))
            .find(|nvcc| nvcc.is_file())
    }

    fn sources(folder: &Path) -> Vec<PathBuf> {
        let mut sources: Vec<PathBuf> = fs::read_dir(folder)
            .expect("the kernels are in src/cuda")
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|end| end == "cu"))
            .collect();
        sources.sort();
        sources
    }

    fn run(nvcc: &Path, source: &Path, fatbin: &Path) -> Result<(), String> {
        let mut command = Command::new(nvcc);
        // What ptxas says of registers and spills is kept beside the machine code, for `resources.sh`.
        command.args(["-fatbin", "-O3", "-std=c++17", "-Xptxas", "-v"]);
        for target in TARGETS {
            command.args(["-gencode", target]);
        }
        command.arg(source).arg("-o").arg(fatbin);
        let output = command
            .output()
            .map_err(|error| format!("cannot run {}: {error}", nvcc.display()))?;
        if output.status.success() {
            let report = fatbin.with_extension("ptxas");
            return fs::write(&report, output.stderr)
                .map_err(|error| format!("cannot write {}: {error}", report.display()));
        }
        let text = String::from_utf8_lossy(&output.stderr);
        // One line a message: cargo prints no more of it.
        let text: Vec<&str> = text.lines().collect();
        Err(format!("nvcc {}: {}", source.display(), text.join(" | ")))
    }
}

#[cfg(feature = "cuda-emulation")]
mod emulation {
    pub fn compile() {
        for folder in ["src/cuda", "cuda-emulation"] {
            println!("cargo::rerun-if-changed={folder}");
        }
        cc::Build::new()
            .cpp(true)
            .std("c++17")
            .file("cuda-emulation/emulation.cpp")
            .include("cuda-emulation")
            .include("src/cuda")
            .define("QUIRE_EMULATION", None)
            // Fibers jump between stacks, which fortified `longjmp` takes for an attack.
            .flag("-U_FORTIFY_SOURCE")
            .flag("-Wno-unknown-pragmas")
            // A sum of a product is rounded twice unless the kernel says otherwise; what nvcc makes of it is the kernel's affair.
            .flag("-ffp-contract=off")
            .opt_level(2)
            .compile("quire_cuda_emulation");
    }
}
