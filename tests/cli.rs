//! The binary as a user runs it.

mod support;

use respodiff::weights::Source;
use respodiff::{Device, Engine};
use std::path::Path;
use std::process::{Command, Output};

fn respodiff(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_respodiff")).args(args).current_dir(folder).output().expect("runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

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
    // A name of our own choosing overwrites nothing.
    assert!(respodiff(folder.path(), &args[..8]).status.success());
    assert_eq!(files(folder.path()).len(), 5);
}

/// One JSON object on stdout, for a service that starts the program.
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

/// A file for `--latents`, of images of the demo's size.
fn write_latents(path: &Path, numbers: &[f32]) {
    let (shape, bytes) = (vec![numbers.len() / 256, 4, 8, 8], bytemuck::cast_slice(numbers));
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, bytes).unwrap();
    std::fs::write(path, safetensors::serialize([("latents", view)], None).unwrap()).unwrap();
}

/// A batch that fails takes nothing from those before it: their pictures, latents and report are there.
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
    // Noise from a file is cut into batches likewise.
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

    // Genders are left to a prompt that names one, races are still balanced.
    let output = run("a female doctor", &["--batch", "2", "--out", "d.png"]);
    assert!(text(&output.stderr).contains("`female`"), "{}", text(&output.stderr));
    assert!(manifest("d").iter().all(|m| m["info"]["concepts"].as_array().unwrap().len() == 2));
    run("a female doctor", &["--batch", "2", "--out", "e.png", "--respect-prompt", "false"]);
    assert!(manifest("e").iter().all(|m| m["info"]["concepts"].as_array().unwrap().len() == 3));
}

#[test]
fn refuses_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    for (args, code, word) in [
        (&["sample", "x", "--width", "63"][..], 2, "64"),
        (&["sample", "x", "--steps", "0"], 2, "steps"),
        (&["sample", "x", "--threads", "0"], 2, "threads"),
        (&["sample", "x", "--batch", "0"], 2, "batch"),
        (&["sample", "x", "--batch", "0", "--images", "3"], 2, "batch"),
        (&["sample", "x", "--batch", "18446744073709551615"], 2, "18446744073709551615"),
        (&["sample", "x", "--images", "0"], 2, "images"),
        (&["sample", "x", "--scheduler", "nonsense"], 2, "DDIM"),
        (&["sample", "x", "--spacing", "nonsense"], 2, "karras"),
        (&["sample", "x", "--guidance", "NaN"], 2, "guidance"),
        (&["sample", "x", "--rng", "dice"], 2, "torch-cpu"),
        (&["sample", "x", "--device", "cuda"], 1, "CPU"),
        (&["sample", "x", "--out", "no/such/folder/x.png"], 1, "no/such/folder"),
        (&["sample", "x", "--save-latents", "no/such/folder/l.st"], 1, "no/such/folder"),
        (&["sample", "x", "--save-latents", "."], 1, "directory"),
        (&["sample", "x", "--model", "./nowhere"], 2, "nowhere"),
        (&["sample", "x", "--latents", "missing.st"], 1, "missing.st"),
        (&["sample", "x", "--original-size", "512x512"], 2, "SDXL"),
        (&["sample", "x", "--original-size", "512"], 2, "whole numbers"),
        (&["sample", "x", "--crop", "1x2"], 2, "whole numbers"),
        (&["sample"], 2, "PROMPT"),
        (&["probe", "unet", "--inputs", "missing.st", "--output", "o.st"], 1, "missing.st"),
        (&["info", "--model", "./nowhere"], 2, "nowhere"),
        (&["train", "--out", "c.safetensors"], 2, "--target"),
        (&["train", "--avoid", "violence", "--out", "c.safetensors"], 2, "--neutral"),
        (&["train", "--target", "x", "--out", "no/such/folder/c"], 1, "no/such/folder"),
        (&["train", "--target", "x", "--out", "c", "--recipe", "nonsense"], 2, "official"),
        (&["train", "--target", "x", "--out", "c", "--batch", "0"], 2, "batch"),
        (&["train", "--target", "x", "--out", "c", "--lr-ram", "NaN"], 2, "--lr-ram"),
        (&["train", "--target", "x", "--out", "c", "--variant", "gan"], 2, "ram-only"),
    ] {
        let output = respodiff(folder.path(), args);
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
        assert!(error.contains(word) && !error.contains("panicked"), "{args:?}: {error}");
        assert!(files(folder.path()).is_empty(), "{args:?} left {:?}", files(folder.path()));
    }
}

