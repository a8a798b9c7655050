//! Several models within a budget of memory, and a folder of concepts that changes.

use super::{Server, sample};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;

fn root() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

fn checkpoint(name: &str) -> String {
    root().join("tests/golden/checkpoints").join(name).display().to_string()
}

/// The names of the models whose weights are in memory.
fn loaded(server: &Server) -> Vec<String> {
    let models = server.get("/v1/models")["data"].as_array().unwrap().clone();
    let loaded = models.iter().filter(|model| model["loaded"] == true);
    loaded.map(|model| model["id"].as_str().unwrap().to_string()).collect()
}

#[test]
fn models_are_loaded_when_they_are_asked_for() {
    let (one, two) = (checkpoint("sd1"), checkpoint("sd2"));
    let models = ["--model", one.as_str(), "--model", two.as_str()];
    let body = |model: &str| json!({"model": model, "prompt": "a cat", "seed": 3, "num_inference_steps": 2});
    let truth = |model: &str| sample(&["a cat", "--seed", "3", "--steps", "2", "--model", model]);
    let memory = |server: &Server, model: &str| -> Option<u64> {
        server.json("/v1/estimate", &body(model)).1["memory_bytes"].as_u64()
    };
    let server = Server::start(&models);
    assert_eq!(loaded(&server), ["sd1"]);
    assert_eq!(server.get("/health/ready"), json!({"status": "ready", "loaded": ["sd1"]}));
    assert!(memory(&server, "sd1").unwrap() > 1 << 16 && memory(&server, "sd2").is_none());
    // Without weights, requests are checked all the same.
    let mut wrong = body("sd2");
    wrong["sampler"] = json!("best");
    assert_eq!(server.json("/v1/images/generations", &wrong).0, 400);
    let made = ["sd1", "sd2", "sd1"].map(|model| pixels(&server.png(&body(model))));
    assert!(made[0] == pixels(&truth(&one)) && made[1] == pixels(&truth(&two)) && made[2] == made[0]);
    assert_eq!(loaded(&server), ["sd1", "sd2"]);
    let larger = memory(&server, "sd1").max(memory(&server, "sd2")).unwrap();
    server.kill();
    // With room for one, the other goes, and pictures are the same; also if both are asked for at the same time.
    let budget = larger.to_string();
    let server = Server::start(&[&models[..], &["--memory", &budget]].concat());
    for (i, model) in ["sd1", "sd2", "sd2", "sd1"].into_iter().enumerate() {
        assert!(pixels(&server.png(&body(model))) == made[usize::from(model == "sd2")], "{i}");
        assert_eq!(loaded(&server), [model], "{i}");
    }
    std::thread::scope(|scope| {
        let ask = |i: usize| pixels(&server.png(&body(["sd1", "sd2"][i % 2])));
        let asked: Vec<_> = (0..8).map(|i| scope.spawn(move || ask(i))).collect();
        for (i, answer) in asked.into_iter().enumerate() {
            assert!(answer.join().unwrap() == made[i % 2], "{i}");
        }
    });
    let mut large = body("sd1");
    large["size"] = json!("2048x2048");
    let (status, answer) = server.json("/v1/images/generations", &large);
    assert!(status == 422 && answer["error"]["message"].as_str().unwrap().contains("allowed"), "{answer}");
    assert_eq!(server.json("/v1/images/generations", &body("sd3")).0, 404);
}

#[test]
fn concepts_come_and_change_while_the_server_runs() {
    let folder = tempfile::tempdir().unwrap();
    let from = |name: &str| root().join("demo/concepts").join(format!("{name}.safetensors"));
    let at = |name: &str| folder.path().join(format!("{name}.safetensors"));
    let server = Server::start(&["--concepts", folder.path().to_str().unwrap()]);
    let concepts = || server.get("/v1/models")["data"][0]["concepts"].clone();
    let waited = |of: &dyn Fn() -> bool| {
        let arrived = (0..100).any(|_| {
            std::thread::sleep(Duration::from_millis(100));
            of()
        });
        assert!(arrived, "{}", concepts());
    };
    let body = json!({"prompt": "a cook", "seed": 3, "num_inference_steps": 2, "concepts": ["who"]});
    let made = || server.json("/v1/images/generations", &body);
    let fingerprint = |answer: &Value| answer["data"][0]["parameters"]["concepts"][0]["fingerprint"].clone();
    assert_eq!((concepts(), made().0), (json!([]), 404));
    std::fs::copy(from("woman"), at("who")).unwrap();
    waited(&|| concepts() == json!(["who"]));
    let (status, woman) = made();
    assert_eq!(status, 200);
    // A damaged file changes nothing, and the server says so once.
    write(&at("who"), b"no concept");
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(fingerprint(&made().1), fingerprint(&woman));
    std::fs::copy(from("man"), at("who")).unwrap();
    waited(&|| fingerprint(&made().1) != fingerprint(&woman));
    std::fs::remove_file(at("who")).unwrap();
    waited(&|| concepts() == json!([]));
    assert_eq!(made().0, 404);
}

fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap();
}

/// The pixels of a PNG file.
fn pixels(png: &[u8]) -> Vec<u8> {
    let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut pixels).unwrap();
    pixels
}
