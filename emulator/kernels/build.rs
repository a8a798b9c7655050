//! Compiles every kernel of the engine for the emulator.

include!("../instrumented.rs");

fn main() {
    let files = std::fs::read_dir("../../kernels").expect("the kernels' folder").flatten();
    let paths = files.map(|file| std::path::absolute(file.path()).expect("a file"));
    let mut sources: Vec<_> = paths.filter(|path| path.extension().is_some_and(|e| e == "cu")).collect();
    sources.sort();
    compile("emulated_kernels", sources);
}
