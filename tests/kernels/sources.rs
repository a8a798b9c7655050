//! Constructs that the kernels' sources may not contain: those that the emulator cannot see, or that a host compiler
//! cannot compile.

#[test]
fn primitives_come_from_ptx_cuh_alone() {
    let forbidden = ["asm", "__asm__", "__shared__", "<<<", "__atomic_", "__CUDACC__", "__CUDA_ARCH", "__nv"];
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let mut seen = 0;
    for file in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with("ptx") || !(name.ends_with(".cu") || name.ends_with(".cuh")) {
            continue;
        }
        seen += 1;
        for (number, line) in std::fs::read_to_string(&file).unwrap().lines().enumerate() {
            let code = line.split("//").next().unwrap();
            let words = |c: char| !c.is_alphanumeric() && c != '_';
            let holds = |what: &str| match what {
                "asm" => code.split(words).any(|word| word == what),
                _ => code.contains(what),
            };
            let found = forbidden.iter().find(|what| holds(what));
            assert!(found.is_none(), "kernels/{name}:{}: {} belongs in ptx.cuh", number + 1, found.unwrap());
            let local = code.trim_start().strip_prefix("#include").is_none_or(|file| file.trim().starts_with('"'));
            assert!(local, "kernels/{name}:{}: kernels include their own headers only", number + 1);
        }
    }
    assert!(seen >= 3, "kernels/ holds {seen} sources");
}
