//! Output of pictures: formats, folders, templates and stdout.

use super::{files, respodiff, text};

/// The bytes with which files of each format begin, and the number of those before the first chunk or segment.
const MAGIC: [(&str, &[u8], usize); 4] =
    [("png", b"\x89PNG", 8), ("jpg", b"\xff\xd8\xff", 2), ("jpeg", b"\xff\xd8\xff", 2), ("webp", b"RIFF", 12)];

/// IPTC's name for media that a trained algorithm made, as Pillow's `getxmp` and exiftool read it out of such files.
const TRAINED_ALGORITHMIC_MEDIA: &str = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia";

/// The digital source type in a file's XMP packet, which is found where the XMP specification puts it, in a chunk or
/// segment from `at` on.
fn digital_source_type(file: &[u8], extension: &str, mut at: usize) -> String {
    let number = |bytes: &[u8]| bytes.iter().fold(0, |number, byte| number << 8 | usize::from(*byte));
    let packet = loop {
        let rest = &file[at..];
        let (name, body, size) = match extension {
            "png" => (&rest[4..8], &rest[8..8 + number(&rest[..4])], 12 + number(&rest[..4])),
            "webp" => {
                let size = u32::from_le_bytes(rest[4..8].try_into().unwrap()) as usize;
                (&rest[..4], &rest[8..8 + size], 8 + size.next_multiple_of(2))
            }
            _ => (&rest[..2], &rest[4..2 + number(&rest[2..4])], 2 + number(&rest[2..4])),
        };
        at += size;
        // An iTXt chunk has two flags and two empty texts between its keyword and its text.
        let found = match name {
            b"iTXt" => body.strip_prefix(b"XML:com.adobe.xmp\0\0\0\0\0"),
            b"XMP " => Some(body),
            b"\xff\xe1" => body.strip_prefix(b"http://ns.adobe.com/xap/1.0/\0"),
            _ => None,
        };
        if let Some(packet) = found {
            break String::from_utf8(packet.to_vec()).unwrap();
        }
    };
    let value = packet.split_once("Iptc4xmpExt:DigitalSourceType=\"").unwrap().1;
    value.split('"').next().unwrap().to_string()
}

#[test]
fn names_choose_formats_folders_and_templates() {
    let folder = tempfile::tempdir().unwrap();
    let run = |out: &str, more: &[&str]| {
        let args = ["sample", "-p", "a cook", "--steps", "1", "-s", "3", "--quiet", "-o", out];
        respodiff(folder.path(), &[&args[..], more].concat())
    };
    for (extension, magic, header) in MAGIC {
        let name = format!("x.{extension}");
        let output = run(&name, &[]);
        assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output.stderr));
        let bytes = std::fs::read(folder.path().join(&name)).unwrap();
        assert!(bytes.starts_with(magic), "{name}");
        assert_eq!(digital_source_type(&bytes, extension, header), TRAINED_ALGORITHMIC_MEDIA, "{name}");
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
