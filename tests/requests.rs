//! Whole requests to a `Pipeline`: their files are those of the command line, and nothing of one is left in the next.

use respodiff::concepts::Files;
use respodiff::requests::Answer;
use respodiff::{Device, ErrorKind, Pipeline, Source};
use std::ops::ControlFlow;
use std::process::Command;

fn pipeline(max_batch: usize) -> Pipeline {
    Pipeline::open(&Source::demo(), Device::cpu(), max_batch).unwrap()
}

fn asked(pipeline: &Pipeline, request: &str) -> respodiff::Result<Answer> {
    let request = Pipeline::parse(request.as_bytes())?;
    pipeline.generate(&request, &Files, &mut |_, _| ControlFlow::Continue(()))
}

fn files(answer: &Answer) -> Vec<Vec<u8>> {
    answer.pictures.iter().map(|made| made.png().unwrap()).collect()
}

/// The files of `respodiff sample`.
fn sampled(args: &[&str]) -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_respodiff"));
    command.args(["sample", "-q", "--device", "cpu", "-o"]).arg(folder.path().join("{seed}.png")).args(args);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let printed = String::from_utf8(output.stdout).unwrap();
    printed.lines().filter(|line| line.ends_with(".png")).map(|line| std::fs::read(line).unwrap()).collect()
}

#[test]
fn files_are_those_of_the_command_line() {
    let pipeline = pipeline(3);
    // One, more than are made at once, another size, and no guidance, through one pipeline.
    for (request, args) in [
        (r#"{"prompt": "a cook", "seed": 1, "num_inference_steps": 3}"#, "a cook|--seed|1|--steps|3"),
        (
            r#"{"prompt": "a doctor", "n": 4, "seed": 5, "num_inference_steps": 3, "balance": ["woman", "man"]}"#,
            "a doctor|--seed|5|--steps|3|--batch|4|--balance|woman,man",
        ),
        (
            r#"{"prompt": "a guard", "n": 2, "seed": 8, "num_inference_steps": 2, "size": "72x80",
                "negative_prompt": "a hat", "concepts": [{"name": "black", "weight": 0.5}], "sampler": "Euler a"}"#,
            "a guard|--seed|8|--steps|2|--batch|2|-W|72|-H|80|-n|a hat|--concept|black:0.5|--sampler|Euler a",
        ),
        (
            r#"{"prompt": "a cook", "seed": 1, "num_inference_steps": 3, "guidance_scale": 1.0}"#,
            "a cook|--seed|1|--steps|3|--guidance|1",
        ),
    ] {
        let args: Vec<&str> = args.split('|').collect();
        let answer = asked(&pipeline, request).unwrap();
        assert!(answer.warnings.is_empty(), "{:?}", answer.warnings);
        assert!(files(&answer) == sampled(&args), "{request}");
    }
}

