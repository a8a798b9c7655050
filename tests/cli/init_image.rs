//! Pictures to begin with, on the command line.

use super::{files, respodiff, text};
use respodiff::Picture;
use std::path::Path;

/// A picture of which every pixel differs from its neighbours.
fn write_picture(path: &Path, width: u32, height: u32) {
    let rgb = (0..width * height * 3).map(|i| (i * 7 % 251) as u8).collect();
    Picture { width, height, rgb }.save_png(path, &[]).unwrap();
}

/// A mask that is light in a rectangle alone.
fn write_mask(path: &Path, size: (u32, u32), columns: std::ops::Range<u32>, rows: std::ops::Range<u32>) {
    let light = |i: u32| columns.contains(&(i % size.0)) && rows.contains(&(i / size.0));
    let rgb = (0..size.0 * size.1).flat_map(|i| [if light(i) { 255 } else { 0 }; 3]).collect();
    Picture { width: size.0, height: size.1, rgb }.save_png(path, &[]).unwrap();
}

fn record(path: &Path) -> (serde_json::Value, String) {
    let tags = respodiff::image::read_png_text(path).unwrap();
    let of = |keyword: &str| tags.iter().find(|(known, _)| known == keyword).unwrap().1.clone();
    (serde_json::from_str(&of("respodiff")).unwrap(), of("parameters"))
}

#[test]
fn pictures_are_made_from_pictures_and_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let run = |args: &str| {
        let output = respodiff(folder.path(), &args.split(' ').collect::<Vec<_>>());
        assert!(output.status.success(), "{args}: {}", text(&output.stderr));
        text(&output.stderr)
    };
    let read = |name: &str| Picture::read(&at(name), 255).unwrap();
    write_picture(&at("in.png"), 75, 60);
    // The picture's own size in multiples of 8, and 0.8 of 5 steps.
    run("sample cook --image in.png --steps 5 --seed 1 -o a.png -q");
    assert_eq!((read("a.png").width, read("a.png").height), (72, 56));
    let (json, parameters) = record(&at("a.png"));
    assert_eq!(json["init_image"]["strength"], 0.8);
    assert_eq!(json["init_image"]["picture"]["sha256"].as_str().unwrap().len(), 64);
    assert!(parameters.contains("Denoising strength: 0.8, Init image hash: "), "{parameters}");
    assert!(run("rerun a.png").contains("the same picture"));
    assert_eq!(std::fs::read(at("a.png")).unwrap(), std::fs::read(at("a-again.png")).unwrap());
    // The proportions are kept, and concepts compose.
    run("sample cook --image in.png -W 40 --steps 3 --strength 0.5 --concept woman --seed 1 -o b.png -q");
    assert_eq!((read("b.png").width, read("b.png").height), (40, 32));
    assert!(run("rerun b.png").contains("the same picture"));
    // Outside the mask the picture stays as it is: in its own size if a part is painted.
    write_mask(&at("mask.png"), (75, 60), 30..50, 10..30);
    run("sample cook --image in.png --mask mask.png -W 72 -H 56 --steps 3 --seed 1 -o c.png -q");
    assert!(run("rerun c.png").contains("the same picture"));
    run("sample cook --image in.png --mask mask.png --inpaint-padding 4 --steps 3 --seed 1 --batch 2 -o d.png -q");
    let (whole, painted) = (read("in.png"), read("d-1.png"));
    assert_eq!((painted.width, painted.height), (75, 60));
    let mut changed = 0;
    for (i, (old, new)) in whole.rgb.chunks(3).zip(painted.rgb.chunks(3)).enumerate() {
        let light = (30..50).contains(&(i % 75)) && (10..30).contains(&(i / 75));
        assert!(light || old == new, "pixel {i} changed");
        changed += usize::from(old != new);
    }
    assert!(changed > 300, "only {changed} of 400 pixels were painted");
    assert!(run("rerun d-1.png").contains("the same picture"));
    let (_, parameters) = record(&at("d-1.png"));
    assert!(parameters.contains("Inpaint area: Only masked, Masked area padding: 4"), "{parameters}");
    // A second pass at a larger size, whose sides are multiples of 8.
    let first = "sample cook --image in.png -W 40 -H 32 --steps 3 --seed 1 --batch 2 --save-latents h.st -o h.png -q";
    run(&format!("{first} --hires 1.5 --hires-strength 0.4 --hires-steps 5"));
    assert_eq!((read("h-1.png").width, read("h-1.png").height), (64, 48));
    assert_eq!(super::tensors(&at("h.st"))["latents"].0, [2, 4, 6, 8]);
    let (json, parameters) = record(&at("h-1.png"));
    assert_eq!((json["width"].as_u64(), json["hires"]["steps"].as_u64()), (Some(40), Some(5)));
    let expected = "Denoising strength: 0.4, Init image strength: 0.8, Hires upscale: 1.5, Hires steps: 5, Hires ";
    assert!(parameters.contains("Size: 40x32") && parameters.contains(expected), "{parameters}");
    assert!(run("rerun h-1.png").contains("the same picture"));
    // A picture that has changed is not taken for the recorded one.
    write_picture(&at("in.png"), 74, 60);
    let output = respodiff(folder.path(), &["rerun", "a.png"]);
    assert!(output.status.code() == Some(1) && text(&output.stderr).contains("in.png: has changed"));
}

#[test]
fn wrong_pictures_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    write_picture(&folder.path().join("in.png"), 64, 64);
    write_mask(&folder.path().join("dark.png"), (64, 64), 0..0, 0..0);
    std::fs::write(folder.path().join("cut.jpg"), b"\xff\xd8\xff\xe0 and no more").unwrap();
    std::fs::write(folder.path().join("text.png"), "hello").unwrap();
    let before = files(folder.path());
    for (args, code, word) in [
        ("--image nowhere.png", 1, "nowhere.png"),
        ("--image .", 1, "directory"),
        ("--image cut.jpg", 1, "cut.jpg"),
        ("--image text.png", 1, "not a PNG, JPEG or WebP"),
        ("--image in.png --mask text.png", 1, "text.png"),
        ("--image in.png --mask dark.png", 2, "--mask"),
        ("--mask in.png", 2, "--image"),
        ("--strength 0.5", 2, "--image"),
        ("--image in.png --inpaint-padding 3", 2, "--mask"),
        ("--image in.png --strength 1.5", 2, "--strength"),
        ("--image in.png --strength -1", 2, "--strength"),
        ("--image in.png --strength NaN", 2, "--strength"),
        ("--image in.png --strength 0.01", 2, "none of 3 steps"),
        ("--image in.png --out in.png", 2, "overwritten"),
        ("--hires 0.5", 2, "--hires"),
        ("--hires NaN", 2, "--hires"),
        ("--hires 2 --hires-strength 0", 2, "--hires-strength"),
        ("--hires 2 --hires-steps 0", 2, "--hires-steps"),
        ("--hires-steps 4", 2, "--hires"),
        ("--image in.png --mask in.png --hires 2", 2, "--hires"),
    ] {
        let args: Vec<&str> = ["sample", "x", "--steps", "3"].into_iter().chain(args.split(' ')).collect();
        let output = respodiff(folder.path(), &args);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
        assert!(error.contains(word) && !error.contains("panicked"), "{args:?}: {error}");
        assert_eq!(files(folder.path()), before, "{args:?}");
    }
}
