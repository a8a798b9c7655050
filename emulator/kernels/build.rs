//! Compiles every kernel of the engine with the host's compiler, calling out at each load and store.

fn main() {
    let kernels = std::path::absolute("../../kernels").expect("a folder");
    println!("cargo::rerun-if-changed={}", kernels.display());
    let runtime = std::env::var("DEP_RESPODIFF_EMULATOR_INCLUDE").expect("the emulator's build script names it");
    println!("cargo::rerun-if-changed={runtime}");
    let sources = std::fs::read_dir(&kernels).expect("the kernels' folder").flatten().map(|entry| entry.path());
    let mut sources: Vec<_> = sources.filter(|path| path.extension().is_some_and(|e| e == "cu")).collect();
    sources.sort();
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .flags(["-xc++", "-g1", "-mavx2", "-mfma", "-mf16c", "-mbmi2", "-ffp-contract=off", "-fno-exceptions"])
        .flags(["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"])
        .flags(["-Wno-psabi", "-Wno-unknown-pragmas"])
        .warnings(false)
        .include(runtime)
        .include(&kernels)
        .files(sources)
        // Kernels register themselves: every object must be kept.
        .link_lib_modifier("+whole-archive")
        .compile("emulated_kernels");
}
