//! FID, CMMD and CLIP score: features, embeddings and results against clean-fid, torchmetrics and plain numpy
//! (`golden/quality.py`), and runs that are cut, sharded and resumed.

mod support;

use respodiff::ErrorKind;
use respodiff::eval::pictures;
use respodiff::eval::quality::captions::{self, Caption};
use respodiff::eval::quality::{Inception, Moments, cmmd};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn golden(name: &str) -> PathBuf {
    support::golden().join(name)
}

fn rows(case: &support::Case, name: &str) -> Vec<Vec<f32>> {
    let width = case.shape(name)[1];
    case.floats(name).chunks_exact(width).map(<[f32]>::to_vec).collect()
}

fn number(case: &support::Case, name: &str) -> f64 {
    case.metadata()[name].parse().unwrap()
}

/// Rows less the mean of all rows: what distinguishes the pictures.
fn centred(rows: &[Vec<f32>]) -> Vec<f32> {
    let mean = |i: usize| rows.iter().map(|row| row[i]).sum::<f32>() / rows.len() as f32;
    let means: Vec<f32> = (0..rows[0].len()).map(mean).collect();
    rows.iter().flat_map(|row| row.iter().zip(&means).map(|(x, mean)| x - mean)).collect()
}

/// The Inception of pytorch-fid's classes, with clean-fid's reading and resizing of pictures of odd sizes.
#[test]
fn features_match_clean_fid() {
    let case = support::cases("quality", 1).remove(0);
    let inception = Inception::load(&golden("checkpoints/inception/old.pth")).unwrap();
    for set in ["images", "reference"] {
        let truth = rows(&case, &format!("out.features.{set}"));
        let files = pictures::list(&golden("pictures").join(set)).unwrap();
        assert!(files.len() >= 24 && files.len() == truth.len());
        let ours: Vec<Vec<f32>> =
            files.iter().map(|file| inception.features(&pictures::read(file).unwrap()).unwrap()).collect();
        // The batch norms of random weights enlarge roundings, those of PyTorch in fp32 as much as ours. So the truth
        // is the network in float64, and PyTorch's own error the measure.
        let exact = centred(&rows(&case, &format!("out.exact.{set}")));
        let error = support::relative_l2(&centred(&ours), &exact);
        let theirs = support::relative_l2(&centred(&truth), &exact);
        println!("{set}: {error:.1e}, PyTorch's {theirs:.1e}");
        assert!(error < 2.0 * theirs && theirs < 1e-3, "{set} is off by {error:.2e}, PyTorch by {theirs:.2e}");
    }
    // safetensors of the same numbers is the same network.
    let same = Inception::load(&golden("checkpoints/inception/model.safetensors")).unwrap();
    assert_eq!(same.fingerprint(), inception.fingerprint());
    let picture = pictures::read(&golden("pictures/images/00.png")).unwrap();
    assert_eq!(same.features(&picture).unwrap(), inception.features(&picture).unwrap());
}

