//! The modules of the crate form layers: each refers only to those below it. So a reader can take them in this order,
//! and no module requires knowledge of a later one.

use std::path::{Path, PathBuf};

/// The modules from the bottom up.
const ROOMS: [&str; 23] = [
    "error",
    "json",
    "layout",
    "files",
    "memory",
    "draws",
    "graph",
    "plan",
    "models",
    "diffusion",
    "image",
    "weights",
    "backend",
    "cpu",
    "cuda",
    "device",
    "concept",
    "engine",
    "pipeline",
    "train",
    "eval",
    "bench",
    "cli",
];

/// Items that the crate's root re-exports, and their modules.
const ROOT: [(&str, &str); 14] = [
    ("Error", "error"),
    ("ErrorKind", "error"),
    ("Result", "error"),
    ("Subject", "error"),
    ("Picture", "image"),
    ("Source", "weights"),
    ("Precision", "backend"),
    ("Device", "device"),
    ("Concept", "concept"),
    ("Engine", "engine"),
    ("Image", "engine"),
    ("Request", "engine"),
    ("Session", "engine"),
    ("Size", "engine"),
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        match entry.path() {
            path if path.is_dir() => sources(&path, found),
            path if path.extension().is_some_and(|e| e == "rs") => found.push(path),
            _ => {}
        }
    }
}

/// The names after `crate::` in a line, including those of `crate::{...}`.
fn named(line: &str) -> Vec<&str> {
    let word = |text: &str| text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    let mut names = Vec::new();
    for (at, _) in line.match_indices("crate::") {
        let rest = &line[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            Some(list) => {
                let mut depth = 0;
                for part in list.split_inclusive([',', '{', '}']) {
                    let name = part.trim();
                    if depth == 0 {
                        names.push(&name[..word(name)]);
                    }
                    depth += i32::from(part.ends_with('{')) - i32::from(part.ends_with('}'));
                    if depth < 0 {
                        break;
                    }
                }
            }
            None => names.push(&rest[..word(rest)]),
        }
    }
    names
}

#[test]
fn no_module_refers_to_one_above_it() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let rank = |room: &str| ROOMS.iter().position(|known| *known == room);
    let mut upward = Vec::new();
    let mut seen = 0;
    for file in files {
        let relative = file.strip_prefix(&src).unwrap();
        let room = relative.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs");
        if ["lib", "main"].contains(&room) {
            continue;
        }
        let own = rank(room).unwrap_or_else(|| panic!("`{room}` has no place in `ROOMS`"));
        let text = std::fs::read_to_string(&file).unwrap();
        // Unit tests may use every module, and comments may refer to higher ones.
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        let statements: Vec<&str> = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        for name in named(&statements.join(" ")) {
            let module = ROOT.iter().find(|(item, _)| *item == name).map_or(name, |(_, module)| module);
            let Some(other) = rank(module) else { continue };
            seen += 1;
            if other > own {
                upward.push(format!("{} names {module}", relative.display()));
            }
        }
    }
    assert!(upward.is_empty(), "{upward:#?}");
    assert!(seen > 300, "only {seen} names were found: the sources are read wrongly");
}

#[test]
fn names_are_found_in_lists() {
    let line = "use crate::{Error, graph::{Graph, Shape}, plan::Plan}; let x = crate::cpu::isa();";
    assert_eq!(
        named(line).into_iter().filter(|name| !name.is_empty()).collect::<Vec<_>>(),
        ["Error", "graph", "plan", "cpu"]
    );
}

#[test]
fn the_table_of_contents_names_every_test() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let table = std::fs::read_to_string(folder.join("README.md")).unwrap();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        let shown = if entry.path().is_dir() { format!("`{name}/`") } else { format!("`{name}`") };
        assert!(name == "README.md" || table.contains(&shown), "{shown} is not in tests/README.md");
    }
}
