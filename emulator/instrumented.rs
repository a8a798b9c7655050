/// Compiles CUDA sources with the host's compiler, instrumenting every load and store; `kernels` is the folder of the
/// engine's headers. Included by build scripts.
fn compile(name: &str, kernels: &str, sources: impl IntoIterator<Item = std::path::PathBuf>) {
    let kernels = std::fs::canonicalize(kernels).expect("a folder");
    let runtime = std::env::var("DEP_RESPODIFF_EMULATOR_INCLUDE").expect("the emulator's build script names it");
    for path in [kernels.to_str().expect("a name"), &runtime] {
        println!("cargo::rerun-if-changed={path}");
    }
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .flags(["-xc++", "-g1", "-mavx2", "-mfma", "-mf16c", "-mbmi2", "-ffp-contract=off", "-fno-exceptions"])
        .flags(["-fsanitize=thread", "-fsanitize=alignment", "--param", "tsan-instrument-func-entry-exit=0"])
        .flags(["-Wno-psabi", "-Wno-unknown-pragmas"])
        .warnings(false)
        .include(runtime)
        .include(kernels)
        .files(sources)
        // Kernels register themselves, so the linker must keep every object.
        .link_lib_modifier("+whole-archive")
        .compile(name);
}
