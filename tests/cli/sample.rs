//! `respodiff sample`: pictures, seeds, latents, concepts and the report.

use super::{command, files, respodiff, tensors, text, write_latents};
use crate::support;
use respodiff::weights::Source;
use respodiff::{Device, Engine};
use std::path::Path;

#[test]
fn samples_with_the_demo() {
    let folder = tempfile::tempdir().unwrap();
    let args =
        ["sample", "a photo of a doctor", "--steps", "3", "--seed", "5", "--batch", "2", "--save-latents", "l.st"];
    let output = respodiff(folder.path(), &args);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let names = ["a-photo-of-a-doctor-5-0.png", "a-photo-of-a-doctor-5-1.png", "l.st"];
    assert_eq!(files(folder.path()), names);
    assert_eq!(text(&output.stdout).lines().collect::<Vec<_>>(), names);
    let times = text(&output.stderr);
    assert!(
        times.starts_with("loaded in ")
            && times.contains(" s; 2 images, ")
            && times.contains(" s each; ")
            && times.contains(" GiB of memory planned"),
        "{times}"
    );
    let tags = respodiff::image::read_png_text(&folder.path().join(names[1])).unwrap();
    let parameters = &tags.iter().find(|(k, _)| k == "parameters").unwrap().1;
    assert!(parameters.contains("a photo of a doctor") && parameters.contains("Seed: 6"), "{parameters}");
    assert!(tags.iter().any(|(k, v)| k == "respodiff" && v.contains("\"seed\":6")), "{tags:?}");
    // A file name that the program chooses overwrites nothing.
    assert!(respodiff(folder.path(), &args[..8]).status.success());
    assert_eq!(files(folder.path()).len(), 5);
}

/// The program prints one JSON object to stdout, for services that start it.
#[test]
fn samples_are_reported_as_json() {
    let folder = tempfile::tempdir().unwrap();
    let concept = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/concepts/man.safetensors").display().to_string();
    let args = ["sample", "a cook", "--steps", "2", "--seed", "7", "--images", "3", "--batch", "2", "--device", "cpu"];
    let more = ["--out", "x.png", "--save-latents", "l.st", "--concept", &concept, "--json"];
    let start = std::time::Instant::now();
    let output = respodiff(folder.path(), &[&args[..], &more].concat());
    let wall = start.elapsed().as_secs_f64();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(files(folder.path()), ["l.st", "x-0.json", "x-0.png", "x-1.png", "x-2.png"]);
    for (i, image) in report["images"].as_array().unwrap().iter().enumerate() {
        assert_eq!((&image["file"], &image["seed"]), (&format!("x-{i}.png").into(), &(7 + i).into()));
    }
    assert_eq!(report["images"].as_array().unwrap().len(), 3);
    assert_eq!((&report["manifest"], &report["latents"]), (&"x-0.json".into(), &"l.st".into()));
    assert!(report["device"].as_str().unwrap().starts_with("CPU"), "{report}");
    let seconds = |name: &str| report[name].as_f64().unwrap();
    let (load, first, each) = (seconds("load_seconds"), seconds("first_image_seconds"), seconds("seconds_per_image"));
    assert!(0.0 < load && load < first && first < wall && 0.0 < each && load + 3.0 * each < wall, "{report}, {wall}");
    let engine = Engine::open(&Source::demo(), Device::cpu()).unwrap();
    let memory = engine.memory(engine.options().batch(2).concepts(true)).unwrap();
    for (name, bytes) in
        [("weights", memory.weights), ("text", memory.text), ("unet", memory.unet), ("vae", memory.vae)]
    {
        assert_eq!(report["memory"][name], bytes, "{name}");
    }
    assert_eq!((&report["memory"]["total"], &report["memory"]["taken"]), (&memory.total().into(), &().into()));
}

/// If a batch fails, the pictures, latents and report of the batches before it are kept.
#[test]
fn a_failure_keeps_what_was_made_before() {
    let folder = tempfile::tempdir().unwrap();
    write_latents(&folder.path().join("noise.st"), &[[0.5; 2 * 256], [3e38; 2 * 256]].concat());
    let args =
        ["sample", "a cook", "--steps", "2", "--images", "4", "--batch", "2", "--device", "cpu", "--out", "x.png"];
    let more = ["--latents", "noise.st", "--save-latents", "l.st", "--json"];
    let output = respodiff(folder.path(), &[&args[..], &more].concat());
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("error: ") && text(&output.stderr).contains("step 1"), "{output:?}");
    assert_eq!(files(folder.path()), ["l.st", "noise.st", "x-0.png", "x-1.png"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["images"].as_array().unwrap().len(), 2, "{report}");
    let bytes = std::fs::read(folder.path().join("l.st")).unwrap();
    let latents = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(latents.tensor("latents").unwrap().shape(), [2, 4, 8, 8]);
}

