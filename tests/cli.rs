//! The binary as a user runs it.

mod support;

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
    let tags = respodiff::image::read_png_text(&folder.path().join(names[1])).unwrap();
    let parameters = &tags.iter().find(|(k, _)| k == "parameters").unwrap().1;
    assert!(parameters.contains("a photo of a doctor") && parameters.contains("Seed: 6"), "{parameters}");
    assert!(tags.iter().any(|(k, v)| k == "respodiff" && v.contains("\"seed\":6")), "{tags:?}");
    // A name of our own choosing overwrites nothing.
    assert!(respodiff(folder.path(), &args[..8]).status.success());
    assert_eq!(files(folder.path()).len(), 5);
}

#[test]
fn given_noise_is_the_seeds_noise() {
    let folder = tempfile::tempdir().unwrap();
    let mut noise = vec![0.0f32; 4 * 64];
    respodiff::diffusion::noise::NormalGenerator::new(Default::default(), 3).fill(&mut noise);
    let view =
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1, 4, 8, 8], bytemuck::cast_slice(&noise));
    let bytes = safetensors::serialize([("latents", view.unwrap())], None).unwrap();
    std::fs::write(folder.path().join("noise.st"), bytes).unwrap();
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

#[test]
fn refuses_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let model = support::golden().join("checkpoints/sdxl");
    for (args, code, word) in [
        (&["sample", "x", "--width", "63"][..], 2, "64"),
        (&["sample", "x", "--steps", "0"], 2, "steps"),
        (&["sample", "x", "--batch", "0"], 2, "batch"),
        (&["sample", "x", "--scheduler", "nonsense"], 2, "DDIM"),
        (&["sample", "x", "--spacing", "nonsense"], 2, "karras"),
        (&["sample", "x", "--guidance", "NaN"], 2, "guidance"),
        (&["sample", "x", "--rng", "dice"], 2, "torch-cpu"),
        (&["sample", "x", "--device", "cuda"], 1, "cpu"),
        (&["sample", "x", "--out", "no/such/folder/x.png"], 1, "no/such/folder"),
        (&["sample", "x", "--model", "./nowhere"], 2, "nowhere"),
        (&["sample", "x", "--latents", "missing.st"], 1, "missing.st"),
        (&["sample", "x", "--model", model.to_str().unwrap()], 1, "SDXL"),
        (&["sample"], 2, "PROMPT"),
        (&["probe", "unet", "--inputs", "missing.st", "--output", "o.st"], 1, "missing.st"),
        (&["info", "--model", "./nowhere"], 2, "nowhere"),
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
    let output = respodiff(folder.path(), &["info"]);
    let report = text(&output.stdout);
    assert!(
        output.status.success() && ["text_encoder", "unet", "vae", "MiB"].iter().all(|w| report.contains(w)),
        "{report}"
    );
}
