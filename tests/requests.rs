//! Whole requests to a `Pipeline`: their files are those of the command line, and nothing of one is left in the next.

use respodiff::{Answer, ConceptFiles, Device, ErrorKind, Pipeline, Source};
use std::ops::ControlFlow;
use std::process::Command;

fn pipeline(max_batch: usize) -> Pipeline {
    Pipeline::open(&Source::demo(), Device::cpu(), max_batch).unwrap()
}

fn asked(pipeline: &Pipeline, request: &str) -> respodiff::Result<Answer> {
    let request = Pipeline::parse(request.as_bytes())?;
    pipeline.generate(&request, &ConceptFiles, &mut |_, _| ControlFlow::Continue(()))
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

#[test]
fn a_cancelled_request_leaves_nothing_behind() {
    let pipeline = pipeline(4);
    let request = r#"{"prompt": "a nurse", "n": 2, "seed": 3, "num_inference_steps": 4, "sampler": "DDIM"}"#;
    let before = files(&asked(&pipeline, request).unwrap());
    let other =
        Pipeline::parse(br#"{"prompt": "a cook", "n": 4, "num_inference_steps": 9, "sampler": "DDIM"}"#).unwrap();
    for until in [0, 4, 20] {
        let mut seen = Vec::new();
        let outcome = pipeline.generate(&other, &ConceptFiles, &mut |done, total| {
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