#[test]
fn distances_match_float64() {
    let case = support::cases("quality", 1).remove(0);
    let off = |ours: f64, truth: f64| (ours / truth - 1.0).abs();
    let of = |name: &str| Moments::of(&rows(&case, name)).unwrap();
    // Full rank: both sides compute in float64, so that only the condition of a root is between them and 2e-16.
    let (a, b) = (of("a"), of("b"));
    let ours = a.distance(&b).unwrap();
    assert!(off(ours, number(&case, "frechet_float64")) < 1e-11, "{ours}");
    assert!(off(b.distance(&a).unwrap(), ours) < 1e-11);
    assert!(off(ours, number(&case, "frechet_cleanfid")) < 1e-9, "{ours}");
    assert!(a.distance(&a).unwrap().abs() < 1e-9 * ours);
    // Fewer pictures than features: eigenvalues that should be 0 are rounding errors of about 1e-16 of the largest, and
    // their roots 1e-8 of its root, for a hundred features 1e-6 in all.
    let (a, b) = (of("out.features.images"), of("out.features.reference"));
    let ours = a.distance(&b).unwrap();
    let (exact, theirs) = (number(&case, "fid_float64"), number(&case, "fid_cleanfid"));
    println!("FID {ours}, exactly {exact}, by clean-fid {theirs}");
    assert!(off(ours, exact) < 1e-6);
    // clean-fid takes the root of a singular matrix, and is itself this far off.
    assert!(off(ours, theirs) < 1e-6 + 2.0 * off(theirs, exact));
    // Statistics as pytorch-fid saves them, with a mean in fp32.
    let statistics = Moments::read(&golden("pictures/reference.npz")).unwrap();
    assert!(off(a.distance(&statistics).unwrap(), ours) < 1e-5);
    assert_eq!(a.distance(&of("a")).unwrap_err().kind(), ErrorKind::Mismatch);
    assert_eq!(Moments::of(&[vec![1.0]]).err().map(|error| error.kind()), Some(ErrorKind::Invalid));

    let embeds = |set: &str| rows(&case, &format!("out.embeds.{set}"));
    let ours = cmmd(&embeds("images"), &embeds("reference"));
    let truth = number(&case, "cmmd");
    // The three means are near 1 and lose 1e-16 * 1000 each to rounding in the truth.
    assert!((ours - truth).abs() < 1e-11, "{ours} {truth}");
    // More than one block of the kernel matrix, compared with the same pairs one by one.
    let many: Vec<Vec<f32>> = (0..300).map(|i| vec![(i as f32 * 0.37).sin(), (i as f32 * 0.11).cos()]).collect();
    let kernel = |a: &[f32], b: &[f32]| {
        let square: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
        (-square / 200.0).exp()
    };
    let mean = |x: &[Vec<f32>], y: &[Vec<f32>]| {
        let sum: f64 = x.iter().flat_map(|a| y.iter().map(move |b| kernel(a, b))).sum();
        sum / (x.len() * y.len()) as f64
    };
    let (x, y) = many.split_at(270);
    let truth = 1000.0 * (mean(x, x) + mean(y, y) - 2.0 * mean(x, y));
    assert!((cmmd(x, y) - truth).abs() < 1e-9, "{} {truth}", cmmd(x, y));
}

/// JPEG and WebP against Pillow, which reads with libjpeg-turbo and libwebp.
#[test]
fn pictures_are_read_as_by_pillow() {
    let mut seen = 0;
    for file in pictures::list(&golden("pictures/decoded")).unwrap() {
        if file.extension().unwrap() == "png" {
            continue;
        }
        let ours = pictures::read(&file).unwrap();
        let truth = pictures::read(Path::new(&format!("{}.png", file.display()))).unwrap();
        assert_eq!((ours.width, ours.height), (truth.width, truth.height));
        let off: Vec<u8> = ours.rgb.iter().zip(&truth.rgb).map(|(a, b)| a.abs_diff(*b)).collect();
        let worst = off.iter().max().unwrap();
        let mean = off.iter().map(|&x| f64::from(x)).sum::<f64>() / off.len() as f64;
        println!("{}: at most {worst}, {mean:.3} on average", file.display());
        let name = file.file_name().unwrap().to_str().unwrap();
        // WebP's decoding is exact by its specification. JPEG's is not, and chroma that is shared by pixels is
        // interpolated by either library in its own way: 4 levels of 255 and 0.4 on average are what is measured.
        let (most, average) = if name.ends_with("webp") { (0, 0.0) } else { (4, 0.5) };
        assert!(*worst <= most && mean <= average, "{name}: {worst}, {mean}");
        seen += 1;
    }
    assert_eq!(seen, 8);
}

