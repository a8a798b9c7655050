//! Compiles `kernels/*.cu` when it finds nvcc: one fatbin per file, and a table of the resources that each kernel
//! needs.
//!
//! nvcc is looked for in this order: `NVCC` (empty: build without), `CUDA_HOME` and `CUDA_PATH`, `PATH`, and the
//! packages of kernels/requirements.txt, in `.venv` here or in the active Python.

use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs, thread};

const FLAGS: &[&str] = &["-std=c++17", "-O3", "--fatbin", "-Xptxas=-v", "-Xfatbin=-compress-all"];

/// GPUs that get machine code of the portable sources, as far as nvcc knows them: A100, RTX 30, RTX 40, B200, RTX 50.
/// Other GPUs run the code of an older GPU of their generation, or compile the PTX.
const PORTABLE: &[&str] = &["sm_80", "sm_86", "sm_89", "sm_100", "sm_120"];

/// Prefix of sources that only tests launch; release programs do not contain them.
const TEST_ONLY: &str = "conformance";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "VIRTUAL_ENV"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(variable("OUT_DIR"));
    let mut families = Vec::new();
    if let Some(nvcc) = find_nvcc() {
        println!("cargo::rerun-if-changed={}", nvcc.display());
        // Tests look for cuobjdump beside nvcc.
        println!("cargo::rustc-env=RESPODIFF_NVCC={}", nvcc.display());
        match compile_all(&nvcc, &out) {
            Ok(compiled) => families = compiled,
            Err(problem) => {
                for line in problem.lines() {
                    println!("cargo::error={line}");
                }
                return;
            }
        }
    } else {
        println!("cargo::warning=no nvcc: building without CUDA kernels, for the CPU only (README.md, On a GPU)");
    }
    fs::write(out.join("compiled.rs"), table(&families)).expect("OUT_DIR can be written");
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_default()
}

fn find_nvcc() -> Option<PathBuf> {
    let program = format!("nvcc{}", env::consts::EXE_SUFFIX);
    if let Some(nvcc) = env::var_os("NVCC") {
        return (!nvcc.is_empty()).then(|| PathBuf::from(nvcc));
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(|home| Path::new(&home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = homes.chain(env::split_paths(&path)).filter(|folder| folder.is_absolute());
    let packages = [".venv/bin/python3", ".venv/Scripts/python.exe", "python3"].into_iter().flat_map(packaged);
    folders.chain(packages).map(|folder| folder.join(&program)).find(|nvcc| nvcc.is_file())
}

/// The folders in which NVIDIA's packages for `python` keep their programs.
fn packaged(python: &str) -> Vec<PathBuf> {
    let code = "import nvidia; print(*nvidia.__path__, sep='\\n')";
    let Ok(output) = Command::new(python).args(["-c", code]).output() else { return Vec::new() };
    let folders = String::from_utf8_lossy(&output.stdout).into_owned();
    folders.lines().map(|folder| Path::new(folder).join("cu13/bin")).collect()
}

/// A compiled source file: its name, its fatbin, and nvcc's messages.
struct Family {
    name: String,
    fatbin: PathBuf,
    log: String,
}

/// The flags for every file: machine code for [`PORTABLE`], the instructions of 9.0 for that GPU alone, and PTX for the
/// rest.
fn flags(nvcc: &Path) -> Result<Vec<String>, String> {
    let offered = Command::new(nvcc).arg("--list-gpu-code").output();
    let offered = offered.map_err(|e| format!("cannot run {}: {e}", nvcc.display()))?;
    let offered = String::from_utf8_lossy(&offered.stdout).into_owned();
    let known = |code: &&&str| offered.split_whitespace().any(|word| word == **code);
    let codes: Vec<&str> = PORTABLE.iter().filter(known).copied().chain(["compute_80"]).collect();
    let targets = [
        format!("-gencode=arch=compute_80,code=[{}]", codes.join(",")),
        "-gencode=arch=compute_90a,code=sm_90a".to_string(),
    ];
    // Profilers find a kernel's lines only with these tables, which are as large as the code itself. A profile of cargo
    // that has debug information gets them.
    let lines = env::var("DEBUG").is_ok_and(|debug| debug != "false").then(|| "-lineinfo".to_string());
    Ok(FLAGS.iter().map(|flag| flag.to_string()).chain(lines).chain(targets).collect())
}

/// Compiles all of `kernels/*.cu`, as many at a time as cargo allows.
fn compile_all(nvcc: &Path, out: &Path) -> Result<Vec<Family>, String> {
    let version = Command::new(nvcc).arg("--version").output();
    let version = version.map_err(|e| format!("cannot run {}: {e}; set NVCC to CUDA's nvcc", nvcc.display()))?;
    let flags = flags(nvcc)?;
    let mut sources: Vec<PathBuf> = Vec::new();
    let mut common = DefaultHasher::new();
    (version.stdout, &flags).hash(&mut common);
    let mut files: Vec<PathBuf> =
        fs::read_dir("kernels").expect("kernels/").flatten().map(|file| file.path()).collect();
    files.sort();
    let tests = env::var_os("CARGO_FEATURE_EMULATED").is_some();
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        match file.extension().and_then(|e| e.to_str()) {
            Some("cu") if !tests && name.starts_with(TEST_ONLY) => {}
            Some("cu") => sources.push(file),
            Some("cuh") => fs::read(&file).expect("a header").hash(&mut common),
            _ => {}
        }
    }
    let waiting = Mutex::new(sources.iter());
    let next = || waiting.lock().expect("no thread panics with it").next();
    let done = Mutex::new(Vec::new());
    let jobs = variable("NUM_JOBS").parse().unwrap_or(1);
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(source) = next() {
                    let family = compile(nvcc, &flags, source, common.clone(), out);
                    done.lock().expect("no thread panics with it").push(family);
                }
            });
        }
    });
    let done = done.into_inner().expect("no thread panics with it");
    let (good, bad): (Vec<_>, Vec<_>) = done.into_iter().partition(Result::is_ok);
    if !bad.is_empty() {
        return Err(bad.into_iter().filter_map(Result::err).collect::<Vec<_>>().join("\n"));
    }
    let mut families: Vec<Family> = good.into_iter().flatten().collect();
    families.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(families)
}

