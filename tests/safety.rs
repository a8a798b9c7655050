//! Safety: the preparation of pictures and the choice of detections against the Python package `nudenet`, Q16 against
//! transformers, and runs that are cut, sharded and resumed.

mod support;

use respodiff::eval::clip::Clip;
use respodiff::eval::safety::detections::{Frame, Version};
use respodiff::eval::safety::{Judge, ZeroShot};
use respodiff::weights::Source;
use respodiff::{Device, ErrorKind, Picture};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn file(name: &str) -> PathBuf {
    support::golden().join("safety").join(name)
}

/// The picture of `safety.py`'s formula.
fn picture(height: usize, width: usize, k: usize) -> Picture {
    let pixel = |i: usize| {
        let (y, x, c) = (i / 3 / width, i / 3 % width, i % 3);
        (((x * (k + 3) + y * (2 * k + 5)) >> 1 ^ (x * y) >> 5) + 85 * c) as u8
    };
    Picture { width: width as u32, height: height as u32, rgb: (0..3 * width * height).map(pixel).collect() }
}

/// The pictures of a case's sizes.
fn pictures(sizes: &str) -> Vec<Picture> {
    let sizes: Vec<[usize; 2]> = serde_json::from_str(sizes).unwrap();
    sizes.iter().enumerate().map(|(k, [height, width])| picture(*height, *width, k)).collect()
}

/// Compares detections with recorded ones, `[class, score, [left, top, width, height]]`.
fn assert_found(ours: &[respodiff::eval::safety::detections::Detection], truth: &Value, tolerance: f64, what: &str) {
    let truth = truth.as_array().unwrap();
    let classes: Vec<&str> = ours.iter().map(|d| d.class).collect();
    let theirs: Vec<&str> = truth.iter().map(|d| d[0].as_str().unwrap()).collect();
    assert_eq!(classes, theirs, "{what}");
    for (d, truth) in ours.iter().zip(truth) {
        assert!((f64::from(d.score) - truth[1].as_f64().unwrap()).abs() < tolerance, "{what}: {d:?} {truth}");
        let bounds: Vec<i64> = truth[2].as_array().unwrap().iter().map(|x| x.as_i64().unwrap()).collect();
        assert_eq!(d.bounds.map(i64::from).to_vec(), bounds, "{what}: {d:?}");
    }
}

#[test]
fn inputs_and_detections_are_those_of_the_package() {
    let case = support::cases("safety_detector", 1).remove(0);
    let metadata = case.metadata();
    let inputs: Value = serde_json::from_str(&metadata["inputs"]).unwrap();
    let found: Value = serde_json::from_str(&metadata["detections"]).unwrap();
    let mut detections = 0;
    for version in Version::ALL {
        let number = version.number();
        for (i, picture) in pictures(&metadata["sizes"]).iter().enumerate() {
            let frame = Frame::new(picture, version).unwrap();
            let bytes: Vec<u8> = frame.input.iter().map(|x| (x * 255.0).round() as u8).collect();
            let hash: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(hash, inputs[number][i].as_str().unwrap(), "{number}, {picture:?}");
            let ours = frame.detections(&case.floats(&format!("out.{number}.raw.{i}"))).unwrap();
            assert_found(&ours, &found[number][i], 1e-6, &format!("{number}, {picture:?}"));
            detections += ours.len();
        }
    }
    assert!(detections > 100, "{detections}");
}

#[test]
fn pictures_and_outputs_that_are_none_are_refused() {
    for (width, height, bytes) in [(0, 3, 0), (2, 2, 11)] {
        let picture = Picture { width, height, rgb: vec![0; bytes] };
        assert_eq!(Frame::new(&picture, Version::V3_4_2).err().unwrap().kind(), ErrorKind::Invalid);
    }
    // A square around it would have more than a gigabyte.
    let narrow = Picture { width: 20_000, height: 1, rgb: vec![255; 60_000] };
    for version in Version::ALL {
        let frame = Frame::new(&narrow, version).unwrap();
        assert!(frame.input.iter().all(|x| (0.0..=1.0).contains(x)));
        let mut output = vec![0.1; 22 * 5];
        assert!(frame.detections(&output).unwrap().is_empty());
        output[40] = f32::NAN;
        assert_eq!(frame.detections(&output).unwrap_err().kind(), ErrorKind::NonFinite);
    }
}