#[test]
fn names_the_words_that_do_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    let prompt = format!("{} unicorns", "a photo of a doctor ".repeat(40));
    let output = respodiff(folder.path(), &["sample", &prompt, "--steps", "1", "--out", "x.png"]);
    assert!(output.status.success() && text(&output.stderr).contains("unicorns"), "{}", text(&output.stderr));
}

#[test]
fn probes_give_what_diffusers_gave() {
    let folder = tempfile::tempdir().unwrap();
    for (component, case, tensors) in [
        ("unet", "unet_sd1_2", &["sample", "mid"][..]),
        ("unet", "unet_sdxl_1", &["sample", "mid"]),
        ("vae-decode", "vae_sd1_1", &["image"]),
        ("vae-encode", "vae_sd2_0", &["mean", "logvar"]),
        ("text", "text_sd2_text_encoder", &["last_hidden_state", "penultimate_hidden_state"]),
    ] {
        let golden = support::cases(case, 1).remove(0);
        let model = support::golden().join("checkpoints").join(case.split('_').nth(1).unwrap());
        let inputs = support::golden().join(format!("cases/{case}.safetensors"));
        let args = ["probe", component, "--model", model.to_str().unwrap(), "--inputs", inputs.to_str().unwrap()];
        let output = respodiff(folder.path(), &[&args[..], &["--output", "out.st"]].concat());
        assert!(output.status.success(), "{case}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(" s, again "), "{case}: {}", text(&output.stderr));
        let bytes = std::fs::read(folder.path().join("out.st")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for name in tensors {
            let ours = file.tensor(name).unwrap();
            assert_eq!(ours.shape(), golden.shape(&format!("out.{name}")), "{case} {name}");
            let ours: Vec<f32> = ours.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            let error = support::relative_l2(&ours, &golden.floats(&format!("out.{name}")));
            assert!(error < 2e-5, "{case} {name}: {error}");
        }
    }
}

#[test]
fn info_tells_components_and_memory() {
    let folder = tempfile::tempdir().unwrap();
    let model = support::golden().join("checkpoints/sdxl");
    for (args, words) in [
        (&["info"][..], ["text_encoder ", "unet", "vae", "MiB"]),
        (&["info", "--model", model.to_str().unwrap()], ["text_encoder_2", "unet", "vae", "128x128"]),
    ] {
        let output = respodiff(folder.path(), args);
        let report = text(&output.stdout);
        assert!(output.status.success() && words.iter().all(|w| report.contains(w)), "{report}");
    }
}

/// Named fp32 tensors of a file.
fn tensors(path: &Path) -> std::collections::HashMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let floats = |data: &[u8]| data.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    file.iter().map(|(name, view)| (name.to_string(), (view.shape().to_vec(), floats(view.data())))).collect()
}

fn write(path: &Path, named: &[(&str, Vec<usize>, &[f32])]) {
    let views = named.iter().map(|(name, shape, values)| {
        let bytes = bytemuck::cast_slice(values);
        (*name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn probes_the_second_text_encoder_and_prompts() {
    let folder = tempfile::tempdir().unwrap();
    let case = support::cases("text_sdxl_text_encoder_2", 1).remove(0);
    let model = support::golden().join("checkpoints/sdxl");
    let inputs = support::golden().join("cases/text_sdxl_text_encoder_2.safetensors");
    let model = model.to_str().unwrap();
    let args = ["probe", "text", "--encoder", "2", "--model", model, "--output", "o.st"];
    let output = respodiff(folder.path(), &[&args[..], &["--inputs", inputs.to_str().unwrap()]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let ours = tensors(&folder.path().join("o.st"));
    for name in ["last_hidden_state", "penultimate_hidden_state", "text_embeds"] {
        let error = support::relative_l2(&ours[name].1, &case.floats(&format!("out.{name}")));
        assert!(error < 2e-5, "{name}: {error}");
    }
    // A prompt gives what its own ids give.
    let output = respodiff(folder.path(), &[&args[..], &["--prompt", "a photo of a cat"]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let first = tensors(&folder.path().join("o.st"));
    assert_eq!(first["input_ids"].0, [1, 77]);
    write(&folder.path().join("ids.st"), &[("input_ids", vec![1, 77], &first["input_ids"].1)]);
    assert!(respodiff(folder.path(), &[&args[..], &["--inputs", "ids.st"]].concat()).status.success());
    assert_eq!(tensors(&folder.path().join("o.st"))["text_embeds"], first["text_embeds"]);
}

/// Numbers that fp32 does not hold, and ids that are no whole numbers.
#[test]
fn probes_take_no_numbers_that_they_would_change() {
    let folder = tempfile::tempdir().unwrap();
    let (latents, ids) = (vec![1e300f64; 4 * 8 * 8], vec![0.5f64; 77]);
    for (component, name, shape, values, words) in [
        ("vae-decode", "latents", vec![1, 4, 8, 8], &latents, "holds NaN or infinity"),
        ("text", "input_ids", vec![1, 77], &ids, "`input_ids` holds 0.5"),
    ] {
        let bytes = bytemuck::cast_slice(values);
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F64, shape, bytes).unwrap();
        std::fs::write(folder.path().join("in.st"), safetensors::serialize([(name, view)], None).unwrap()).unwrap();
        let output = respodiff(folder.path(), &["probe", component, "--inputs", "in.st", "--output", "out.st"]);
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains(words), "{}", text(&output.stderr));
    }
}

#[test]
fn probes_schedulers() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = std::fs::read(support::golden().join("cases/scheduler_euler_a.safetensors")).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let cases: Vec<serde_json::Value> = serde_json::from_str(&header.metadata().as_ref().unwrap()["cases"]).unwrap();
    // One whose config is the golden checkpoint's own, up to the class.
    let (index, case) = cases
        .iter()
        .enumerate()
        .find(|(_, c)| c["spacing"].is_null() && c["steps"] == 10 && c["config"]["_class_name"] == "PNDMScheduler")
        .expect("a plain case");
    assert_eq!(case["config"]["beta_end"], 0.012);
    let golden = tensors(&support::golden().join("cases/scheduler_euler_a.safetensors"));
    let calls = golden[&format!("{index}.timesteps")].0[0];
    let first = |name: &str| {
        let (shape, values) = &golden[name];
        let shape = [&[calls], &shape[1..]].concat();
        let len = shape.iter().product();
        (shape, values[..len].to_vec())
    };
    let (eps, noise) = (first("out"), first("noise"));
    let sample = &golden["sample"];
    let given: [(&str, Vec<usize>, &[f32]); 3] =
        [("sample", sample.0.clone(), &sample.1), ("eps", eps.0, &eps.1), ("noise", noise.0, &noise.1)];
    write(&folder.path().join("in.st"), &given);
    let model = support::golden().join("checkpoints/sd1");
    let args = ["probe", "scheduler", "--model", model.to_str().unwrap(), "--inputs", "in.st", "--output", "o.st"];
    let output = respodiff(folder.path(), &[&args[..], &["--scheduler", "Euler a", "--steps", "10"]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let ours = tensors(&folder.path().join("o.st"));
    for name in ["timesteps", "model_input", "prev_sample"] {
        let error = support::relative_l2(&ours[name].1, &golden[&format!("{index}.{name}")].1);
        assert!(error < 4e-6, "{name}: {error}");
    }
}

#[test]
fn saved_latents_are_those_of_diffusers() {
    let folder = tempfile::tempdir().unwrap();
    // SDXL's guidance of 5 is its default.
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

/// SDXL's own flags, quotas over its bottleneck, and what the pictures say of both.
#[test]
fn sdxl_balanced_and_cropped() {
    use respodiff::concept::{Concept, Form, Metadata, Module};
    use respodiff::graph::Shape;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for (i, name) in ["up", "down"].into_iter().enumerate() {
        // 128 pixels are 16 latents, and a bottleneck of 4.
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
    // Each of these changes the picture: SDXL's zeros are no empty prompt.
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

#[cfg(unix)]
#[test]
fn interrupted_runs_leave_nothing_half_done() {
    use std::time::Duration;
    for (signal, code) in [("-INT", Some(130)), ("-TERM", Some(130)), ("-KILL", None)] {
        let folder = tempfile::tempdir().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_respodiff"))
            .args(["sample", "a cook", "--steps", "900", "--batch", "16", "--out", "x.png"])
            .current_dir(folder.path())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(700));
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        let status = child.wait().unwrap();
        assert_eq!(status.code(), code, "{signal}");
        let mut error = String::new();
        std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut error).unwrap();
        assert!(code.is_none() || error.contains("interrupted: stopped after"), "{error}");
        assert!(files(folder.path()).is_empty(), "{signal} left {:?}", files(folder.path()));
    }
}

/// Whole batches that were made before are kept, and the manifest lists them.
#[cfg(unix)]
#[test]
fn interrupted_runs_keep_what_they_saved() {
    use std::io::BufRead;
    let folder = tempfile::tempdir().unwrap();
    let concept = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/concepts/man.safetensors");
    let mut child = Command::new(env!("CARGO_BIN_EXE_respodiff"))
        .args(["sample", "a cook", "--steps", "40", "--images", "500", "--out", "x.png", "--concept"])
        .arg(concept)
        .current_dir(folder.path())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    let mut lines = lines.map(|line| line.unwrap());
    assert_eq!(lines.next().as_deref(), Some("x-0.png"));
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let printed = 1 + lines.filter(|line| line.ends_with(".png")).count();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(
        text(&output.stderr).contains(&format!("{printed} of 500 pictures were saved")),
        "{}",
        text(&output.stderr)
    );
    let manifest: Vec<serde_json::Value> =
        serde_json::from_slice(&std::fs::read(folder.path().join("x-0.json")).unwrap()).unwrap();
    assert_eq!((manifest.len(), files(folder.path()).len()), (printed, printed + 1));
}

#[cfg(unix)]
#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_respodiff"))
        .arg("info")
        .current_dir(folder.path())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && !text(&output.stderr).contains("panicked"), "{}", text(&output.stderr));
}

/// A report that a full disk has swallowed is no success.
#[cfg(target_os = "linux")]
#[test]
fn what_cannot_be_printed_is_an_error() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_respodiff"));
    let output = command.args(["doctor", "--json"]).stdout(full).output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.starts_with("error: cannot print: ") && said.lines().count() == 1, "{said}");
}

/// A GPU that is there and cannot be had is told of by whoever takes the CPU instead.
#[cfg(target_os = "linux")]
#[test]
fn auto_says_why_it_passes_a_gpu_over() {
    let folder = tempfile::tempdir().unwrap();
    let driver = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/driver.c");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-w", "-DRETAIN=46"]).arg(driver).arg("-o");
    assert!(compiler.arg(folder.path().join("libcuda.so")).status().unwrap().success());
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_respodiff"));
        command.args(args).env("LD_LIBRARY_PATH", folder.path()).output().unwrap()
    };
    let doctor: serde_json::Value = serde_json::from_slice(&run(&["doctor", "--json"]).stdout).unwrap();
    let output = run(&["info"]);
    let said = text(&output.stderr);
    assert!(output.status.success() && text(&output.stdout).contains("device     CPU"), "{said}");
    // A build without kernels is for the CPU, and has nothing to tell.
    let wanted = doctor["kernels"] != serde_json::json!([]);
    let words = "warning: the CPU is taken: Test GPU (9.0) is held by another process";
    assert_eq!(said.contains(words), wanted, "{said}");
    assert_eq!(said.lines().count(), usize::from(wanted), "{said}");
}

/// On whatever machine this is, one with a GPU included.
#[test]
fn doctor_says_what_auto_takes_and_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let said = text(&respodiff(folder.path(), &["doctor"]).stdout);
    let json = text(&respodiff(folder.path(), &["doctor", "--json"]).stdout);
    let report: serde_json::Value = serde_json::from_str(&json).unwrap();
    let taken = report["auto"].as_str().unwrap();
    assert!(said.contains(&format!("--device auto takes {taken}")), "{said}");
    let advice = report["advice"].as_array().unwrap();
    // Whoever asked for a GPU and has none is told why, as `--device cuda` would.
    if taken.starts_with("CPU") {
        let cuda = respodiff(folder.path(), &["sample", "x", "--device", "cuda"]);
        assert_eq!(cuda.status.code(), Some(1));
        assert!(!advice.is_empty());
    }
    for line in advice {
        assert!(said.contains(&format!("note: {}", line.as_str().unwrap())), "{said}");
    }
}

/// Without any GPU: each operation's kernels on each card, and why a convolution of an H100 has none of its own.
#[test]
fn bench_tells_the_kernels_of_cards_that_are_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let plans = |card: &str, filter: &str| {
        let output = respodiff(folder.path(), &["bench", "--plans", card, "--filter", filter]);
        assert!(output.status.success(), "{output:?}");
        text(&output.stdout)
    };
    let told = plans("h100", "conv3x3");
    assert!(told.contains("conv_hopper_160 ") && told.contains("conv3x3 2x32x32 320->320 half"), "{told}");
    assert!(told.contains("(its result has fewer pixels than its source)"), "{told}");
    assert!(told.contains("(64 channels are no stage of its sources)"), "{told}");
    for card in ["a100", "rtx-3090", "rtx-4090", "b200", "rtx-5090"] {
        let told = plans(card, "attention");
        assert!(told.contains("attention 2x8x160 64x64") && !told.contains("hopper") && !told.contains('('), "{told}");
    }
    assert!(plans("rtx-4090", "attention").contains("attention_512_64_16 64x1x1"));
    assert_eq!(respodiff(folder.path(), &["bench", "--plans", "h1000"]).status.code(), Some(2));
}

