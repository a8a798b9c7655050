//! `respodiff probe` compared with diffusers and transformers.

use super::{respodiff, tensors, text, write};
use crate::support;
use std::collections::HashMap;

#[test]
fn probes_give_what_diffusers_gave() {
    let folder = tempfile::tempdir().unwrap();
    for (component, case, tensors) in [
        ("unet", "unet_sd1_2", &["sample", "mid"][..]),
        ("unet", "unet_sdxl_1", &["sample", "mid"]),
        ("vae-decode", "vae_sd1_1", &["image"]),
        ("vae-encode", "vae_sd2_0", &["mean", "logvar"]),
        ("vae-decode", "vae_taesd_1", &["image"]),
        ("vae-encode", "vae_taesd_2", &["latents"]),
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
    // A prompt gives the same result as its token ids.
    let output = respodiff(folder.path(), &[&args[..], &["--prompt", "a photo of a cat"]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let first = tensors(&folder.path().join("o.st"));
    assert_eq!(first["input_ids"].0, [1, 77]);
    write(&folder.path().join("ids.st"), &[("input_ids", vec![1, 77], &first["input_ids"].1)]);
    assert!(respodiff(folder.path(), &[&args[..], &["--inputs", "ids.st"]].concat()).status.success());
    assert_eq!(tensors(&folder.path().join("o.st"))["text_embeds"], first["text_embeds"]);
}

/// Recorded states of weighted prompts, of several chunks, with clip skip and learnt words, and of SDXL's two prompts.
#[test]
fn prompts_give_what_other_programs_gave() {
    let folder = tempfile::tempdir().unwrap();
    let probe = |meta: &HashMap<String, String>, encoder: &str, prompt: &str| {
        let field = |name: &str, default: &str| meta.get(name).cloned().unwrap_or(default.into());
        let model = support::golden().join("checkpoints").join(&meta["checkpoint"]);
        let embeddings = support::golden().join("embeddings");
        let file = |name: &str| embeddings.join(name).display().to_string();
        let (syntax, skip) = (field("syntax", "plain"), field("clip_skip", "1"));
        let mut args = vec!["probe", "text", "--model", model.to_str().unwrap(), "--encoder", encoder];
        args.extend(["--prompt", prompt, "--prompt-syntax", &syntax, "--clip-skip", &skip, "--output", "o.st"]);
        let learnt = match &*meta["checkpoint"] {
            "sd1" => vec![file("a1111-toy.pt"), file("learned_embeds.bin")],
            "sdxl" => vec![file("xl.safetensors")],
            _ => vec![],
        };
        learnt.iter().for_each(|file| args.extend(["--embedding", file]));
        let output = respodiff(folder.path(), &args);
        assert!(output.status.success(), "{prompt}: {}", text(&output.stderr));
        tensors(&folder.path().join("o.st"))
    };
    let all = support::cases("prompt_", 7).into_iter().chain(support::cases("embedding_", 2));
    for case in all.filter(|case| case.has("out.states")) {
        let (meta, name) = (case.metadata(), case.name.clone());
        let encoders = if case.shape("out.states")[1] == 64 && meta["checkpoint"] == "sdxl" {
            vec!["1".into(), "2".into()]
        } else {
            vec![meta.get("encoder").cloned().unwrap_or("1".into())]
        };
        let prompt = |encoder: &String| meta.get("prompt_2").filter(|_| encoder == "2").unwrap_or(&meta["prompt"]);
        let each: Vec<_> = encoders.iter().map(|encoder| probe(&meta, encoder, prompt(encoder))).collect();
        let [tokens, width] = case.shape("out.states")[..] else { panic!("[tokens, width]") };
        let states: Vec<f32> = (0..tokens)
            .flat_map(|token| each.iter().map(move |outputs| (token, &outputs["states"])))
            .flat_map(|(token, (shape, values))| values[token * shape[2]..][..shape[2]].to_vec())
            .collect();
        assert_eq!(each[0]["states"].0, [1, tokens, width / each.len()], "{name}");
        let error = support::relative_l2(&states, &case.floats("out.states"));
        println!("{name}: {error:.1e}");
        assert!(error < 2e-5, "{name}: {error:.2e}");
        if case.has("out.text_embeds") {
            let (shape, pooled) = &each[each.len() - 1]["text_embeds"];
            let error = support::relative_l2(pooled, &case.floats("out.text_embeds"));
            assert!(shape[0] == 1 && error < 2e-5, "{name}: {error:.2e}");
        }
    }
}

/// Numbers beyond the range of fp32, and ids that are not whole numbers, are refused.
#[test]
fn probes_refuse_numbers_that_they_would_change() {
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
    // A case whose configuration is that of the golden checkpoint, except for the class.
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