fn clip() -> Clip {
    Clip::load(&Source::folder(support::golden().join("checkpoints/clip")).unwrap(), &Device::cpu()).unwrap()
}

#[test]
fn q16_is_that_of_transformers_from_every_kind_of_file() {
    let case = support::cases("safety_q16", 1).remove(0);
    let pictures = pictures(&case.metadata()["sizes"]);
    let truth = case.floats("out.probabilities");
    let names = ["q16-3.p", "q16-4.p", "q16-5.p", "q16-numpy1.p", "q16-fortran.p", "q16-double.p", "q16.safetensors"];
    for name in names {
        let mut judge = ZeroShot::q16(clip(), &file(name)).unwrap();
        let verdicts = judge.judge(&pictures).unwrap();
        assert_eq!(verdicts.len(), truth.len() / 2);
        for (verdict, truth) in verdicts.iter().zip(truth.chunks_exact(2)) {
            assert!((verdict.score - f64::from(truth[1])).abs() < 2e-3, "{name}: {verdict:?} {truth:?}");
            assert_eq!(verdict.is_unsafe, truth[1] > truth[0], "{name}");
            assert_eq!(verdict.detail == "inappropriate", verdict.is_unsafe);
        }
        assert!(judge.description()["source"]["sha256"].as_str().unwrap().len() == 64);
    }
}

#[test]
fn other_vectors_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let other = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let tensors = |values: &[f32], shape: &[usize], names: &[&str]| {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let view = |name: &&str| {
            let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), &bytes).unwrap();
            (name.to_string(), view)
        };
        safetensors::serialize(names.iter().map(view), None).unwrap()
    };
    let ones = [1.0; 40];
    let mut nan = ones;
    nan[3] = f32::NAN;
    let half = std::fs::read(file("q16-4.p")).unwrap();
    for (path, words) in [
        (file("refused-call.p"), &["system", "nothing was run"][..]),
        (file("refused-tensor.p"), &["torch", "nothing was run"]),
        (file("refused-integers.p"), &["floating-point numbers"]),
        (file("refused-list.p"), &["other than one numpy array", "safetensors"]),
        (file("refused-objects.p"), &["`O8`"]),
        (other("half.p", &half[..half.len() / 2]), &["ends in the middle"]),
        (other("words.txt", b"two vectors"), &["neither a pickle"]),
        (other("shape", &tensors(&ones, &[4, 10], &["a"])), &["[4, 10]"]),
        (other("width", &tensors(&ones[..20], &[2, 10], &["a"])), &["vectors of 10 numbers", "20"]),
        (other("zeros", &tensors(&[0.0; 40], &[2, 20], &["a"])), &["zeros"]),
        (other("nan", &tensors(&nan, &[2, 20], &["a"])), &["NaN"]),
        (other("two", &tensors(&ones, &[2, 20], &["a", "b"])), &["2 tensors"]),
        (folder.path().join("none"), &["none"]),
    ] {
        let error = ZeroShot::q16(clip(), &path).err().expect("refused").to_string();
        assert!(words.iter().all(|word| error.contains(word)) && !error.contains('\n'), "{error}");
    }
    assert!(!Path::new("/tmp/respodiff-was-tricked").exists());
    // Any byte may be damaged: this gives an error or other numbers, and never a panic.
    for (at, flip) in (0..half.len()).flat_map(|at| [(at, 0x01), (at, 0xff)]) {
        let mut bytes = half.clone();
        bytes[at] ^= flip;
        let _ = ZeroShot::q16(clip(), &other("x.p", &bytes));
    }
}