#[test]
fn given_noise_is_the_seeds_noise() {
    let folder = tempfile::tempdir().unwrap();
    let mut noise = vec![0.0f32; 4 * 64];
    respodiff::diffusion::noise::NormalGenerator::new(Default::default(), 3).fill(&mut noise);
    write_latents(&folder.path().join("noise.st"), &noise);
    let sample = |extra: &[&str], out: &str| {
        let args: Vec<&str> =
            ["sample", "a cook", "--steps", "2", "--out", out].into_iter().chain(extra.iter().copied()).collect();
        let output = respodiff(folder.path(), &args);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let decoder = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(folder.path().join(out)).unwrap()));
        let mut reader = decoder.read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        pixels
    };
    assert_eq!(sample(&["--seed", "3"], "a.png"), sample(&["--latents", "noise.st", "--seed", "9"], "b.png"));
}

/// Pictures, their concepts and the manifest are the same in one batch and in several.
#[test]
fn batches_of_one_run_are_one() {
    let folder = tempfile::tempdir().unwrap();
    let concepts = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/concepts");
    let file = |name: &str| concepts.join(name).display().to_string();
    let genders = format!("{},{}=3,2", file("woman.safetensors"), file("man.safetensors"));
    let races = format!("{},{}", file("asian.safetensors"), file("black.safetensors"));
    let (always, base) = (format!("{}:0.25", file("white.safetensors")), ["--steps", "2", "--seed", "8"]);
    let balance = ["--balance", &genders, "--balance", &races, "--concept", &always];
    let run = |prompt: &str, extra: &[&str]| {
        let output = respodiff(folder.path(), &[&["sample", prompt], &base[..], &balance, extra].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        output
    };
    run("a doctor", &["--batch", "5", "--out", "a.png", "--save-latents", "a.st"]);
    run("a doctor", &["--images", "5", "--batch", "2", "--out", "b.png", "--save-latents", "b.st"]);
    let path = |name: String| folder.path().join(name);
    for i in 0..5 {
        let bytes = |run: &str| std::fs::read(path(format!("{run}-{i}.png"))).unwrap();
        assert_eq!(bytes("a"), bytes("b"), "image {i}");
    }
    assert_eq!(tensors(&path("a.st".into())), tensors(&path("b.st".into())));
    // Noise from a file is split into batches likewise.
    run("a doctor", &["--images", "5", "--batch", "3", "--latents", "a.st", "--out", "c.png"]);
    let manifest = |run: &str| -> Vec<serde_json::Value> {
        let bytes = std::fs::read(path(format!("{run}-0.json"))).unwrap();
        serde_json::from_slice(&bytes).unwrap()
    };
    let (one, several) = (manifest("a"), manifest("b"));
    let infos = |list: &[serde_json::Value]| list.iter().map(|image| image["info"].clone()).collect::<Vec<_>>();
    assert_eq!(infos(&one), infos(&several));
    let count = |name: &str| one.iter().filter(|m| m["info"]["concepts"].to_string().contains(name)).count();
    assert_eq!((count("a woman"), count("a man"), count("white"), one.len()), (3, 2, 5, 5), "{one:?}");
    assert_eq!(several[4]["file"], "b-4.png");
    assert_eq!(several[4]["info"]["seed"], 12);

    // A prompt that names a gender is not balanced by gender, but still by race.
    let output = run("a female doctor", &["--batch", "2", "--out", "d.png"]);
    assert!(text(&output.stderr).contains("`female`"), "{}", text(&output.stderr));
    assert!(manifest("d").iter().all(|m| m["info"]["concepts"].as_array().unwrap().len() == 2));
    run("a female doctor", &["--batch", "2", "--out", "e.png", "--respect-prompt", "false"]);
    assert!(manifest("e").iter().all(|m| m["info"]["concepts"].as_array().unwrap().len() == 3));
}

#[test]
fn names_the_words_that_do_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    let prompt = format!("{} unicorns", "a photo of a doctor ".repeat(40));
    let output = respodiff(folder.path(), &["sample", &prompt, "--steps", "1", "--out", "x.png"]);
    assert!(output.status.success() && text(&output.stderr).contains("unicorns"), "{}", text(&output.stderr));
}

