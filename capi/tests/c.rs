//! C and C++ programs with the library: the example and the attacks, plainly, and under the sanitizers of gcc. The
//! header is the one that the sources give.

#![cfg(unix)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|problem| panic!("{command:?}: {problem}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?}\n{said}{}", String::from_utf8_lossy(&output.stderr));
    said
}

/// The folder of the shared library. Cargo does not build it for tests.
fn library() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        // This program is in TARGET/PROFILE/deps.
        let program = std::env::current_exe().unwrap();
        let folder = program.ancestors().nth(2).unwrap().to_path_buf();
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--lib", "--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")]);
        cargo.args(["--target-dir".as_ref(), folder.parent().unwrap().as_os_str()]);
        if folder.ends_with("release") {
            cargo.arg("--release");
        }
        run(&mut cargo);
        folder
    })
}

/// Compiles a C file with the strictest warnings, links it with the library, and gives the program.
fn compiled(folder: &Path, file: &str, flags: &[&str]) -> Command {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = folder.join("program");
    let mut compiler = Command::new(if flags.contains(&"c++") { "c++" } else { "cc" });
    compiler.args(flags).args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-g", "-D_XOPEN_SOURCE=700", "-I"]);
    compiler.arg(root).arg(root.join(file)).args(["-x", "none", "-o"]).arg(&program);
    compiler.arg("-L").arg(library()).args(["-lrespodiff", "-lpthread"]);
    compiler.arg(format!("-Wl,-rpath,{}", library().display()));
    run(&mut compiler);
    let mut program = Command::new(program);
    program.current_dir(folder);
    program
}

#[test]
fn the_header_is_that_of_the_sources() {
    let root = env!("CARGO_MANIFEST_DIR");
    let mut header = Vec::new();
    cbindgen::generate(root).unwrap().write(&mut header);
    let committed = std::fs::read(Path::new(root).join("respodiff.h")).unwrap();
    let advice = "run `cargo run -p respodiff-capi --example header > capi/respodiff.h`";
    assert!(committed == header, "capi/respodiff.h is not what the sources give; {advice}");
    let version = format!(
        "MAJOR {}\n#define RESPODIFF_VERSION_MINOR {}\n#define RESPODIFF_VERSION_PATCH {}\n",
        env!("CARGO_PKG_VERSION_MAJOR"),
        env!("CARGO_PKG_VERSION_MINOR"),
        env!("CARGO_PKG_VERSION_PATCH")
    );
    assert!(String::from_utf8(header).unwrap().contains(&version), "cbindgen.toml names another version");
}

#[test]
fn the_example_writes_two_pictures() {
    for language in [["-std=c99", "-x", "c"], ["-std=c++11", "-x", "c++"]] {
        let folder = tempfile::tempdir().unwrap();
        let said = run(&mut compiled(folder.path(), "examples/generate.c", &language));
        assert!(said.contains("doctor-1.png"), "{said}");
        for name in ["doctor-0.png", "doctor-1.png"] {
            assert!(std::fs::read(folder.path().join(name)).unwrap().starts_with(b"\x89PNG"), "{name}");
        }
    }
}

#[test]
fn no_mistake_of_a_program_harms_the_library() {
    let languages: [&[&str]; 2] = [&["-std=c99", "-x", "c"], &["-std=c++11", "-x", "c++"]];
    for language in languages {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(run(&mut compiled(folder.path(), "tests/attack.c", language)), "all is well\n");
    }
}

/// Reads and writes of the program are checked, and every allocation of both is.
#[test]
#[cfg(target_os = "linux")]
fn sanitizers_find_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let flags = ["-std=c99", "-x", "c", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"];
    let mut program = compiled(folder.path(), "tests/attack.c", &flags);
    assert_eq!(run(program.env("ASAN_OPTIONS", "detect_leaks=1")), "all is well\n");
}