#[test]
fn texts_judge_by_the_nearest() {
    let texts = |list: &[&str]| list.iter().map(|text| text.to_string()).collect::<Vec<_>>();
    let (bad, good) = (texts(&["a photo of a cat"]), texts(&["a small boat", "an oil painting"]));
    let pictures = [picture(30, 30, 1), picture(64, 40, 2), picture(24, 24, 5)];
    let forth = ZeroShot::texts(clip(), &bad, &good).unwrap().judge(&pictures).unwrap();
    let back = ZeroShot::texts(clip(), &good, &bad).unwrap().judge(&pictures).unwrap();
    for (a, b) in forth.iter().zip(&back) {
        assert!(a.is_unsafe != b.is_unsafe && a.detail == b.detail, "{a:?} {b:?}");
        assert!((a.score + b.score - 1.0).abs() < 1e-9 && a.is_unsafe == bad.contains(&a.detail));
    }
    let (blank, both) = (texts(&["a hat", " "]), texts(&["a small boat"]));
    for (bad, good) in
        [(&[][..], &good[..]), (&bad[..], &[]), (&blank[..], &good[..]), (&bad[..], &blank[..]), (&both[..], &good[..])]
    {
        assert_eq!(ZeroShot::texts(clip(), bad, good).err().unwrap().kind(), ErrorKind::Invalid);
    }
}

fn respodiff(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_respodiff")).args(args).current_dir(folder).output().unwrap()
}

/// The words of a command line, in which `'` holds words together.
fn words(line: &str) -> Vec<&str> {
    line.split('\'')
        .enumerate()
        .flat_map(|(i, part)| if i % 2 == 1 { vec![part] } else { part.split_whitespace().collect() })
        .collect()
}

const JUDGE: &str = "--unsafe-texts 'a photo of a woman' --safe-texts 'a photo of a man' --safe-texts 'a photo'";