#[test]
fn captions_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let parse = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        captions::read(&path)
    };
    let told = |list: Vec<Caption>| -> Vec<(String, Option<String>, Option<u64>)> {
        list.into_iter().map(|caption| (caption.text, caption.image, caption.seed)).collect()
    };
    let row = |text: &str, image: Option<&str>, seed| (text.to_string(), image.map(str::to_string), seed);
    assert_eq!(
        told(parse("a.txt", "a cat\n\n two dogs \n").unwrap()),
        [row("a cat", None, None), row("two dogs", None, None)]
    );
    assert_eq!(told(parse("a.tsv", "1.png\ta cat\n").unwrap()), [row("a cat", Some("1.png"), None)]);
    let named = parse("b.tsv", "case\tSeed\tPrompt\tfile_name\r\n0\t7\ta cat\t1.png\r\n").unwrap();
    assert_eq!(told(named), [row("a cat", Some("1.png"), Some(7))]);
    let coco = r#"{"info": {}, "images": [{"id": 9, "file_name": "i9.jpg"}, {"id": 3, "file_name": "i3.jpg"}],
        "annotations": [{"image_id": 9, "id": 5, "caption": "later"}, {"image_id": 3, "id": 6, "caption": " c\n"},
                        {"image_id": 9, "id": 4, "caption": "first"}]}"#;
    let found = parse("c.json", coco).unwrap();
    assert_eq!(told(found.clone()), [row("c", Some("i3.jpg"), None), row("first", Some("i9.jpg"), None)]);
    let files = ["x/i9.jpg", "x/i3.png"];
    assert_eq!(captions::assign(&found, &files, Path::new("c.json")).unwrap(), ["first", "c"]);
    for (name, text, words) in [
        ("d.tsv", "1.png\ta cat\n2.png\n", "line 2"),
        ("d.tsv", "1.png\ta cat\n2.png\t\n", "line 2"),
        ("d.tsv", "1\t2\t3\n", "3 columns"),
        ("d.tsv", "caption\tseed\na cat\t-1\n", "line 2"),
        ("d.txt", " \n", "no captions"),
        ("d.json", "{\"images\": []}", "annotations"),
        ("d.json", &coco.replace("\"id\": 3, \"file_name\"", "\"id\": 2, \"file_name\""), "not listed"),
        ("d.json", &coco.replace("later", " "), "empty"),
    ] {
        let error = parse(name, text).unwrap_err().to_string();
        assert!(error.contains(words) && !error.contains('\n'), "{error}");
    }
    let error = captions::assign(&found, &["x/i9.jpg", "x/i4.jpg"], Path::new("c.json")).unwrap_err().to_string();
    assert!(error.contains("i4.jpg"), "{error}");
    let lines = parse("a.txt", "a\nb\n").unwrap();
    assert!(captions::assign(&lines, &files[..1], Path::new("a.txt")).is_err());
}

fn respodiff(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_respodiff")).args(args).current_dir(folder).output().unwrap()
}

