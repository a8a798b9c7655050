//! Jobs in a folder go on after the server was killed.

use super::{Server, sample};
use base64::Engine as _;
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

fn waited(of: impl Fn() -> bool) {
    for _ in 0..6000 {
        if of() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("it did not come to pass within half a minute");
}

/// The files of a job's pictures that are there.
fn pictures(folder: &Path, job: &str) -> usize {
    (0..9).filter(|i| folder.join(job).join(format!("{i}.json")).exists()).count()
}

#[test]
fn accepted_jobs_survive_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let jobs = folder.path().join("jobs");
    let flags = ["--jobs", jobs.to_str().unwrap(), "--max-batch", "1"];
    let server = Server::start(&flags);
    let body = json!({"prompt": "a doctor", "seed": 7, "n": 4, "num_inference_steps": 40, "balance": ["woman", "man"]});
    let head = "idempotency-key: one\r\n";
    let (status, answer, job) = server.ask("POST", "/v1/jobs", head, &body.to_string());
    let id = serde_json::from_slice::<Value>(&job).unwrap()["id"].as_str().unwrap().to_string();
    assert!(status == 202 && answer.contains(&format!("location: /v1/jobs/{id}")), "{answer}");
    // A job whose seed is left to chance, and one that is not begun before the kill.
    let random = json!({"prompt": "a cook", "num_inference_steps": 3});
    let (_, random) = server.json("/v1/jobs", &random);
    // Killed in the middle of a picture, twice.
    waited(|| pictures(&jobs, &id) == 1);
    let first = std::fs::read(jobs.join(&id).join("0.json")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_respodiff"));
    let second = command.args(["serve", "--port", "0"]).args(flags).output().unwrap();
    let error = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success() && error.contains("another process"), "{error}");
    server.kill();
    let server = Server::start(&flags);
    waited(|| pictures(&jobs, &id) == 2);
    server.kill();
    let server = Server::start(&flags);
    let path = format!("/v1/jobs/{id}");
    waited(|| server.get(&path)["status"] == "completed");
    let job = server.get(&path);
    // PNDM, the demo's own sampler, takes one step more than it is asked for.
    assert_eq!((&job["steps_done"], &job["steps"]), (&json!(164), &json!(164)));
    assert_eq!(std::fs::read(jobs.join(&id).join("0.json")).unwrap(), first, "a picture that is done stays");
    // Each is the file of one and the same run, and the quota over the job is exact.
    let data = job["result"]["data"].as_array().unwrap();
    let women = data.iter().filter(|datum| datum["parameters"]["concepts"][0]["name"] == "a woman").count();
    assert_eq!((data.len(), women), (4, 2));
    for (datum, seed) in data.iter().zip(["7", "8", "9", "10"]) {
        let concept = datum["parameters"]["concepts"][0]["file"].as_str().unwrap();
        let args = ["a doctor", "--seed", seed, "--steps", "40", "--concept", concept];
        let png = base64::engine::general_purpose::STANDARD.decode(datum["b64_json"].as_str().unwrap()).unwrap();
        assert!(pixels(&png) == pixels(&sample(&args)), "{seed}");
    }
    let random = format!("/v1/jobs/{}", random["id"].as_str().unwrap());
    waited(|| server.get(&random)["status"] == "completed");
    // The key still names the job, another job with it is refused, and what is fetched can be forgotten.
    let again = server.ask("POST", "/v1/jobs", head, &body.to_string());
    assert_eq!(serde_json::from_slice::<Value>(&again.2).unwrap()["id"], id.as_str());
    assert_eq!(server.ask("POST", "/v1/jobs", head, "{\"prompt\": \"x\"}").0, 409);
    assert_eq!(server.ask("DELETE", &path, "", "").0, 200);
    assert_eq!(server.ask("GET", &path, "", "").0, 404);
    assert!(!jobs.join(&id).exists());
    // Ended jobs are there after a restart, too.
    server.kill();
    let server = Server::start(&flags);
    assert_eq!(server.get(&random)["result"]["data"].as_array().unwrap().len(), 1);
}

/// The pixels of a PNG file. Its record may lack the model's hash, which a server knows only after a moment.
fn pixels(png: &[u8]) -> Vec<u8> {
    let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut pixels).unwrap();
    pixels
}