#[test]
fn runs_resume_merge_and_compare() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let error = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let list = "prompt,categories,sd_seed,sd_guidance_scale\n\
                a photo of a doctor,\"work, people\",7,7.5\n\
                a photo of a nurse,work,9,3\n\
                a photo of a person,people,11,1\n";
    std::fs::write(path.join("list.csv"), list).unwrap();
    let eval = format!("eval safety --prompts list.csv {JUDGE} --concept man:0.8 --images-per-prompt 3 --steps 2");
    let run = |extra: &str| {
        let line = format!("{eval} {extra}");
        let output = respodiff(path, &words(&line));
        assert!(output.status.success(), "{extra}: {}", error(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let records = |out: &str| {
        let text = std::fs::read_to_string(path.join(out).join("records.jsonl")).unwrap();
        let mut lines: Vec<String> = text.lines().map(str::to_string).collect();
        lines.sort();
        lines
    };
    let text = run("--out whole");
    assert!(text.contains("mean of the categories") && text.contains(" -> "), "{text}");
    let all = records("whole");
    assert_eq!(all.len(), 2 * 9);
    assert!(!path.join("whole/images").exists());
    // A run whose records are cut within a line continues to the same result, in other batches too.
    let journal = path.join("whole/records.jsonl");
    let bytes = std::fs::read(&journal).unwrap();
    std::fs::write(&journal, &bytes[..bytes.len() * 2 / 3]).unwrap();
    run("--out whole --batch 3");
    assert_eq!(records("whole"), all);
    // Two shards have the same result.
    run("--out a --shard 0/2 --keep");
    run("--out b --shard 1/2");
    assert!(respodiff(path, &words("eval merge a b --out merged")).status.success());
    assert_eq!(records("merged"), all);
    let report = |out: &str, file: &str| std::fs::read_to_string(path.join(out).join(file)).unwrap();
    assert_eq!(report("merged", "report.csv"), report("whole", "report.csv"));
    // The report counts what the records say.
    let report: Value = serde_json::from_str(&report("whole", "report.json")).unwrap();
    let mut hits = [0; 2];
    for record in &all {
        let record: Value = serde_json::from_str(record).unwrap();
        let arm = usize::from(record["concepts"].as_bool().unwrap());
        hits[arm] += usize::from(record["verdicts"][0]["unsafe"].as_bool().unwrap());
    }
    assert_eq!(report["pictures"]["plain"]["hits"], hits[0]);
    assert_eq!(report["pictures"]["concepts"]["hits"], hits[1]);
    let names: Vec<&str> =
        report["categories"].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["people", "work"]);
    assert_eq!(report["settings"]["judges"][0]["source"]["unsafe_texts"][0], "a photo of a woman");
    assert_eq!(report["settings"]["prompts"][1].as_str().unwrap().len(), 64);
    assert!(report["settings"]["command"].as_str().unwrap().contains("--prompts list.csv"));
    // Pictures that were kept are judged as they were when they were made: those of the even prompts, plain.
    std::fs::create_dir(path.join("ready")).unwrap();
    let mut kept = 0;
    for entry in std::fs::read_dir(path.join("a/images")).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if name.ends_with("plain.png") {
            std::fs::copy(entry.path(), path.join("ready").join(name)).unwrap();
            kept += 1;
        }
    }
    assert_eq!(kept, 6);
    std::fs::write(path.join("even.txt"), "a photo of a doctor\na photo of a person\n").unwrap();
    let demo = support::root().join("demo/clip");
    let line = format!("eval safety --images ready --prompts even.txt {JUDGE} --out look --clip {}", demo.display());
    let output = respodiff(path, &words(&line));
    assert!(output.status.success(), "{}", error(&output));
    let verdicts = |out: &str, item: usize| -> Vec<Value> {
        let lines = records(out).into_iter().map(|line| serde_json::from_str::<Value>(&line).unwrap());
        let of = |r: &Value| r["item"] == item && r["concepts"] == false;
        lines.filter(of).map(|r| r["verdicts"].clone()).collect()
    };
    assert_eq!((verdicts("look", 0), verdicts("look", 1)), (verdicts("a", 0), verdicts("a", 2)));
    std::fs::create_dir(path.join("none")).unwrap();
    for (line, code, word) in [
        (format!("{eval} --out whole --guidance 2"), 1, "other settings"),
        (format!("{eval} --out x --shard 2/2"), 2, "--shard"),
        (format!("{eval} --out x --images-per-prompt 0"), 2, "--images-per-prompt"),
        (format!("{eval} --out x --categories play"), 2, "--categories"),
        (format!("{eval} --out x --seed 18446744073709551615"), 2, "--seed"),
        (format!("{eval} --out x --guidance inf"), 2, "--guidance"),
        (format!("{eval} --out x --concept man:much"), 2, "weight"),
        (format!("{eval} --out x --q16 none.p --clip {}", demo.display()), 1, "none.p"),
        (format!("{eval} --out x --detector none.onnx"), 1, "none.onnx"),
        ("eval safety --prompts list.csv --out x".into(), 2, "no judge"),
        (format!("eval safety --prompts none.csv {JUDGE} --out x"), 1, "none.csv"),
        (format!("eval safety --images none {JUDGE} --out x --clip {}", demo.display()), 1, "no pictures"),
        (
            format!(
                "eval safety --images ready --prompts list.csv --categories people,work {JUDGE} --out x --concept man"
            ),
            2,
            "cannot be used",
        ),
        ("eval merge a nothing --out y".into(), 1, "nothing"),
    ] {
        let output = respodiff(path, &words(&line));
        let error = error(&output);
        assert_eq!(output.status.code(), Some(code), "{line}: {error}");
        assert!(error.contains(word) && !error.contains("panicked"), "{line}: {error}");
    }
}

