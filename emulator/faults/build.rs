//! Compiles the faulty kernels as those of the engine are compiled.

use std::path::Path;

fn main() {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels");
    println!("cargo::rerun-if-changed={}", kernels.display());
    let runtime = std::env::var("DEP_RESPODIFF_EMULATOR_INCLUDE").expect("the emulator's build script names it");
    println!("cargo::rerun-if-changed={runtime}");
    println!("cargo::rerun-if-changed=faults.cu");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .flags(["-xc++", "-g1", "-mavx2", "-mfma", "-mf16c", "-mbmi2", "-ffp-contract=off", "-fno-exceptions"])
        .flags(["-fsanitize=thread", "-fsanitize=alignment", "--param", "tsan-instrument-func-entry-exit=0"])
        .flags(["-Wno-psabi", "-Wno-unknown-pragmas"])
        .warnings(false)
        .include(runtime)
        .include(&kernels)
        .file("faults.cu")
        // Kernels register themselves: every object must be kept.
        .link_lib_modifier("+whole-archive")
        .compile("faulty_kernels");
}