/// Compiles one file, unless the existing fatbin was made from the same sources, flags and nvcc, as the first line of
/// its log tells.
fn compile(nvcc: &Path, flags: &[String], source: &Path, mut key: DefaultHasher, out: &Path) -> Result<Family, String> {
    let name = source.file_stem().expect("a file's name").to_string_lossy().into_owned();
    fs::read(source).expect("a source").hash(&mut key);
    let key = format!("{:016x}\n", key.finish());
    let [fatbin, log_file] = ["fatbin", "log"].map(|extension| out.join(&name).with_extension(extension));
    match fs::read_to_string(&log_file) {
        Ok(log) if log.starts_with(&key) => return Ok(Family { name, fatbin, log }),
        _ => {}
    }
    let output = Command::new(nvcc).args(flags).arg("-o").arg(&fatbin).arg(source).output();
    let output = output.map_err(|e| format!("cannot run {}: {e}", nvcc.display()))?;
    let log = key + &String::from_utf8_lossy(&output.stderr);
    let file = source.display();
    if !output.status.success() {
        return Err(format!("{file}: nvcc failed\n{log}"));
    }
    if let Some(problems) = problems(&log) {
        return Err(format!("{file}: {problems}"));
    }
    fs::write(&log_file, &log).expect("OUT_DIR can be written");
    Ok(Family { name, fatbin, log })
}

/// Spilled registers, and tensor-core instructions that ptxas had to serialise: both are slow and always a mistake.
fn problems(log: &str) -> Option<String> {
    let spilled = kernels(log).into_iter().filter(|kernel| kernel.spills > 0).map(|kernel| {
        format!("kernel {} spills {} bytes of registers on sm_{}", kernel.name, kernel.spills, kernel.architecture)
    });
    let serialised = log.lines().filter(|line| line.contains("(C75")).map(str::to_string);
    let problems: Vec<String> = spilled.chain(serialised).collect();
    (!problems.is_empty()).then(|| problems.join("\n"))
}

struct Kernel<'a> {
    name: &'a str,
    architecture: &'a str,
    registers: u32,
    shared: u32,
    stack: u32,
    spills: u32,
}

/// The report of `ptxas -v` for each kernel, once per architecture.
fn kernels(log: &str) -> Vec<Kernel<'_>> {
    let mut kernels: Vec<Kernel> = Vec::new();
    for line in log.lines() {
        let before = |unit: &str| -> Option<u32> { line.split(unit).next()?.split_whitespace().last()?.parse().ok() };
        let number = |unit: &str| line.contains(unit).then(|| before(unit)).flatten().unwrap_or(0);
        if let Some((_, entry)) = line.split_once("Compiling entry function '") {
            let mut words = entry.split('\'');
            let (name, architecture) = (words.next().unwrap_or(""), words.nth(1).unwrap_or(""));
            let architecture = architecture.trim_start_matches("sm_");
            kernels.push(Kernel { name, architecture, registers: 0, shared: 0, stack: 0, spills: 0 });
        } else if let Some(kernel) = kernels.last_mut() {
            if line.contains("bytes spill stores") {
                kernel.stack = number(" bytes stack frame");
                kernel.spills = number(" bytes spill stores") + number(" bytes spill loads");
            } else if line.contains(" registers") {
                kernel.registers = number(" registers");
                kernel.shared = number(" bytes smem");
            }
        }
    }
    kernels
}

/// The Rust source that src/cuda/compiled.rs includes.
fn table(families: &[Family]) -> String {
    let mut text = String::from(
        "/// The compiled kernels, one family for each source file.\npub static FAMILIES: &[Family] = &[\n",
    );
    for Family { name, fatbin, log } in families {
        let mut names: Vec<&str> = kernels(log).into_iter().map(|kernel| kernel.name).collect();
        names.sort_unstable();
        names.dedup();
        let path = fatbin.display().to_string();
        writeln!(text, "    Family {{ name: {name:?}, fatbin: aligned!({path:?}), kernels: &{names:?} }},")
            .expect("a string");
    }
    text.push_str("];\n/// Every kernel, once for each architecture.\npub static RESOURCES: &[Resources] = &[\n");
    for kernel in families.iter().flat_map(|family| kernels(&family.log)) {
        let Kernel { name, architecture, registers, shared, stack, .. } = kernel;
        writeln!(
            text,
            "    Resources {{ kernel: {name:?}, architecture: {architecture:?}, registers: {registers}, \
             shared: {shared}, stack: {stack} }},"
        )
        .expect("a string");
    }
    text + "];\n"
}