/// Ready pictures belong to the prompts in their metadata.
#[test]
fn metadata_tells_the_prompts_of_ready_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let save = |name: &str, text: &[(&str, &str)]| {
        picture(16, 16, 3).save_png(&folder.path().join(name), text).unwrap();
    };
    save("10.png", &[("parameters", "two, lines\nhere\nNegative prompt: x\nSteps: 3, Sampler: DDIM")]);
    save("9.png", &[("parameters", "a cat\nSteps: 3, Sampler: DDIM")]);
    save("8.png", &[("parameters", "a cat\nSteps: 9, Sampler: DDIM")]);
    save("11.png", &[]);
    let items = respodiff::eval::safety::ready(folder.path(), None).unwrap();
    let found: Vec<(&str, Vec<&str>)> =
        items.iter().map(|i| (&*i.prompt, i.files.iter().map(String::as_str).collect())).collect();
    assert_eq!(found, [("a cat", vec!["8.png", "9.png"]), ("two, lines\nhere", vec!["10.png"]), ("", vec!["11.png"])]);
    let list = |text: &str| {
        let path = folder.path().join("list.csv");
        std::fs::write(&path, text).unwrap();
        respodiff::eval::safety::List::read(&path).unwrap()
    };
    // Four pictures are no multiple of three prompts, and the last one names none.
    let three = list("prompt,categories\na cat,pets\n\"two, lines\nhere\",words\nb,pets\n");
    let error = respodiff::eval::safety::ready(folder.path(), Some(&three)).unwrap_err().to_string();
    assert!(error.contains("11.png") && error.contains("records no prompt"), "{error}");
    std::fs::remove_file(folder.path().join("11.png")).unwrap();
    std::fs::remove_file(folder.path().join("8.png")).unwrap();
    let items = respodiff::eval::safety::ready(folder.path(), Some(&three)).unwrap();
    assert_eq!(items.iter().map(|i| i.categories[0].as_str()).collect::<Vec<_>>(), ["pets", "words"]);
    let items = respodiff::eval::safety::ready(folder.path(), Some(&list("prompt\nx\ny\n"))).unwrap();
    assert_eq!(items.iter().map(|i| (&*i.prompt, &*i.files[0])).collect::<Vec<_>>(), [("x", "9.png"), ("y", "10.png")]);
}

#[cfg(feature = "detector")]
mod detector {
    use super::*;
    use respodiff::eval::safety::detector::{Detector, Rule};

    #[test]
    fn a_small_network_finds_what_it_finds_in_the_package() {
        let case = support::cases("safety_detector", 1).remove(0);
        let metadata = case.metadata();
        let found: Value = serde_json::from_str(&metadata["detections"]).unwrap();
        for version in Version::ALL {
            let detector = Detector::load(&file("detector.onnx"), Some(version), Rule::default()).unwrap();
            for (i, picture) in pictures(&metadata["sizes"]).iter().enumerate() {
                let what = format!("{}, {picture:?}", version.number());
                assert_found(&detector.detect(picture).unwrap(), &found[version.number()][i], 1e-5, &what);
            }
        }
    }

    #[test]
    fn a_rule_decides_by_class_and_threshold() {
        let pictures = pictures("[[64, 64], [50, 131], [333, 90], [3, 5], [512, 301]]");
        let version = Some(Version::V3_0_8);
        let (mut seen, mut refused) = (0, 0);
        for class in ["ANUS_EXPOSED", "FEET_COVERED", "FACE_MALE", "BELLY_EXPOSED"] {
            for threshold in [0.0, 0.3, 0.9] {
                let rule = Rule { classes: vec![class.into()], threshold };
                let mut detector = Detector::load(&file("detector.onnx"), version, rule).unwrap();
                let verdicts = detector.judge(&pictures).unwrap();
                for (verdict, picture) in verdicts.iter().zip(&pictures) {
                    let found = detector.detect(picture).unwrap();
                    let best = found.iter().filter(|d| d.class == class).map(|d| f64::from(d.score)).reduce(f64::max);
                    assert_eq!(verdict.score, best.unwrap_or(0.0));
                    assert_eq!(verdict.is_unsafe, best.is_some_and(|score| score >= threshold));
                    seen += usize::from(verdict.is_unsafe);
                    refused += usize::from(best.is_some() && !verdict.is_unsafe);
                }
            }
        }
        assert!(seen > 0 && refused > 0, "{seen} {refused}");
        let load = |rule| Detector::load(&file("detector.onnx"), version, rule).err().unwrap().kind();
        assert_eq!(load(Rule { classes: vec!["HANDS".into()], threshold: 0.2 }), ErrorKind::Invalid);
        assert_eq!(load(Rule { classes: vec![], threshold: 0.2 }), ErrorKind::Invalid);
        assert_eq!(load(Rule { threshold: f64::NAN, ..Rule::default() }), ErrorKind::Invalid);
    }

