//! Compiles every kernel of the engine for the emulator.
//!
//! `kernels` and `instrumented.rs` here are symbolic links. A published package holds the files instead, since it
//! cannot reach beyond its own folder.

include!("instrumented.rs");

fn main() {
    let files = std::fs::read_dir("kernels").expect("the kernels' folder").flatten();
    let paths = files.map(|file| std::fs::canonicalize(file.path()).expect("a file"));
    let mut sources: Vec<_> = paths.filter(|path| path.extension().is_some_and(|e| e == "cu")).collect();
    sources.sort();
    compile("emulated_kernels", "kernels", sources);
}