#[test]
fn bench_times_the_operations_that_the_filter_names() {
    let folder = tempfile::tempdir().unwrap();
    let arguments =
        ["bench", "--model", "demo", "--device", "cpu", "--runs", "1", "--filter", "attention", "--json", "b.json"];
    let output = respodiff(folder.path(), &arguments);
    assert!(output.status.success(), "{output:?}");
    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("b.json")).unwrap()).unwrap();
    assert!(report["peaks"]["launch"].as_f64().unwrap() > 0.0, "{report}");
    let rows: Vec<&serde_json::Value> =
        report["networks"].as_array().unwrap().iter().flat_map(|network| network["rows"].as_array().unwrap()).collect();
    assert!(rows.len() >= 4);
    for row in rows {
        assert_eq!(row["case"]["kind"], "attention");
        assert!(row["seconds"].as_f64().unwrap() > 0.0 && row["flops"].as_f64().unwrap() > 0.0, "{row}");
        assert!(text(&output.stdout).contains(row["label"].as_str().unwrap()));
    }
    let gradients =
        ["bench", "--model", "demo", "--training", "--device", "cpu", "--runs", "1", "--filter", "attention gradient"];
    let output = respodiff(folder.path(), &gradients);
    assert!(output.status.success() && text(&output.stdout).contains("attention gradient 1x4x16 64x77"), "{output:?}");
    let nothing = respodiff(
        folder.path(),
        &["bench", "--model", "demo", "--device", "cpu", "--runs", "1", "--filter", "nonsense"],
    );
    assert_eq!(nothing.status.code(), Some(2));
}