fn golden(name: &str) -> String {
    format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A pipeline as programs in other languages open it.
fn found(checkpoint: &str, options: &str) -> respodiff::Result<Pipeline> {
    let hub = || respodiff::hub::HubConfig::from_variables(|_| None);
    Pipeline::find(&golden(checkpoint), options.as_bytes(), &hub)
}

/// Prompts in every syntax, of one chunk and of several, with clip skip, embeddings and words for SDXL's second
/// encoder.
#[test]
fn prompts_are_read_as_on_the_command_line() {
    let (sd1, xl) = (golden("checkpoints/sd1"), golden("checkpoints/sdxl"));
    let words = golden("embeddings/a1111-toy.pt");
    let options = format!(r#"{{"device": "cpu", "embeddings": ["{words}"], "max_batch": 3}}"#);
    let pipelines = [found("checkpoints/sd1", &options), found("checkpoints/sdxl", r#"{"device": "cpu"}"#)];
    let [one, two] = pipelines.map(Result::unwrap);
    let long = format!("a (cat:1.3), {}BREAK a1111-toy", "word, ".repeat(80));
    let sd1 = ["--model", sd1.as_str(), "--embedding", words.as_str()];
    for (pipeline, fields, args) in [
        (&one, String::new(), &["a cat"][..]),
        (
            &one,
            format!(r#""prompt": "{long}", "prompt_syntax": "a1111", "clip_skip": 2, "n": 2,"#),
            &[&long, "--prompt-syntax", "a1111", "--clip-skip", "2", "--batch", "2"],
        ),
        (
            &one,
            format!(r#""prompt": "a dog", "negative_prompt": "{long}", "prompt_syntax": "comfy", "seed": 9,"#),
            &["a dog", "-n", &long, "--prompt-syntax", "comfy", "--seed", "9"],
        ),
        (
            &two,
            r#""prompt": "a dog", "prompt_2": "a (red:1.4) one", "negative_prompt_2": "x", "prompt_syntax": "a1111","#
                .into(),
            &["a dog", "--prompt-2", "a (red:1.4) one", "--negative-prompt-2", "x", "--prompt-syntax", "a1111"],
        ),
    ] {
        let prompt = if fields.is_empty() { r#""prompt": "a cat","# } else { "" };
        let seed = if fields.contains("seed") { "" } else { r#""seed": 4,"# };
        let request = format!("{{{prompt}{fields}{seed}\"num_inference_steps\": 2}}");
        let model: &[&str] = if std::ptr::eq(pipeline, &one) { &sd1 } else { &["--model", &xl] };
        let seed: &[&str] = if args.contains(&"--seed") { &[] } else { &["--seed", "4"] };
        let answer = asked(pipeline, &request).unwrap();
        assert!(answer.warnings.is_empty(), "{:?}", answer.warnings);
        assert!(files(&answer) == sampled(&[args, model, seed, &["--steps", "2"]].concat()), "{request}");
    }
    // Prompts of one and of three chunks in one request are each what they are alone.
    let both = format!(
        r#"{{"prompt": ["a cat", "{long}", "a dog"], "seed": 1, "prompt_syntax": "a1111",
        "num_inference_steps": 2}}"#
    );
    let both = files(&asked(&one, &both).unwrap());
    for (i, prompt) in ["a cat", &long, "a dog"].into_iter().enumerate() {
        let seed = (i + 1).to_string();
        let args = [prompt, "--prompt-syntax", "a1111", "--seed", &seed, "--steps", "2"];
        assert!(both[i..=i] == sampled(&[&args[..], &sd1].concat()), "{prompt}");
    }
    let suspect = asked(&one, r#"{"prompt": "a (cat:1.3)", "num_inference_steps": 1}"#).unwrap();
    assert!(suspect.warnings.len() == 1 && suspect.warnings[0].contains("prompt_syntax"), "{:?}", suspect.warnings);
    for (fields, text) in [
        (r#""prompt": "a AND b", "prompt_syntax": "a1111""#, "prompt: `AND`"),
        (r#""prompt": "[a:b:0.5]", "prompt_syntax": "a1111""#, "prompt: `[a:b:0.5]`"),
        (r#""prompt": "x", "negative_prompt": "a AND b", "prompt_syntax": "a1111""#, "negative_prompt: `AND`"),
        (r#""prompt": "x", "negative_prompt": "<lora:a>", "prompt_syntax": "a1111""#, "negative_prompt: "),
        (r#""prompt": "embedding:none", "prompt_syntax": "comfy""#, "prompt: there is no embedding `none`"),
        (r#""prompt": "x", "prompt_syntax": "invoke""#, "prompt_syntax: `invoke`"),
        (r#""prompt": "x", "clip_skip": 0"#, "clip_skip: 0"),
        (r#""prompt": "x", "clip_skip": 99"#, "clip_skip: 99"),
        (r#""prompt": "x", "prompt_2": "y""#, "prompt_2: "),
        (r#""prompt": "x", "negative_prompt_2": "y""#, "negative_prompt_2: "),
        (r#""prompt": "x", "prompt_2": "y\u0000""#, "prompt_2: the text holds a NUL"),
    ] {
        let error = asked(&one, &format!("{{{fields}}}")).unwrap_err().to_string();
        assert!(error.starts_with(text), "{fields}: {error}");
    }
}

/// Adapters by name and by tag, other ones for each prompt, and what they leave behind.
#[test]
fn adapters_are_those_of_the_command_line() {
    let (model, loras) = (golden("checkpoints/sd1"), golden("adapters"));
    let options = format!(r#"{{"device": "cpu", "lora_folder": "{loras}", "max_batch": 2}}"#);
    let pipeline = found("checkpoints/sd1", &options).unwrap();
    let file = format!("{loras}/sd1_loha.safetensors");
    let plain = r#"{"prompt": "a cat", "seed": 1, "num_inference_steps": 2}"#;
    let before = files(&asked(&pipeline, plain).unwrap());
    let made = |fields: &str| {
        files(&asked(&pipeline, &format!(r#"{{{fields}, "seed": 1, "num_inference_steps": 2}}"#)).unwrap())
    };
    let base = ["--model", &model, "--lora-folder", &loras, "--steps", "2", "--seed", "1"];
    let named = made(&format!(r#""prompt": "a cat", "loras": [{{"name": "sd1_kohya", "weight": 0.5}}, "{file}"]"#));
    assert!(named == sampled(&[&base[..], &["a cat", "--lora", "sd1_kohya:0.5", "--lora", &file]].concat()));
    let a1111 = ["--prompt-syntax", "a1111"];
    let tagged = made(r#""prompt": "a cat <lora:sd1_kohya:0.5> ", "prompt_syntax": "a1111""#);
    assert!(tagged == sampled(&[&base[..], &a1111, &["a cat <lora:sd1_kohya:0.5> "]].concat()));
    assert!(named[0] != before[0] && tagged[0] != before[0]);
    // Four prompts, of which two have an adapter and two have none.
    let prompts = ["a cat <lora:sd1_kohya>", "a dog", "a cow <lora:sd1_kohya:1>", "a hen"];
    let both = made(&format!(r#""prompt": {prompts:?}, "prompt_syntax": "a1111""#));
    for (i, prompt) in prompts.into_iter().enumerate() {
        let seed = (i + 1).to_string();
        let args = [&base[..6], &a1111, &["--seed", &seed, prompt]].concat();
        assert!(both[i..=i] == sampled(&args), "{prompt}");
    }
    assert!(files(&asked(&pipeline, plain).unwrap()) == before, "without adapters it is the model as it was");
    for (fields, kind, word) in [
        (r#""loras": ["none"]"#, ErrorKind::NotFound, "no adapter called `none`"),
        (r#""loras": [{"name": "sd1_kohya", "weight": 1e300}]"#, ErrorKind::Invalid, "loras: inf"),
        (r#""loras": ["sdxl_lokr"]"#, ErrorKind::Mismatch, "sdxl_lokr"),
    ] {
        let error = asked(&pipeline, &format!(r#"{{"prompt": "x", {fields}}}"#)).unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(word), "{fields}: {error}");
    }
    let many = format!(r#"{{"prompt": "x", "loras": [{}"sd1_kohya"]}}"#, r#""sd1_kohya","#.repeat(64));
    assert!(asked(&pipeline, &many).unwrap_err().to_string().contains("more than 64"));
    assert!(files(&asked(&pipeline, plain).unwrap()) == before);
}

#[test]
fn a_cancelled_request_leaves_nothing_behind() {
    let pipeline = pipeline(4);
    let request = r#"{"prompt": "a nurse", "n": 2, "seed": 3, "num_inference_steps": 4, "sampler": "DDIM"}"#;
    let before = files(&asked(&pipeline, request).unwrap());
    let other =
        Pipeline::parse(br#"{"prompt": "a cook", "n": 4, "num_inference_steps": 9, "sampler": "DDIM"}"#).unwrap();
    for until in [0, 4, 20] {
        let mut seen = Vec::new();
        let outcome = pipeline.generate(&other, &Files, &mut |done, total| {
            assert_eq!(total, 36);
            seen.push(done);
            if done >= until { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Cancelled);
        // Four pictures advance at a time, and none after the break.
        assert_eq!(seen, (0..=until / 4).map(|step| 4 * step).collect::<Vec<_>>());
        assert!(files(&asked(&pipeline, request).unwrap()) == before);
    }
}

#[test]
fn prompts_share_the_quotas_unless_they_name_an_attribute() {
    let request = r#"{"prompt": ["a doctor", "a female nurse", "a cook", "a guard", "a judge"], "n": 2,
        "num_inference_steps": 1, "balance": [["woman", "man"], ["white", "black"]], "seed": 4}"#;
    let answer = asked(&pipeline(8), request).unwrap();
    let names =
        |i: usize| -> Vec<&str> { answer.pictures[i].info.concepts.iter().map(|used| used.name.as_str()).collect() };
    assert_eq!(answer.pictures.len(), 10);
    assert!(answer.pictures.iter().enumerate().all(|(i, made)| made.info.seed == 4 + i as u64));
    // The nurse's gender is given, and one of the two pictures shows each race.
    assert!(names(2).len() == 1 && names(3).len() == 1 && names(2) != names(3), "{:?} {:?}", names(2), names(3));
    assert!(answer.warnings.len() == 1 && answer.warnings[0].contains("`female`"), "{:?}", answer.warnings);
    let others: Vec<Vec<&str>> = [0, 1, 4, 5, 6, 7, 8, 9].map(names).to_vec();
    for name in ["a woman", "a man"] {
        assert_eq!(others.iter().filter(|names| names.contains(&name)).count(), 4, "{others:?}");
    }
    assert!(others.iter().all(|names| names.len() == 2), "{others:?}");
}

#[test]
fn what_is_lost_or_odd_is_told() {
    let long = format!(r#"{{"prompt": "{} last", "num_inference_steps": 1}}"#, "word ".repeat(90));
    let answer = asked(&pipeline(1), &long).unwrap();
    assert!(answer.warnings.len() == 1 && answer.warnings[0].ends_with("last"), "{:?}", answer.warnings);
    // A checkpoint of the same shape with other weights would make such a picture, and the caller is told.
    let sd1 = Source::folder(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/checkpoints/sd1")).unwrap();
    let other = Pipeline::open(&sd1, Device::cpu(), 1).unwrap();
    match asked(&other, r#"{"prompt": "x", "num_inference_steps": 1, "concepts": ["woman"]}"#) {
        Ok(answer) => assert!(answer.warnings[0].contains("trained on respodiff-demo"), "{:?}", answer.warnings),
        Err(error) => assert_eq!(error.kind(), ErrorKind::Mismatch, "{error}"),
    }
}

#[test]
fn errors_name_the_fields_of_the_request() {
    let pipeline = pipeline(1);
    for (request, text) in [
        (r#"{"prompt": "x", "num_inference_steps": 0}"#, "num_inference_steps: "),
        (r#"{"prompt": "x", "guidance_scale": 1e39}"#, "guidance_scale: "),
        (r#"{"prompt": "x", "width": 63}"#, "size: 63"),
        (r#"{"prompt": "x", "steps": 3}"#, "steps: this field is not known"),
        (r#"{"prompt": "x", "n": 10001}"#, "n: "),
    ] {
        let error = asked(&pipeline, request).unwrap_err();
        assert!(error.kind() == ErrorKind::Invalid && error.to_string().starts_with(text), "{request}: {error}");
    }
    let error = Pipeline::open(&Source::demo(), Device::cpu(), 0).err().unwrap();
    assert!(error.to_string().starts_with("max_batch: "), "{error}");
}
