//! Output of pictures: formats, folders, templates and stdout.

use super::{files, respodiff, text};

/// The bytes with which files of each format begin.
const MAGIC: [(&str, &[u8]); 4] =
    [("png", b"\x89PNG"), ("jpg", b"\xff\xd8\xff"), ("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF")];

#[test]
fn names_choose_formats_folders_and_templates() {
    let folder = tempfile::tempdir().unwrap();
    let run = |out: &str, more: &[&str]| {
        let args = ["sample", "-p", "a cook", "--steps", "1", "-s", "3", "--quiet", "-o", out];
        respodiff(folder.path(), &[&args[..], more].concat())
    };
    for (extension, magic) in MAGIC {
        let name = format!("x.{extension}");
        let output = run(&name, &[]);
        assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output.stderr));
        let bytes = std::fs::read(folder.path().join(&name)).unwrap();
        assert!(bytes.starts_with(magic), "{name}");
        if extension != "png" {
            // EXIF holds the parameters in UTF-16.
            let prompt: Vec<u8> = "a cook".encode_utf16().flat_map(u16::to_be_bytes).collect();
            assert!(bytes.windows(prompt.len()).any(|window| window == prompt), "{name}");
        }
    }
    let output = run("-", &[]);
    assert!(output.stdout.starts_with(b"\x89PNG"));
    assert_eq!(output.stdout, std::fs::read(folder.path().join("x.png")).unwrap());
    assert!(run("new/inner/", &["--batch", "2"]).status.success());
    assert_eq!(files(&folder.path().join("new/inner")), ["a-cook-3-0.png", "a-cook-3-1.png"]);
    assert!(run("new/more/{i}.png", &["--batch", "2"]).status.success());
    assert_eq!(files(&folder.path().join("new/more")), ["0.png", "1.png"]);
    assert!(run("{prompt}_{seed}_{i}.webp", &["--batch", "2"]).status.success());
    assert!(run("{width}x{height}.png", &["-W", "72", "-H", "64"]).status.success());
    let names = files(folder.path());
    for name in ["a-cook_3_0.webp", "a-cook_4_1.webp", "72x64.png"] {
        assert!(names.iter().any(|found| found == name), "{name} is not among {names:?}");
    }
    for (out, more, word) in [
        ("x.gif", &[][..], ".webp"),
        ("other/{colour}.png", &[], "{seed}"),
        ("{width}.png", &[], "--width"),
        ("-", &["--batch", "2"], "stdout"),
        ("-", &["--json"], "stdout"),
    ] {
        let output = run(out, more);
        assert_eq!(output.status.code(), Some(2), "{out}");
        assert!(text(&output.stderr).contains(word), "{}", text(&output.stderr));
    }
    assert_eq!(files(folder.path()), names);
}
