//! Evaluation: CLIP's two encoders and its image processor compared with transformers, and runs that are cut, sharded
//! and resumed.

mod support;

use respodiff::eval::clip::{Clip, cosine};
use respodiff::weights::Source;
use respodiff::{Concept, Device, ErrorKind, Picture};
use std::path::Path;
use std::process::{Command, Output};

#[test]
fn embeddings_match_transformers() {
    let mut clip =
        Clip::load(&Source::folder(support::golden().join("checkpoints/clip")).unwrap(), &Device::cpu()).unwrap();
    let case = support::cases("clip_images", 1).remove(0);
    let mut images = Vec::new();
    let mut truths = Vec::new();
    for index in (0..).take_while(|i| case.has(&format!("image.{i}"))) {
        let shape = case.shape(&format!("image.{index}"));
        let rgb = case.integers(&format!("image.{index}")).iter().map(|&x| x as u8).collect();
        images.push(Picture { width: shape[1] as u32, height: shape[0] as u32, rgb });
        truths.push(case.floats(&format!("out.image.{index}")));
    }
    assert!(images.len() >= 5);
    for (i, (ours, truth)) in clip.images(&images).unwrap().iter().zip(&truths).enumerate() {
        let error = support::relative_l2(ours, truth);
        println!("image {i}: {error:.1e}");
        assert!(error < 1e-4, "image {i} is off by {error:.2e}");
    }
    for (width, height, bytes) in [(0, 3, 0), (2, 2, 11)] {
        let error = clip.images(&[Picture { width, height, rgb: vec![0; bytes] }]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    let texts: Vec<String> = serde_json::from_str(&case.metadata()["texts"]).unwrap();
    let ours = clip.texts(&texts).unwrap().concat();
    let error = support::relative_l2(&ours, &case.floats("out.texts"));
    assert!(error < 1e-4, "texts are off by {error:.2e}");
}

#[test]
fn the_demos_clip_tells_its_texts_apart() {
    let clip = Clip::load(&Source::demo_clip(), &Device::cpu()).unwrap();
    let texts = ["a photo of a doctor", "a photo of a nurse", "a woman", "a man"].map(str::to_string);
    let embeds = clip.texts(&texts).unwrap();
    for (i, a) in embeds.iter().enumerate() {
        assert!((cosine(a, a) - 1.0).abs() < 1e-5);
        assert!(embeds[..i].iter().all(|b| cosine(a, b) < 0.9), "{}", texts[i]);
    }
}

fn respodiff(folder: &Path, args: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_respodiff")).args(args.split(' ')).current_dir(folder).output().unwrap()
}

#[test]
fn runs_resume_and_merge() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let text = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    for (target, file) in [("woman", "w.safetensors"), ("man", "m.safetensors")] {
        let args = format!("train --target {target} --out {file} --iterations 2 --batch 1");
        let output = respodiff(path, &args);
        assert!(output.status.success(), "{}", text(&output));
    }
    let eval = "eval fairness --concepts w.safetensors,m.safetensors --images-per-prompt 5 --batch 2 --steps 2 \
                --professions doctor,nurse";
    let run = |extra: &str| {
        let output = respodiff(path, &format!("{eval} {extra}"));
        assert!(output.status.success(), "{}", text(&output));
    };
    let records = |out: &str| {
        let text = std::fs::read_to_string(path.join(out).join("records.jsonl")).unwrap();
        let mut lines: Vec<String> = text.lines().map(str::to_string).collect();
        lines.sort();
        lines
    };
    run("--out whole");
    assert_eq!(records("whole").len(), 20);
    // A run whose records are cut within a line continues to the same result.
    let file = path.join("whole/records.jsonl");
    let whole = std::fs::read(&file).unwrap();
    let all = records("whole");
    std::fs::write(&file, &whole[..whole.len() * 2 / 3]).unwrap();
    run("--out whole");
    assert_eq!(records("whole"), all);
    // Two processes cannot work in one folder.
    let lock = std::fs::File::open(path.join("whole/.lock")).unwrap();
    lock.lock().unwrap();
    let output = respodiff(path, &format!("{eval} --out whole"));
    assert!(output.status.code() == Some(1) && text(&output).contains("another process"), "{}", text(&output));
    drop(lock);
    // A run in two shards has the same result.
    run("--out a --shard 0/2");
    run("--out b --shard 1/2");
    let output = respodiff(path, "eval merge a b --out merged");
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(records("merged"), all);
    assert_eq!(
        std::fs::read(path.join("merged/report.csv")).unwrap(),
        std::fs::read(path.join("whole/report.csv")).unwrap()
    );
    // The records of plain pictures that are taken from a run with another concept equal those that the run would have
    // made itself.
    run("--out light --weight 0.5");
    run("--out taken --weight 0.5 --plain whole");
    assert_eq!(records("taken"), records("light"));
    let page = std::fs::read_to_string(path.join("merged/report.html")).unwrap();
    assert!(page.contains("doctor") && page.contains("data:image/jpeg;base64,") && page.contains("eval fairness"));
    for (args, code, word) in [
        (format!("{eval} --out whole --guidance 2"), 1, "other settings"),
        (format!("{eval} --out y --plain whole --seed 9"), 1, "other settings"),
        (format!("{eval} --out y --plain nowhere"), 1, "nowhere"),
        (format!("{eval} --out y --scheduler best"), 2, "best"),
        (format!("{eval} --out x --shard 2/2"), 2, "--shard"),
        (format!("{eval} --out x --clip ./nowhere"), 2, "--clip"),
        (format!("{eval} --out x --batch 0"), 2, "--batch"),
        (format!("{eval} --out x --weight nan"), 2, "--weight"),
        ("eval fairness --concepts w.safetensors,w.safetensors=1,x --out x".to_string(), 2, "--concepts"),
        ("eval quality --images . --clip . --count 0".to_string(), 2, "--count"),
        (format!("{eval} --out x --prompts none.txt"), 1, "none.txt"),
        (format!("{eval},doktor --out x"), 2, "doctor"),
        (format!("{eval} --out x --calibration none.csv"), 1, "none.csv"),
        ("eval compare whole nowhere".to_string(), 1, "nowhere"),
        ("eval merge nothing --out y".to_string(), 1, "nothing"),
        ("eval merge a b --out whole".to_string(), 1, "holds a run already"),
        ("eval fairness --concepts w.safetensors --out x".to_string(), 2, "two concepts"),
        ("concept show records.txt".to_string(), 1, "records.txt"),
        ("sample x --concept w.safetensors:much".to_string(), 2, "weight"),
        ("sample x --concept none.safetensors".to_string(), 1, "none.safetensors"),
    ] {
        let output = respodiff(path, &args);
        let error = text(&output);
        assert_eq!(output.status.code(), Some(code), "{args}: {error}");
        assert!(error.contains(word) && !error.contains("panicked"), "{args}: {error}");
    }
    // Parts of different runs leave nothing behind.
    run("--out other --guidance 2");
    assert!(!respodiff(path, "eval merge a other --out none").status.success());
    assert!(!path.join("none").exists());
    // An audit needs no concepts. Its shards merge, and its pictures are the plain ones of an evaluation.
    let audit = eval.replace("eval fairness --concepts w.safetensors,m.safetensors", "audit --groups woman|man");
    assert_ne!(audit, eval);
    let output = respodiff(path, &format!("{audit} --out audit --json"));
    assert!(output.status.success(), "{}", text(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let finding = &report["findings"][0];
    let whole: serde_json::Value =
        serde_json::from_slice(&std::fs::read(path.join("whole/report.json")).unwrap()).unwrap();
    let plain = &whole["summaries"][0]["deviation_ratio"][0];
    assert_eq!((&finding["deviation_ratio"], &report["missing"]), (plain, &0.into()));
    run("--out from-audit --plain audit");
    assert_eq!(records("from-audit"), all);
    for shard in [0, 1] {
        let output = respodiff(path, &format!("{audit} --out audit{shard} --shard {shard}/2"));
        assert!(output.status.success(), "{}", text(&output));
    }
    let output = respodiff(path, "eval merge audit0 audit1 --out audit-merged");
    assert!(output.status.success(), "{}", text(&output));
    let merged = std::fs::read(path.join("audit-merged/audit.json")).unwrap();
    assert_eq!(merged, std::fs::read(path.join("audit/audit.json")).unwrap());
    let output = respodiff(path, "audit --groups gender,tall --out x");
    assert!(output.status.code() == Some(2) && text(&output).contains("`tall` is not a group"), "{}", text(&output));
    // A concept that was trained further is another one, even under the same name.
    assert!(respodiff(path, "train --target man --out m.safetensors --iterations 3 --batch 1").status.success());
    let output = respodiff(path, &format!("{eval} --out whole"));
    assert!(output.status.code() == Some(1) && text(&output).contains("other settings"), "{}", text(&output));
    // The manifest of balanced samples says which picture got which concept.
    let args = "sample doctor --steps 2 --batch 4 --balance w.safetensors,m.safetensors --seed 3 --out s.png";
    let output = respodiff(path, args);
    assert!(output.status.success(), "{}", text(&output));
    let manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(path.join("s-0.json")).unwrap()).unwrap();
    let women = manifest.as_array().unwrap().iter().filter(|m| m["info"]["concepts"][0]["name"] == "woman").count();
    assert_eq!((manifest.as_array().unwrap().len(), women), (4, 2), "{manifest}");
    let tags = respodiff::image::read_png_text(&path.join("s-1.png")).unwrap();
    assert!(tags.iter().any(|(k, v)| k == "parameters" && v.contains("Concepts: ")), "{tags:?}");
}

/// Two judges, of which the second is a CLIP that knows nothing: it agrees with the first by chance, and a calibration
/// finds that it is right by chance alone. A run beside itself has no difference.
#[test]
fn judges_are_judged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/clip").display().to_string();
    let noise = support::golden().join("checkpoints/clip").display().to_string();
    // Pictures of known genders, which the demo draws well.
    let mut list = "file,gender\n".to_string();
    for (word, label) in [("woman", "Female"), ("man", "Male")] {
        let sample = "sample --steps 20 --batch 6 --seed 1 --quiet --out {prompt}-{seed}.png --prompt";
        let prompt = format!("a photo of a {word}");
        let args = sample.split(' ').chain([prompt.as_str()]);
        let output = Command::new(env!("CARGO_BIN_EXE_respodiff")).args(args).current_dir(path).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        (1..7).for_each(|seed| list += &format!("a-photo-of-a-{word}-{seed}.png,{label}\n"));
    }
    std::fs::write(path.join("labels.csv"), list).unwrap();
    let eval = format!(
        "eval fairness --concepts woman,man=3,1 --professions doctor,nurse --images-per-prompt 6 --batch 6 --steps 8 \
         --clip {demo} --clip {noise} --calibration labels.csv --out run"
    );
    let output = respodiff(path, &eval);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(path.join("run/report.json")).unwrap()).unwrap();
    let summaries = report["summaries"].as_array().unwrap();
    assert_eq!(summaries.len(), 2);
    let number = |value: &serde_json::Value| value.as_f64().unwrap_or_else(|| panic!("{value}"));
    let accuracy = [0, 1].map(|judge| number(&summaries[judge]["corrected"]["accuracy"]));
    assert!(accuracy[0] > 0.9 && accuracy[1] < 0.8, "{accuracy:?}");
    assert!(
        summaries[0]["corrected"]["deviation_ratio"].is_array()
            && summaries[1]["corrected"]["deviation_ratio"].is_null()
    );
    assert_ne!(summaries[0]["judge"], summaries[1]["judge"]);
    assert_eq!(summaries[0]["shares"], serde_json::json!([0.75, 0.25]));
    assert!(number(&report["agreement"][0]["kappa"]) < 0.5, "{}", report["agreement"]);
    for summary in summaries {
        let p = number(&summary["p"]);
        let [low, high] = [0, 1].map(|end| number(&summary["deviation_ratio"][1]["interval"][end]));
        assert!(p > 0.0 && p <= 1.0 && low < high && number(&summary["chance"]) > 0.1, "{summary}");
        let [counts, ratio] = ["counts", "deviation_ratio"].map(|key| &summary["professions"][0][key][1]);
        let women = number(&counts[0]) / (number(&counts[0]) + number(&counts[1]));
        assert!((number(&ratio["value"]) - (women - 0.75).abs() / 0.75).abs() < 1e-9, "{summary}");
    }
    let output = respodiff(path, "eval compare run run --json");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let compared: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&compared[0]["balanced"]["p"], &compared[0]["balanced"]["pairs"]), (&1.0.into(), &12.into()));
    // The card of a concept states these results; that of another refuses them.
    let concepts = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/concepts").display().to_string();
    let output = respodiff(path, &format!("concept card {concepts}/woman.safetensors --report run"));
    let card = String::from_utf8_lossy(&output.stdout).into_owned();
    let ratio = format!("{:.3}", number(&summaries[0]["deviation_ratio"][1]["value"]));
    assert!(output.status.success() && card.starts_with("---\n") && card.contains(&ratio), "{card}");
    let output = respodiff(path, &format!("concept card {concepts}/asian.safetensors --report run"));
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stdout));
    // A label that is missing for a class is named.
    std::fs::write(path.join("labels.csv"), "file,gender\na-photo-of-a-man-1.png,Male\n").unwrap();
    let output = respodiff(path, &eval);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(2) && error.contains("woman"), "{error}");
}

