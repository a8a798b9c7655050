//! Compiles the runtime, and tells crates with kernels where its headers are.

fn main() {
    let runtime = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("runtime");
    println!("cargo::rerun-if-changed=runtime");
    println!("cargo::metadata=include={}", runtime.display());
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .flags(["-g1", "-mavx2", "-mfma", "-mf16c", "-mbmi2", "-ffp-contract=off", "-fno-exceptions", "-Wno-psabi"])
        .warnings(false)
        .file(runtime.join("emu.cc"))
        .compile("emulator_runtime");
}
