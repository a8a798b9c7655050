//! `respodiff serve`: what it answers is what `respodiff sample` makes, whoever asks at the same time; and what it
//! keeps survives being killed.

mod audit;
mod jobs;
mod models;
mod words;

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(args: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_respodiff"));
        let mut child = command
            .args(["serve", "--port", "0", "--device", "cpu"])
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("http://").unwrap_or_else(|| panic!("{line:?}")).to_string();
        Server { child, address }
    }

    /// The answer to a request without a body.
    fn get(&self, path: &str) -> Value {
        serde_json::from_slice(&self.ask("GET", path, "", "").2).unwrap_or_default()
    }

    /// The hash of the weights is in every file once it is known.
    fn wait_for_hashes(&self) {
        while self.get("/v1/models")["data"][0]["sha256"].is_null() {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    /// Ends the process as SIGKILL does.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// The status, head and body of an answer.
    fn ask(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, String, Vec<u8>) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n");
        stream.write_all(format!("{head}{headers}\r\n{body}").as_bytes()).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let end = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
        let head = String::from_utf8(answer[..end].to_vec()).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head, answer[end + 4..].to_vec())
    }

    fn json(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, head, body) = self.ask("POST", path, "", &body.to_string());
        let answer = serde_json::from_slice(&body);
        (status, answer.unwrap_or_else(|e| panic!("{e}: {head} {}", String::from_utf8_lossy(&body))))
    }

    fn png(&self, body: &Value) -> Vec<u8> {
        let (status, head, body) =
            self.ask("POST", "/v1/images/generations", "accept: image/png\r\n", &body.to_string());
        assert!(status == 200 && head.contains("content-type: image/png"), "{head} {}", String::from_utf8_lossy(&body));
        body
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The file that the command line makes.
fn sample(args: &[&str]) -> Vec<u8> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_respodiff"));
    let output = command.args(["sample", "-q", "-o", "-", "--device", "cpu"]).args(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

#[test]
fn files_are_those_of_the_command_line() {
    let server = Server::start(&["--max-batch", "3"]);
    let (status, _, body) = server.ask("GET", "/v1/models", "", "");
    let models: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((status, &models["data"][0]["id"]), (200, &json!("respodiff-demo")));
    let concepts = models["data"][0]["concepts"].as_array().unwrap();
    assert!(concepts.contains(&json!("woman")) && concepts.contains(&json!("man")), "{models}");
    server.wait_for_hashes();
    // Nine clients at once, whose requests differ in everything, of which three fit into the batch.
    let cases: [(Value, &[&str]); 9] = [
        (
            json!({"prompt": "a doctor", "seed": 7, "num_inference_steps": 12}),
            &["a doctor", "--seed", "7", "--steps", "12"],
        ),
        (
            json!({"prompt": "a cook", "seed": 8, "num_inference_steps": 3, "sampler": "Euler a"}),
            &["a cook", "--seed", "8", "--steps", "3", "--sampler", "Euler a"],
        ),
        (
            json!({"prompt": "a nurse", "seed": 9, "num_inference_steps": 6, "guidance_scale": 1.0}),
            &["a nurse", "--seed", "9", "--steps", "6", "--guidance", "1"],
        ),
        (
            json!({"prompt": "a nurse", "seed": 1, "num_inference_steps": 5, "negative_prompt": "a hat"}),
            &["a nurse", "--seed", "1", "--steps", "5", "-n", "a hat"],
        ),
        (
            json!({"prompt": "a cook", "seed": 2, "num_inference_steps": 5, "size": "72x64"}),
            &["a cook", "--seed", "2", "--steps", "5", "-W", "72", "-H", "64"],
        ),
        (
            json!({"prompt": "a doctor", "seed": 3, "num_inference_steps": 4, "concepts": ["woman"]}),
            &["a doctor", "--seed", "3", "--steps", "4", "--concept", "woman"],
        ),
        (
            json!({"prompt": "a doctor", "seed": 4, "num_inference_steps": 4, "concepts": [{"name": "man", "weight": 0.5}]}),
            &["a doctor", "--seed", "4", "--steps", "4", "--concept", "man:0.5"],
        ),
        (
            json!({"prompt": "a guard", "seed": 5, "num_inference_steps": 4, "balance": ["woman", "man"]}),
            &["a guard", "--seed", "5", "--steps", "4", "--balance", "woman,man"],
        ),
        (
            json!({"prompt": "a driver", "seed": 6, "num_inference_steps": 9, "sampler": "UniPC"}),
            &["a driver", "--seed", "6", "--steps", "9", "--sampler", "UniPC"],
        ),
    ];
    std::thread::scope(|scope| {
        let asked: Vec<_> = cases.iter().map(|(body, _)| scope.spawn(|| server.png(body))).collect();
        for (answer, (body, args)) in asked.into_iter().zip(&cases) {
            assert!(answer.join().unwrap() == sample(args), "{body}");
        }
    });
    // Quotas run over the pictures of a request.
    let (_, answer) = server.json(
        "/v1/images/generations",
        &json!({"prompt": "a guard", "n": 4, "num_inference_steps": 1, "balance": [["woman", "man"]]}),
    );
    let women = answer["data"].as_array().unwrap().iter();
    assert_eq!(women.filter(|d| d["parameters"]["concepts"][0]["name"] == "a woman").count(), 2, "{answer}");
    for (body, status, field, word) in [
        (json!({"prompt": "x", "model": "sd"}), 404, "model", "respodiff-demo"),
        (json!({"prompt": "x", "size": "63x64"}), 400, "size", "64"),
        (json!({"prompt": "x", "sampler": "best"}), 400, "sampler", "DDIM"),
        (json!({"prompt": "x", "num_inference_steps": 5000}), 400, "num_inference_steps", "1000"),
        (json!({"prompt": "x", "guidance_scale": 1e300}), 400, "guidance_scale", "finite"),
        (json!({"prompt": "x\u{0}"}), 400, "prompt", "NUL"),
        (json!({"prompt": "x", "concepts": ["womann"]}), 404, "concepts", "`woman`"),
        (json!({"prompt": "x", "concepts": ["../../etc/passwd"]}), 404, "concepts", "no concept"),
        (json!({"prompt": "x", "balance": ["woman"]}), 400, "balance", "two concepts"),
        (json!({"prompt": "x", "balance": "woman,man=1"}), 400, "balance", "share"),
    ] {
        let (code, answer) = server.json("/v1/images/generations", &body);
        let error = &answer["error"];
        assert_eq!((code, &error["param"]), (status, &json!(field)), "{body}: {answer}");
        assert!(error["message"].as_str().unwrap().contains(word), "{body}: {answer}");
    }
    let (_, estimate) = server.json("/v1/estimate", &json!({"prompt": "x", "n": 2, "num_inference_steps": 7}));
    assert!(estimate["steps"] == 16 && estimate["memory_bytes"].as_u64().unwrap() > 1 << 20, "{estimate}");
}

/// SIGTERM lets what was accepted end, and the process ends well.
#[cfg(unix)]
#[test]
fn what_was_accepted_is_finished() {
    let mut server = Server::start(&[]);
    server.wait_for_hashes();
    let body = json!({"prompt": "a cook", "seed": 5, "num_inference_steps": 60});
    std::thread::scope(|scope| {
        let answer = scope.spawn(|| server.png(&body));
        while !String::from_utf8_lossy(&server.ask("GET", "/metrics", "", "").2).contains("respodiff_batch_size 1") {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(Command::new("kill").args(["-TERM", &server.child.id().to_string()]).status().unwrap().success());
        assert!(answer.join().unwrap() == sample(&["a cook", "--seed", "5", "--steps", "60"]));
    });
    assert!(server.child.wait().unwrap().success());
}

/// Quotas hold over a stream of requests of one picture each, also across a server that is killed; a prompt that names
/// an attribute, and a client that balances for itself, are left alone.
#[test]
fn quotas_hold_over_the_stream() {
    let folder = tempfile::tempdir().unwrap();
    let policy = folder.path().join("policy.toml");
    let text = "[[always]]\nconcept = \"asian\"\nweight = 0.25\n\n[[quota]]\nconcepts = [\"woman\", \"man\"]\n\
                shares = [0.25, 0.75]\n";
    std::fs::write(&policy, text).unwrap();
    let flags = ["--policy", policy.to_str().unwrap()];
    // The concepts of the answer's pictures, but for the one that all have.
    let concepts = |server: &Server, body: &Value| -> Vec<String> {
        let (status, answer) = server.json("/v1/images/generations", body);
        assert_eq!(status, 200, "{answer}");
        let one = |datum: &Value| {
            let used: Vec<Value> = datum["parameters"]["concepts"].as_array().unwrap().clone();
            assert_eq!((&used[0]["file"], &used[0]["weight"]), (&json!("asian"), &json!(0.25)));
            used[1..].iter().map(|used| used["file"].as_str().unwrap()).collect::<Vec<_>>().join("+")
        };
        answer["data"].as_array().unwrap().iter().map(one).collect()
    };
    let body = |prompt: &str| json!({"prompt": prompt, "num_inference_steps": 1, "sampler": "Euler"});
    let mut stream = Vec::new();
    for _ in 0..3 {
        let server = Server::start(&flags);
        for _ in 0..3 {
            stream.extend(concepts(&server, &body("a doctor")));
            assert_eq!(concepts(&server, &body("a female doctor")), [""]);
        }
        let mut own = body("a doctor");
        own["balance"] = json!(["white", "black"]);
        own["n"] = json!(2);
        let mut pair = concepts(&server, &own);
        pair.sort();
        assert_eq!(pair, ["black", "white"]);
        let mut several = body("a cook");
        several["n"] = json!(5);
        stream.extend(concepts(&server, &several));
        // Dropped, the server is killed at once.
    }
    assert_eq!(stream.len(), 24);
    for window in stream.windows(4) {
        assert_eq!(window.iter().filter(|name| *name == "woman").count(), 1, "{stream:?}");
    }
    let refused = |text: &str, word: &str| {
        std::fs::write(&policy, text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_respodiff"));
        let output = command.arg("serve").args(flags).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.code() == Some(1) && error.contains(word) && error.lines().count() == 1,
            "{text}: {error}"
        );
    };
    refused("[[quotas]]", "quotas");
    refused("[[quota]]\nconcepts = [\"woman\"]", "two concepts");
    refused("[[quota]]\nconcepts = [\"woman\", \"nobody\"]", "nobody");
    refused("[[always]]\nconcept = \"woman\"\nweight = nan", "finite");
    std::fs::write(folder.path().join("policy.toml.counts"), "{").unwrap();
    refused("[[quota]]\nconcepts = [\"woman\", \"man\"]", "delete it");
}

#[test]
fn servers_that_cannot_be_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    std::fs::write(folder.path().join("empty"), "\n").unwrap();
    std::fs::write(folder.path().join("bad.safetensors"), "no").unwrap();
    let refused = |args: &[&str], code: i32, word: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_respodiff"));
        let output = command.arg("serve").args(args).current_dir(folder.path()).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(code) && error.contains(word), "{args:?}: {error}");
    };
    refused(&["--port", &port], 1, "another port");
    refused(&["--max-batch", "0"], 2, "--max-batch");
    refused(&["--timeout", "-1"], 2, "--timeout");
    refused(&["--key-file", "empty"], 1, "one line");
    refused(&["--key-file", "missing"], 1, "missing");
    refused(&["--concepts", "missing"], 1, "missing");
    refused(&["--concepts", "."], 1, "bad.safetensors");
    refused(&["--model", "./nowhere"], 2, "nowhere");
}