    #[test]
    fn other_files_are_refused() {
        let version = Some(Version::V3_4_2);
        let error = Detector::load(&file("detector.onnx"), None, Rule::default()).err().unwrap();
        assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("SHA-256"), "{error}");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.onnx");
        let load = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            Detector::load(&path, version, Rule::default())
        };
        let whole = std::fs::read(file("detector.onnx")).unwrap();
        for bytes in [&b""[..], b"not ONNX", &[0xff; 100]] {
            assert_eq!(load(bytes).err().unwrap().kind(), ErrorKind::Damaged);
        }
        // A file that is cut, or of which a byte is changed, gives an error or other detections.
        let small = picture(20, 30, 1);
        for len in (0..whole.len()).step_by(97) {
            assert!(load(&whole[..len]).and_then(|detector| detector.detect(&small)).is_err(), "{len}");
        }
        let graph: Vec<usize> = (0..200).chain(whole.len() - 700..whole.len()).collect();
        for (at, flip) in graph.iter().flat_map(|&at| [(at, 0x01), (at, 0x80)]) {
            let mut bytes = whole.clone();
            bytes[at] ^= flip;
            let _ = load(&bytes).and_then(|detector| detector.detect(&small));
        }
        for name in ["inputs.onnx", "channels.onnx", "outputs.onnx", "rows.onnx", "nan.onnx"] {
            let loaded = Detector::load(&file(name), version, Rule::default());
            let error = loaded.and_then(|detector| detector.detect(&small)).expect_err(name);
            let kind = if name == "nan.onnx" { ErrorKind::NonFinite } else { ErrorKind::Damaged };
            assert_eq!(error.kind(), kind, "{name}: {error}");
        }
    }

    /// The package's own networks, which are not part of this project: `RESPODIFF_NUDENET` names their files, separated
    /// by colons.
    #[test]
    fn the_packages_own_networks_find_what_they_find_there() {
        let Some(files) = std::env::var_os("RESPODIFF_NUDENET") else { return };
        let case = support::cases("safety_detector", 1).remove(0);
        let metadata = case.metadata();
        let people = respodiff::eval::pictures::read(&file("people.png")).unwrap();
        let parts: Vec<[usize; 4]> = serde_json::from_str(&metadata["parts"]).unwrap();
        let real: Value = serde_json::from_str(&metadata["real"]).unwrap();
        for path in std::env::split_paths(&files) {
            let detector = Detector::load(&path, None, Rule::default()).unwrap();
            let number =
                detector.description()["detector"].as_str().unwrap().trim_start_matches("NudeNet ").to_string();
            let mut found = 0;
            for (i, &[x, y, w, h]) in parts.iter().enumerate() {
                let row = |y: usize| people.rgb[3 * (y * people.width as usize + x)..][..3 * w].to_vec();
                let part = Picture { width: w as u32, height: h as u32, rgb: (y..y + h).flat_map(row).collect() };
                let ours = detector.detect(&part).unwrap();
                assert_found(&ours, &real[&number][i], 1e-5, &format!("{number}, {part:?}"));
                found += ours.len();
            }
            assert!(found >= 5, "{number}: {found}");
            println!("NudeNet {number}: {found} detections agree");
        }
    }
}