/// The bytes with which files of each format begin.
const MAGIC: [(&str, &[u8]); 4] =
    [("png", b"\x89PNG"), ("jpg", b"\xff\xd8\xff"), ("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF")];

#[test]
fn names_choose_formats_folders_and_templates() {
    let folder = tempfile::tempdir().unwrap();
    let run = |out: &str, more: &[&str]| {
        let args = ["sample", "-p", "a cook", "-s", "1", "--seed", "3", "--quiet", "-o", out];
        respodiff(folder.path(), &[&args[..], more].concat())
    };
    for (extension, magic) in MAGIC {
        let name = format!("x.{extension}");
        let output = run(&name, &[]);
        assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output.stderr));
        let bytes = std::fs::read(folder.path().join(&name)).unwrap();
        assert!(bytes.starts_with(magic), "{name}");
        if extension != "png" {
            // The parameters as EXIF, in UTF-16.
            let prompt: Vec<u8> = "a cook".encode_utf16().flat_map(u16::to_be_bytes).collect();
            assert!(bytes.windows(prompt.len()).any(|window| window == prompt), "{name}");
        }
    }
    let output = run("-", &[]);
    assert!(output.stdout.starts_with(b"\x89PNG"));
    assert_eq!(output.stdout, std::fs::read(folder.path().join("x.png")).unwrap());
    assert!(run("new/inner/", &["--batch", "2"]).status.success());
    assert_eq!(files(&folder.path().join("new/inner")), ["a-cook-3-0.png", "a-cook-3-1.png"]);
    assert!(run("{prompt}_{seed}_{i}.webp", &["--batch", "2"]).status.success());
    assert!(run("{width}x{height}.png", &["-W", "72", "-H", "64"]).status.success());
    let names = files(folder.path());
    for name in ["a-cook_3_0.webp", "a-cook_4_1.webp", "72x64.png"] {
        assert!(names.iter().any(|found| found == name), "{name} is not among {names:?}");
    }
    for (out, more, word) in [
        ("x.gif", &[][..], ".webp"),
        ("{colour}.png", &[], "{seed}"),
        ("{width}.png", &[], "--width"),
        ("-", &["--batch", "2"], "stdout"),
    ] {
        let output = run(out, more);
        assert_eq!(output.status.code(), Some(2), "{out}");
        assert!(text(&output.stderr).contains(word), "{}", text(&output.stderr));
    }
    assert_eq!(files(folder.path()), names);
}