/// A calibration chooses the best of its trials, each of which is what `eval fairness` measures; and sampling uses it.
#[test]
fn concepts_are_calibrated() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let survey = "--images-per-prompt 4 --batch 4 --steps 2 --professions doctor,nurse --seed 40";
    let calibrate = format!("concept calibrate --concepts woman,man {survey} --weights 2,0.5 --timesteps 500,0");
    let succeed = |args: &str| {
        let output = respodiff(path, args);
        assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
        output
    };
    let json = |file: &str| -> serde_json::Value {
        serde_json::from_str(&std::fs::read_to_string(path.join(file)).unwrap()).unwrap()
    };
    let number = |value: &serde_json::Value| value.as_f64().unwrap();
    succeed(&format!("{calibrate} --alignment-loss 100 --out all"));
    let trials = json("all/trials.json");
    let trials = trials.as_array().unwrap();
    let strength = |trial: &serde_json::Value| [number(&trial["weight"]), trial["until"].as_f64().unwrap_or(0.0)];
    assert_eq!(trials.iter().map(strength).collect::<Vec<_>>(), [[0.5, 500.0], [2.0, 500.0], [0.5, 0.0], [2.0, 0.0]]);
    let ratio = |trial: &serde_json::Value| number(&trial["deviation_ratio"][1]);
    let best = trials.iter().min_by(|a, b| ratio(a).total_cmp(&ratio(b))).unwrap();
    let [weight, until] = strength(best);
    succeed(&format!(
        "eval fairness --concepts woman,man {survey} --weight {weight} --concepts-until {until} --out one"
    ));
    let report = json("one/report.json");
    let summary = &report["summaries"][0];
    for side in 0..2 {
        assert_eq!(summary["deviation_ratio"][side]["value"], best["deviation_ratio"][side]);
        assert_eq!(summary["alignment"][side], best["alignment"][side]);
    }
    let [plain, balanced] = [0, 1].map(|side| number(&summary["alignment"][side]));
    assert!((number(&best["alignment_loss"]) - 100.0 * (1.0 - balanced / plain)).abs() < 1e-9);
    // The file says so, and `eval` and `sample` use it; weights follow guidance, 7.5 in the calibration.
    let calibrated = Concept::load(path.join("all/woman.safetensors")).unwrap();
    let calibration = calibrated.metadata.calibration.clone().unwrap();
    assert_eq!((calibration.strength.weight as f64, calibration.strength.until as f64), (weight, until));
    assert_eq!((calibration.pictures, calibration.guidance), (8, 7.5));
    succeed(&format!("eval fairness --concepts all/woman.safetensors,all/man.safetensors {survey} --out two"));
    assert_eq!(json("two/report.json")["summaries"], report["summaries"]);
    for (flags, factor) in [("", 1.0), ("--guidance 3", 2.5f64.sqrt()), ("--balance-weight 0.25", 0.25 / weight)] {
        let files = "all/woman.safetensors,all/man.safetensors";
        let args = format!("sample nurse --balance {files} --steps 1 -o x.png {flags}");
        succeed(args.trim());
        let info = json("x.json");
        let used = &info[0]["info"]["concepts"][0];
        assert!((number(&used["weight"]) - weight * factor).abs() < 1e-6, "{flags}: {used}");
        assert_eq!(used["until"].as_f64().unwrap_or(0.0), until, "{flags}");
    }
    let shown = String::from_utf8_lossy(&succeed("concept show all/woman.safetensors").stdout).into_owned();
    assert!(shown.contains("calibrated") && shown.contains("a woman, a man"), "{shown}");
    // The same again makes nothing, and writes the same.
    let before = std::fs::read(path.join("all/man.safetensors")).unwrap();
    succeed(&format!("{calibrate} --alignment-loss 100 --out all"));
    assert_eq!(std::fs::read(path.join("all/man.safetensors")).unwrap(), before);
    for (args, code, word) in [
        (format!("{calibrate} --out all --shard 0/2"), 2, "--shard"),
        (format!("{calibrate} --out all --alignment-loss nan"), 2, "--alignment-loss"),
        // Nothing balances better than plain pictures if concepts do nothing.
        (format!("concept calibrate --concepts woman,man {survey} --weights 0 --timesteps 0 --out no"), 1, "plain"),
        (format!("{calibrate} --out all --guidance 2"), 1, "other settings"),
        ("concept calibrate --concepts woman,man --weights inf --out x".into(), 2, "--weights"),
        ("concept calibrate --concepts woman,woman --out x".into(), 2, "--concepts"),
    ] {
        let output = respodiff(path, &args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(code) && error.contains(word), "{args}: {error}");
    }
    // Nothing is written if every strength loses too much.
    let output = respodiff(
        path,
        &format!("concept calibrate --concepts woman,man {survey} --weights 9 --timesteps 0 --out none"),
    );
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(2) && error.contains("every strength loses more than 1 %"), "{error}");
    assert!(!path.join("none/woman.safetensors").exists());
}
