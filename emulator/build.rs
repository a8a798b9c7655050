//! Compiles the runtime, and tells crates with kernels where its headers are.

fn main() {
    let arch = std::env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    assert!(arch == "x86_64", "the emulator switches threads with x86-64 code; there is no port to {arch}");
    let runtime = std::path::absolute("runtime").expect("a folder");
    println!("cargo::rerun-if-changed=runtime");
    println!("cargo::metadata=include={}", runtime.display());
    let sources = std::fs::read_dir(&runtime).expect("the runtime's folder").flatten().map(|entry| entry.path());
    let mut sources: Vec<_> = sources.filter(|path| path.extension().is_some_and(|e| e == "cc")).collect();
    sources.sort();
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(3)
        .flags(["-g1", "-mavx2", "-mfma", "-mf16c", "-mbmi2", "-ffp-contract=off", "-fno-exceptions", "-Wno-psabi"])
        // The stack switch writes below the stack pointer.
        .flag("-mno-red-zone")
        .files(sources)
        .compile("emulator_runtime");
}