#[test]
fn prompts_from_a_file_are_mixed_in_batches() {
    let folder = tempfile::tempdir().unwrap();
    let lines =
        "a cook\n\n{\"prompt\": \"a nurse\", \"seed\": 9, \"guidance\": 2, \"negative_prompt\": \"a hat\"}\na cook\n";
    std::fs::write(folder.path().join("prompts.txt"), lines).unwrap();
    let base = ["--steps", "2", "--seed", "5", "--quiet"];
    let all = ["sample", "--prompts", "prompts.txt", "--batch", "2", "--out", "{i}.png"];
    let output = respodiff(folder.path(), &[&all[..], &base].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let alone = |args: &[&str]| {
        let output = respodiff(folder.path(), &[&["sample"], args, &["--steps", "2", "--quiet", "-o", "-"]].concat());
        output.stdout
    };
    let picture = |i: usize| std::fs::read(folder.path().join(format!("{i}.png"))).unwrap();
    assert_eq!(picture(0), alone(&["a cook", "--seed", "5"]));
    assert_eq!(picture(1), alone(&["a nurse", "--seed", "9", "--cfg-scale", "2", "-n", "a hat"]));
    assert_eq!(picture(2), alone(&["a cook", "--seed", "7"]));
    std::fs::write(folder.path().join("prompts.txt"), "{\"prompt\": 3}").unwrap();
    let output = respodiff(folder.path(), &all);
    assert!(text(&output.stderr).contains("line 1"), "{}", text(&output.stderr));
    // Prompts and seeds as people write them.
    assert!(respodiff(folder.path(), &["sample", "--prompt=-1 cook", "--seed", "-1", "--steps", "1"]).status.success());
    let output = respodiff(folder.path(), &["sample", "a cook", "--prompt", "a nurse"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn pictures_are_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let make = ["sample", "a doctor", "--steps", "2", "--seed", "4", "--batch", "2", "--balance", "woman,man"];
    let output = respodiff(folder.path(), &[&make[..], &["-o", "x.png", "-q"]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let output = respodiff(folder.path(), &["rerun", "x-1.png"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("the same bytes"), "{}", text(&output.stderr));
    let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    assert_eq!(read("x-1.png"), read("x-1-again.png"));
    // Its record names model and concepts by hashes.
    let tags = respodiff::image::read_png_text(&folder.path().join("x-1.png")).unwrap();
    let info: serde_json::Value =
        serde_json::from_str(&tags.iter().find(|(k, _)| k == "respodiff").unwrap().1).unwrap();
    assert_eq!(info["model_sha256"].as_str().unwrap().len(), 64);
    assert!(info["model_fingerprint"].is_string() && info["concepts"][0]["fingerprint"].is_string(), "{info}");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/checkpoints/sd1");
    let output = respodiff(folder.path(), &["rerun", "x-1.png", "--model", golden.to_str().unwrap()]);
    assert!(text(&output.stderr).contains("SHA-256"), "{}", text(&output.stderr));
    let output = respodiff(folder.path(), &["sample", "x", "--concept", "nobody"]);
    assert!(text(&output.stderr).contains("woman"), "{}", text(&output.stderr));
}

#[test]
fn reports_are_json() {
    let folder = tempfile::tempdir().unwrap();
    let json = |args: &[&str]| -> serde_json::Value {
        let output = respodiff(folder.path(), args);
        assert!(output.status.success(), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap_or_else(|problem| panic!("{problem}: {}", text(&output.stdout)))
    };
    let info = json(&["info", "--json"]);
    assert_eq!((&info["scheduler"], &info["prediction"]), (&"PNDMScheduler".into(), &"epsilon".into()), "{info}");
    assert!(info["components"].as_array().unwrap().len() == 3 && info["fingerprint"].is_string(), "{info}");
    let concepts = json(&["concept", "show", "woman", "man", "--json"]);
    assert_eq!(concepts[1]["concept"], "a man");
    let report =
        json(&["train", "--target", "a woman", "--iterations", "2", "--sheet", "0", "--out", "w.st", "--json", "-q"]);
    assert_eq!((&report["iterations"], &report["concept"]), (&2.into(), &"w.st".into()), "{report}");
    let bench = ["bench", "--model", "demo", "--device", "cpu", "--runs", "1", "--filter", "vae", "--json", "b.json"];
    assert!(respodiff(folder.path(), &bench).status.success());
    let output = respodiff(folder.path(), &[&bench[..9], &["--compare", "b.json"]].concat());
    let table = text(&output.stdout);
    assert!(table.contains("of the earlier run's step") && table.contains("of its time"), "{table}");
    for line in table.lines() {
        assert!(line.chars().count() <= 120, "{line}");
        let best = line.rsplit(' ').next().and_then(|number| number.parse::<f64>().ok());
        assert!(best.is_none_or(|percent| percent <= 100.0), "{line}");
    }
}

#[test]
fn shells_and_manuals_are_served() {
    let folder = tempfile::tempdir().unwrap();
    let said = |args: &[&str]| text(&respodiff(folder.path(), args).stdout);
    assert!(said(&["completions", "bash"]).contains("complete -F _respodiff"));
    assert!(said(&["man"]).starts_with(".ie") || said(&["man"]).contains(".TH respodiff"));
    for args in [["probe", "grad"], ["probe", "scheduler"]] {
        let rest = ["--inputs", "x", "--output", "y", "--precision", "int8"];
        let output = respodiff(folder.path(), &[&args[..], &rest].concat());
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output.stderr));
    }
}