#[test]
fn saved_latents_are_those_of_diffusers() {
    let folder = tempfile::tempdir().unwrap();
    // SDXL's default guidance scale is 5.
    for (name, guidance) in [("pipeline_sd1_pndm", &["--guidance", "7.5"][..]), ("pipeline_sdxl_euler", &[])] {
        let case = support::cases(name, 1).remove(0);
        let meta = case.metadata();
        let prompt: Vec<String> = serde_json::from_str(&meta["prompt"]).unwrap();
        let [_, _, height, width] = case.shape("out.image")[..] else { panic!("NCHW") };
        let model = support::golden().join("checkpoints").join(&meta["checkpoint"]);
        let (height, width) = (height.to_string(), width.to_string());
        let args = ["sample", &prompt[0], "--model", model.to_str().unwrap(), "--steps", &meta["steps"]];
        let size = ["--seed", &meta["seed"], "--width", &width, "--height", &height];
        let files = ["--out", "x.png", "--save-latents", "l.st"];
        let output = respodiff(folder.path(), &[&args[..], &size, guidance, &files].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        let ours = &tensors(&folder.path().join("l.st"))["latents"];
        assert_eq!(ours.0, case.shape("out.latents"));
        let error = support::relative_l2(&ours.1, &case.floats("out.latents"));
        assert!(error < 1e-4, "{name}: {error}");
    }
}

/// SDXL's own flags, balanced concepts at its bottleneck, and the records of both in the pictures.
#[test]
fn sdxl_balanced_and_cropped() {
    use respodiff::concept::{Concept, Form, Metadata, Module};
    use respodiff::graph::Shape;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for (i, name) in ["up", "down"].into_iter().enumerate() {
        // A side of 128 pixels is one of 16 latents, and of 4 at the bottleneck.
        let shape = Shape::new(1, 4, 4, 24);
        let numbers = (0..shape.len()).map(|j| ((i * 999 + j) as f32).sin()).collect();
        let ram = Module::with_parameters(Form::Constant, shape, numbers).unwrap();
        Concept::new(Metadata::new(name), ram, None).save(path(name)).unwrap();
    }
    let model = support::golden().join("checkpoints/sdxl");
    let args = ["sample", "a cat", "--model", model.to_str().unwrap(), "--steps", "2", "--seed", "3"];
    let run = |more: &[&str]| {
        let output = respodiff(folder.path(), &[&args[..], more].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
    };
    let sizes = ["--original-size", "300x200", "--crop", "16,0", "--negative-prompt", ""];
    run(&[&sizes[..], &["--batch", "4", "--balance", "up,down", "--out", "a.png"]].concat());
    let manifest: Vec<serde_json::Value> = serde_json::from_slice(&std::fs::read(path("a-0.json")).unwrap()).unwrap();
    let given = |name: &str| manifest.iter().filter(|m| m["info"]["concepts"][0]["name"] == name).count();
    assert_eq!((given("up"), given("down")), (2, 2), "{manifest:?}");
    let info = &manifest[0]["info"];
    assert_eq!((&info["original_size"], &info["crop"]), (&serde_json::json!([300, 200]), &serde_json::json!([16, 0])));
    assert_eq!((&info["negative_prompt"], &info["width"]), (&"".into(), &128.into()));
    // Each of these flags changes the picture: without a negative prompt, SDXL takes zeros, not the encoding of an
    // empty prompt.
    let latents = |more: &[&str]| {
        run(&[more, &["--out", "x.png", "--save-latents", "l.st"]].concat());
        tensors(&path("l.st"))["latents"].1.clone()
    };
    let plain = latents(&[]);
    for flags in [["--negative-prompt", ""], ["--original-size", "300x200"], ["--crop", "16,0"]] {
        let error = support::relative_l2(&latents(&flags), &plain);
        assert!(error > 1e-3, "{flags:?} moves the latents by {error:.1e} of them");
    }
    assert_eq!(latents(&["--original-size", "128x128", "--crop", "0,0"]), plain);
}

/// The hash of a checkpoint's files is remembered until one of them changes, and what is remembered can be lost.
#[test]
fn hashes_are_remembered() {
    let (folder, checkpoint) = (tempfile::tempdir().unwrap(), support::copy("sd1"));
    let weights = checkpoint.path().join("unet/diffusion_pytorch_model.safetensors");
    let touch = |hours: u64| {
        let time = std::time::SystemTime::now() - std::time::Duration::from_secs(3600 * hours);
        std::fs::File::options().append(true).open(&weights).unwrap().set_modified(time).unwrap();
    };
    let list = folder.path().join("caches/respodiff/hashes.json");
    let hash = || {
        let model = checkpoint.path().display().to_string();
        let args =
            ["sample", "x", "--model", &model, "--steps", "1", "--width", "16", "--height", "16", "--out", "x.png"];
        let output =
            command(folder.path(), &args).env("XDG_CACHE_HOME", folder.path().join("caches")).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        let tags = respodiff::image::read_png_text(&folder.path().join("x.png")).unwrap();
        let info = &tags.iter().find(|(key, _)| key == "respodiff").unwrap().1;
        let info: serde_json::Value = serde_json::from_str(info).unwrap();
        info["model_sha256"].as_str().unwrap().to_string()
    };
    // A file that was only just written may change again without a trace.
    touch(0);
    let truth = hash();
    assert!(!list.exists());
    touch(2);
    assert_eq!(hash(), truth);
    let remembered = std::fs::read_to_string(&list).unwrap();
    assert!(remembered.contains(&truth), "{remembered}");
    let other = "0".repeat(64);
    std::fs::write(&list, remembered.replace(&truth, &other)).unwrap();
    assert_eq!(hash(), other);
    touch(1);
    assert_eq!(hash(), truth);
    std::fs::write(&list, "not a list").unwrap();
    assert_eq!(hash(), truth);
}