fn report(folder: &Path, args: &[&str]) -> serde_json::Value {
    let output = respodiff(folder, args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The command on ready pictures: all three numbers, from prompts in metadata and in a table; in shards and resumed.
#[test]
fn folders_are_measured() {
    let case = support::cases("quality", 1).remove(0);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let at = |name: &str| golden(name).display().to_string();
    let (images, reference) = (at("pictures/images"), at("pictures/reference"));
    let (inception, clip, table) =
        (at("checkpoints/inception/old.pth"), at("checkpoints/clip"), at("pictures/captions.tsv"));
    let judges = ["--inception", &inception, "--clip", &clip, "--device", "cpu"];
    let base = [&["eval", "quality", "--images", &images, "--reference", &reference][..], &judges].concat();
    let with = |more: &[&'static str]| [&base[..], more].concat();
    let whole = report(path, &with(&["--json", "--out", "whole"]));
    let close = |name: &str, truth: &str, tolerance: f64| {
        let (ours, truth) = (whole[name].as_f64().unwrap(), number(&case, truth));
        println!("{name}: {ours} for {truth}");
        assert!((ours / truth - 1.0).abs() < tolerance, "{name}: {ours} for {truth}");
    };
    // Features differ by 1e-4 of what distinguishes pictures (see above), and FID is quadratic in that.
    close("fid", "fid_cleanfid", 2e-4);
    // Embeddings of length 1 are within 1e-4, as eval.rs has it; theirs are 1e-6 off.
    close("cmmd", "cmmd", 1e-4);
    close("clip", "clip_score", 1e-4);
    assert_eq!((whole["pictures"].as_u64(), whole["references"].as_u64()), (Some(24), Some(27)));
    let notes = whole["notes"].to_string();
    assert!(notes.contains("without full rank") && !notes.contains("judged"), "{notes}");
    let pairs: Vec<f64> = serde_json::from_str(&case.metadata()["clip_pairs"]).unwrap();
    let lines = std::fs::read_to_string(path.join("whole/pictures/records.jsonl")).unwrap();
    for (line, truth) in lines.lines().zip(&pairs) {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!((record["score"].as_f64().unwrap() - truth).abs() < 2e-3, "{record} for {truth}");
    }
    assert!(pairs.iter().any(|&x| x < 0.0) && lines.lines().count() == pairs.len());

    let results =
        |report: &serde_json::Value| ["fid", "cmmd", "clip", "clip_interval"].map(|name| report[name].clone());
    // Captions in a table are the same; a tabulator or a line break in a prompt is a space there, and so for CLIP.
    let table = report(path, &[&base[..], &["--json", "--prompts", &table]].concat());
    assert_eq!(results(&table), results(&whole));
    // A run that was killed as it wrote goes on to the same result.
    let read = |name: &str| std::fs::read(path.join("whole").join(name)).unwrap();
    for (name, keep) in
        [("pictures/records.jsonl", 0.7), ("pictures/features.bin", 0.5), ("reference/features.bin", 0.3)]
    {
        let bytes = read(name);
        std::fs::write(path.join("whole").join(name), &bytes[..(bytes.len() as f64 * keep) as usize]).unwrap();
    }
    assert_eq!(report(path, &with(&["--json", "--out", "whole"])), whole);
    // So do two shards.
    let part = report(path, &with(&["--json", "--out", "a", "--shard", "0/2"]));
    assert!(part["notes"].to_string().contains("12 of 24 pictures and 14 of 27"), "{}", part["notes"]);
    report(path, &with(&["--json", "--out", "b", "--shard", "1/2"]));
    let output = respodiff(path, &["eval", "merge", "b", "a", "b", "--out", "merged"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(std::fs::read(path.join("merged/report.json")).unwrap(), read("report.json"));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(["FID", "CMMD", "CLIP score", "report.json"].iter().all(|word| text.contains(word)), "{text}");
    // Statistics stand for a folder, for FID alone.
    let statistics = at("pictures/reference.npz");
    let only = report(
        path,
        &["eval", "quality", "--images", &images, "--reference", &statistics, "--inception", &inception, "--json"],
    );
    assert!((only["fid"].as_f64().unwrap() / whole["fid"].as_f64().unwrap() - 1.0).abs() < 2e-4, "{only}");
    assert!(only["cmmd"].is_null() && only["clip"].is_null());
}

/// Pictures made on the fly by the demo: interrupted by a limit on captions, in shards, and with a concept.
#[test]
fn pictures_are_made_and_measured() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    std::fs::write(path.join("captions.tsv"), "caption\tseed\na doctor\t5\na nurse\t6\na cook\t5\n").unwrap();
    let (inception, clip) = (golden("checkpoints/inception/old.pth"), golden("checkpoints/clip"));
    let (inception, clip) = (inception.display().to_string(), clip.display().to_string());
    let reference = golden("pictures/reference").display().to_string();
    let base = [
        "eval",
        "quality",
        "--prompts",
        "captions.tsv",
        "--reference",
        &reference,
        "--inception",
        &inception,
        "--clip",
        &clip,
        "--steps",
        "2",
        "--batch",
        "2",
        "--device",
        "cpu",
        "--json",
    ];
    let with = |more: &[&'static str]| report(path, &[&base[..], more].concat());
    let whole = with(&["--out", "whole"]);
    assert_eq!(whole["pictures"], 3);
    with(&["--out", "a", "--shard", "0/2"]);
    with(&["--out", "b", "--shard", "1/2"]);
    assert!(respodiff(path, &["eval", "merge", "a", "b", "--out", "merged"]).status.success());
    let read = |name: &str| std::fs::read_to_string(path.join(name)).unwrap();
    assert_eq!(read("merged/report.json"), read("whole/report.json"));
    // The pictures are those that `sample` makes of the same prompts and seeds.
    for (prompt, seed) in [("a doctor", "5"), ("a nurse", "6"), ("a cook", "5")] {
        let out = format!("made/{seed}{}.png", prompt.replace(' ', ""));
        std::fs::create_dir_all(path.join("made")).unwrap();
        let args = ["sample", prompt, "--seed", seed, "--steps", "2", "--out", &out, "--device", "cpu"];
        assert!(respodiff(path, &args).status.success());
    }
    let ready = report(
        path,
        &[
            "eval",
            "quality",
            "--images",
            "made",
            "--reference",
            &reference,
            "--inception",
            &inception,
            "--clip",
            &clip,
            "--json",
            "--device",
            "cpu",
        ],
    );
    for name in ["fid", "cmmd", "clip"] {
        let (a, b) = (ready[name].as_f64().unwrap(), whole[name].as_f64().unwrap());
        assert!((a - b).abs() <= 1e-6 * b.abs().max(1.0), "{name}: {a} {b}");
    }
    let shifted = with(&["--concept", "woman", "--count", "2"]);
    assert_eq!(shifted["pictures"], 2);
    assert_ne!(shifted["fid"], whole["fid"]);
}

#[test]
fn bad_input_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    for name in ["good", "empty", "cut", "mixed", "one"] {
        std::fs::create_dir(path.join(name)).unwrap();
    }
    let picture = std::fs::read(golden("pictures/images/01.png")).unwrap();
    let jpeg = std::fs::read(golden("pictures/decoded/420.jpg")).unwrap();
    let webp = std::fs::read(golden("pictures/decoded/lossy.webp")).unwrap();
    for (name, bytes) in
        [("good/a.png", &picture[..]), ("good/b.png", &picture), ("mixed/a.png", &picture), ("mixed/b.jpg", &jpeg)]
    {
        std::fs::write(path.join(name), bytes).unwrap();
    }
    std::fs::write(path.join("one/a.png"), &picture).unwrap();
    // Every truncation of every format is an error that names the file.
    for (name, bytes) in [("x.png", &picture), ("x.jpg", &jpeg), ("x.webp", &webp)] {
        let file = path.join(name);
        for len in (0..bytes.len() - 2).step_by(bytes.len() / 40).chain([bytes.len() - 16]) {
            std::fs::write(&file, &bytes[..len]).unwrap();
            let error = pictures::read(&file).expect_err(&format!("{name} of {len} bytes")).to_string();
            assert!(error.contains(name), "{error}");
        }
        std::fs::remove_file(file).unwrap();
    }
    std::fs::write(path.join("cut/half.png"), &picture[..picture.len() / 2]).unwrap();
    std::fs::write(path.join("odd.tsv"), "a.png\tx\nb.png\n").unwrap();
    std::fs::write(path.join("one.txt"), "x\n").unwrap();
    std::fs::write(path.join("bad.npz"), b"PK").unwrap();
    let torchvision = path.join("torchvision.safetensors");
    let one = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1000, 1], &[0; 4000]).unwrap();
    std::fs::write(&torchvision, safetensors::serialize([("fc.weight", &one)], None).unwrap()).unwrap();
    let inception = golden("checkpoints/inception/model.safetensors").display().to_string();
    let clip = golden("checkpoints/clip").display().to_string();
    let concept = golden("pickles/official.pth").display().to_string();
    for (args, code, words) in [
        (vec!["--images", "good"], 2, "--clip"),
        (vec!["--clip", &clip], 2, "--images"),
        (vec!["--images", "empty", "--clip", &clip], 1, "no pictures"),
        (vec!["--images", "nowhere", "--clip", &clip], 1, "nowhere"),
        (vec!["--images", "cut", "--clip", &clip], 1, "half.png"),
        (vec!["--images", "cut", "--clip", &clip, "--prompts", "one.txt"], 1, "half.png"),
        (vec!["--images", "mixed", "--clip", &clip], 1, "b.jpg"),
        (vec!["--images", "good", "--clip", &clip, "--prompts", "odd.tsv"], 1, "line 2"),
        (vec!["--images", "good", "--clip", &clip, "--prompts", "one.txt"], 1, "1 captions for 2"),
        (vec!["--images", "good", "--inception", &concept], 1, "Conv2d_1a_3x3"),
        (vec!["--images", "good", "--inception", "torchvision.safetensors"], 1, "torchvision's Inception"),
        (vec!["--images", "good", "--inception", &inception, "--reference", "bad.npz"], 1, "bad.npz"),
        (vec!["--images", "good", "--inception", &inception], 2, "nothing can be measured"),
        (vec!["--images", "one", "--inception", &inception, "--reference", "good"], 2, "nothing can be measured"),
        (vec!["--images", "good", "--clip", &clip, "--reference", "bad.npz"], 2, "no Inception is given"),
        (vec!["--images", "good", "--clip", &clip, "--shard", "2/2", "--out", "y"], 2, "--shard"),
        (vec!["--prompts", "one.txt", "--clip", &clip, "--concept", "none.safetensors"], 1, "none.safetensors"),
    ] {
        let output = respodiff(path, &[&["eval", "quality"][..], &args].concat());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
        assert!(error.contains(words) && !error.contains("panicked"), "{args:?}: {error}");
    }
    // Other settings in the same folder are refused.
    let run = |more: &[&'static str]| {
        respodiff(
            path,
            &[&["eval", "quality", "--images", "good", "--clip", &clip, "--out", "kept"][..], more].concat(),
        )
    };
    assert!(run(&[]).status.success());
    let output = run(&["--reference", "mixed"]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && error.contains("other settings"), "{error}");
    let output = respodiff(path, &["eval", "compare", "kept", "kept"]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && error.contains("another kind"), "{error}");
    // FID needs no prompts, so that it does not matter that only some of the pictures have one.
    let fid = ["eval", "quality", "--images", "mixed", "--inception", &inception, "--reference", "good", "--json"];
    let output = respodiff(path, &fid);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
