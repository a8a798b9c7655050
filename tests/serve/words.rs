//! Prompts in other syntaxes, learnt words and adapters: whatever runs at the same time, files are those of the command
//! line.

use super::{Server, sample};
use serde_json::{Value, json};

fn golden(name: &str) -> String {
    format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn pictures_of_other_prompts_and_adapters_do_not_mix() {
    let (model, loras) = (golden("checkpoints/sd1"), golden("adapters"));
    let words = golden("embeddings/a1111-toy.pt");
    let flags = ["--model", &model, "--lora-folder", &loras, "--embedding", &words];
    let server = Server::start(&[&flags[..], &["--max-batch", "3"]].concat());
    server.wait_for_hashes();
    let long = format!("a (cat:1.3), {}", "word, ".repeat(80));
    // Three of one chunk, three of several, three with one adapter and two with another, all at the same time.
    let cases: Vec<(Value, Vec<&str>)> = vec![
        (json!({"prompt": "a cat"}), vec!["a cat"]),
        (json!({"prompt": "a (cat)", "prompt_syntax": "a1111"}), vec!["a (cat)", "--prompt-syntax", "a1111"]),
        (json!({"prompt": "a cat", "clip_skip": 2}), vec!["a cat", "--clip-skip", "2"]),
        (json!({"prompt": long, "prompt_syntax": "a1111"}), vec![&long, "--prompt-syntax", "a1111"]),
        (json!({"prompt": long, "prompt_syntax": "comfy"}), vec![&long, "--prompt-syntax", "comfy"]),
        (
            json!({"prompt": "a1111-toy", "negative_prompt": long, "prompt_syntax": "a1111"}),
            vec!["a1111-toy", "-n", &long, "--prompt-syntax", "a1111"],
        ),
        (json!({"prompt": "a cat", "loras": ["sd1_kohya"]}), vec!["a cat", "--lora", "sd1_kohya"]),
        (
            json!({"prompt": "a dog <lora:sd1_kohya:1>", "prompt_syntax": "a1111"}),
            vec!["a dog <lora:sd1_kohya:1>", "--prompt-syntax", "a1111"],
        ),
        (
            json!({"prompt": "a cat", "loras": ["sd1_kohya"], "negative_prompt": "x"}),
            vec!["a cat", "--lora", "sd1_kohya", "-n", "x"],
        ),
        (
            json!({"prompt": "a cat", "loras": [{"name": "sd1_loha", "weight": 0.5}]}),
            vec!["a cat", "--lora", "sd1_loha:0.5"],
        ),
        (
            json!({"prompt": "a cat", "loras": ["sd1_kohya", {"name": "sd1_loha", "weight": -0.5}]}),
            vec!["a cat", "--lora", "sd1_kohya", "--lora", "sd1_loha:-0.5"],
        ),
    ];
    let truth = |args: &[&str]| sample(&[args, &flags, &["--seed", "3", "--steps", "3"]].concat());
    let made = |body: &Value| {
        let mut body = body.clone();
        (body["seed"], body["num_inference_steps"]) = (json!(3), json!(3));
        server.png(&body)
    };
    for round in 0..2 {
        std::thread::scope(|scope| {
            let asked: Vec<_> = cases.iter().map(|(body, _)| scope.spawn(|| made(body))).collect();
            for (answer, (body, args)) in asked.into_iter().zip(&cases) {
                assert!(answer.join().unwrap() == truth(args), "{body} in round {round}");
            }
        });
    }
    // A1111's clients mean its syntax, and its name of the clip skip.
    let body = json!({"prompt": "a (cat:1.3) <lora:sd1_loha:0.5>", "seed": 3, "steps": 3,
        "override_settings": {"CLIP_stop_at_last_layers": 2}});
    let (status, answer) = server.json("/sdapi/v1/txt2img", &body);
    assert_eq!(status, 200, "{answer}");
    use base64::Engine as _;
    let png = base64::engine::general_purpose::STANDARD.decode(answer["images"][0].as_str().unwrap()).unwrap();
    let args = ["a (cat:1.3) <lora:sd1_loha:0.5>", "--prompt-syntax", "a1111", "--clip-skip", "2"];
    assert!(png == truth(&args));
    let listed = server.get("/sdapi/v1/loras");
    let names: Vec<&str> = listed.as_array().unwrap().iter().map(|lora| lora["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"sd1_kohya") && names.contains(&"sdxl_lokr"), "{listed}");
    assert!(server.get("/sdapi/v1/embeddings")["loaded"]["a1111-toy"].is_object());
    for (body, status, field, word) in [
        (json!({"prompt": "a AND b", "prompt_syntax": "a1111"}), 400, "prompt", "lower case"),
        (json!({"prompt": "[a:b:0.5]", "prompt_syntax": "a1111"}), 400, "prompt", "decide for one"),
        (
            json!({"prompt": "x", "negative_prompt": "[a|b]", "prompt_syntax": "a1111"}),
            400,
            "negative_prompt",
            "decide",
        ),
        (json!({"prompt": "x", "prompt_syntax": "invoke"}), 400, "prompt_syntax", "plain, a1111 or comfy"),
        (json!({"prompt": "embedding:none", "prompt_syntax": "comfy"}), 400, "prompt", "a1111-toy"),
        (json!({"prompt": "x", "clip_skip": 50}), 400, "clip_skip", "give 1"),
        (json!({"prompt": "x", "prompt_2": "y"}), 400, "prompt_2", "leave it out"),
        (json!({"prompt": "x", "loras": ["sd1_koya"]}), 404, "loras", "`sd1_kohya`"),
        (json!({"prompt": "<lora:sd1_koya>", "prompt_syntax": "a1111"}), 404, "prompt", "`sd1_kohya`"),
        (json!({"prompt": "x", "loras": [format!("{loras}/sd1_kohya")]}), 404, "loras", "no LoRA"),
        (json!({"prompt": "x", "loras": ["../adapters/sd1_kohya"]}), 404, "loras", "no LoRA"),
        (json!({"prompt": "x", "loras": ["sdxl_lokr"]}), 400, "loras", "family"),
        (json!({"prompt": "x", "loras": [{"name": "sd1_kohya", "weight": 1e300}]}), 400, "loras", "finite"),
    ] {
        let (code, answer) = server.json("/v1/images/generations", &body);
        let error = &answer["error"];
        assert_eq!((code, &error["param"]), (status, &json!(field)), "{body}: {answer}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(word) && !message.contains(".safetensors"), "{body}: {answer}");
    }
    assert!(made(&cases[0].0) == truth(&cases[0].1));
}

/// With room for the model and one set of adapters, sets follow each other for ever.
#[test]
fn adapters_stay_within_the_memory() {
    let (model, loras) = (golden("checkpoints/sd1"), golden("adapters"));
    let flags = ["--model", &model, "--lora-folder", &loras];
    let server = Server::start(&flags);
    let memory = server.json("/v1/estimate", &json!({"prompt": "x"})).1["memory_bytes"].as_u64().unwrap();
    server.kill();
    let (body, weights) = (|lora: &str| json!({"prompt": "x", "num_inference_steps": 1, "loras": [lora]}), memory / 2);
    let budget = (memory + weights).to_string();
    let server = Server::start(&[&flags[..], &["--memory", &budget]].concat());
    for i in 0..8 {
        let (status, answer) = server.json("/v1/images/generations", &body(["sd1_kohya", "sd1_loha"][i % 2]));
        assert_eq!(status, 200, "{answer}");
    }
    server.kill();
    // Without that room the client is told, and pictures without adapters are made.
    let server = Server::start(&[&flags[..], &["--memory", &memory.to_string()]].concat());
    let (status, answer) = server.json("/v1/images/generations", &body("sd1_kohya"));
    assert!(status == 422 && answer["error"]["message"].as_str().unwrap().contains("allowed"), "{answer}");
    assert_eq!(server.json("/v1/images/generations", &json!({"prompt": "x", "num_inference_steps": 1})).0, 200);
}

#[test]
fn embeddings_of_no_model_are_refused() {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_respodiff"));
    let args = ["serve", "--device", "cpu", "--model", &golden("checkpoints/sd1"), "--embedding"];
    let output = command.args(args).arg(golden("embeddings/xl.safetensors")).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("width"), "{error}");
}
