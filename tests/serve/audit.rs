//! Tenants with quotas of their own, and the audit log of what was drawn for them.

use super::Server;
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output};

fn verify(log: &Path, flags: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_respodiff"));
    command.args(["audit", "verify", "--device", "cpu"]).arg(log).args(flags).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The file of a picture that a tenant asks for.
fn draw(server: &Server, tenant: &str, body: &Value) -> Vec<u8> {
    let headers = format!("accept: image/png\r\nauthorization: Bearer key-of-{tenant}\r\nx-request-id: mine\r\n");
    let (status, _, png) = server.ask("POST", "/v1/images/generations", &headers, &body.to_string());
    assert_eq!(status, 200, "{}", text(&png));
    png
}

#[test]
fn what_was_drawn_for_whom_can_be_checked() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let keys = "# who may draw\nanna: key-of-anna\nben: key-of-ben\n";
    std::fs::write(at("keys"), keys).unwrap();
    let policy = "[[quota]]\nconcepts = [\"woman\", \"man\"]\nshares = [0.25, 0.75]\nscope = \"tenant\"\n\n\
                  [[quota]]\nconcepts = [\"asian\", \"black\", \"white\"]\n";
    std::fs::write(at("policy.toml"), policy).unwrap();
    let (log, names) =
        (at("audit.log"), ["keys", "policy.toml", "audit.log"].map(|name| at(name).display().to_string()));
    let flags = ["--key-file", &names[0], "--policy", &names[1], "--audit", &names[2]];
    let body = |seed: usize| json!({"prompt": "a doctor", "seed": seed, "num_inference_steps": 2});
    let mut files = Vec::new();
    let genders = |png: &[u8]| text(png).contains("\"name\":\"a woman\"");
    let mut women = [Vec::new(), Vec::new()];
    for run in 0..3 {
        let server = Server::start(&flags);
        // Anna asks twice as often as Ben.
        for i in 0..5 {
            for (who, tenant) in [(0, "anna"), (1, "ben"), (0, "anna")] {
                let png = draw(&server, tenant, &body(100 * run + i));
                women[who].push(genders(&png));
                files.push(png);
            }
        }
        // Killed during a picture, and in the middle of a line.
        let slow = json!({"prompt": "a cook", "num_inference_steps": 900}).to_string();
        let lines = || std::fs::read_to_string(&log).unwrap().matches('\n').count();
        let before = lines();
        let headers = "authorization: Bearer key-of-ben\r\n";
        assert_eq!(server.ask("POST", "/v1/jobs", headers, &slow).0, 202);
        while lines() == before {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        let whole = std::fs::read_to_string(&log).unwrap();
        women[1].push(whole.lines().nth(before).unwrap().contains("\"name\":\"a woman\""));
        server.kill();
        let mut torn = std::fs::read(&log).unwrap();
        torn.extend(b"{\"previous\":\"12");
        std::fs::write(&log, torn).unwrap();
    }
    // In any four pictures of a tenant in a row, one shows a woman.
    for stream in &women {
        assert!(stream.windows(4).all(|four| four.iter().filter(|is_woman| **is_woman).count() == 1), "{stream:?}");
    }
    let checked = verify(&log, &["--remake", "5", "--seed", "3"]);
    let (report, warnings) = (text(&checked.stdout), text(&checked.stderr));
    assert!(checked.status.success(), "{report}{warnings}");
    assert!(warnings.contains("cut off"), "{warnings}");
    for line in [
        "48 pictures begun: 45 finished, 0 failed, 0 cancelled, 3 without an end",
        "woman,man=[0.25, 0.75] for tenant anna: 30 pictures, exact in 27 of 27 windows of 4",
        "woman,man=[0.25, 0.75] for tenant ben: 18 pictures, exact in 15 of 15 windows of 4",
        "for everybody: 48 pictures, exact in 46 of 46 windows of 3",
        "5 pictures made again, 5 of them the same to the last bit",
    ] {
        assert!(report.contains(line), "{line}: {report}");
    }
    // What the log says of a picture is what the client got.
    let whole = std::fs::read_to_string(&log).unwrap();
    let lines: Vec<&str> = whole.lines().filter(|line| line.ends_with('}')).collect();
    assert!(files.iter().all(|file| whole.contains(&sha256(file))));
    let begun: Value = serde_json::from_str(lines[1]).unwrap();
    assert_eq!((&begun["id"], &begun["tenant"]), (&json!("mine"), &json!("anna")));
    assert_eq!(begun["prompt_sha256"], sha256(b"a doctor"));
    assert!(!whole.contains("key-of"), "no key is in the log");
    // Whatever is changed shows.
    let changed = |name: &str, lines: &[String], word: &str| {
        std::fs::write(at("changed"), lines.join("\n") + "\n").unwrap();
        let checked = verify(&at("changed"), &[]);
        let error = text(&checked.stderr);
        assert!(checked.status.code() == Some(1) && error.contains(word), "{name}: {error}");
    };
    let owned: Vec<String> = lines.iter().map(|line| line.to_string()).collect();
    let mut other = owned.clone();
    other[5] = other[5].replace("a doctor", "a lawyer");
    changed("another prompt", &other, "line 6: the prompt's hash");
    let mut other = owned.clone();
    other.remove(7);
    changed("a line less", &other, "line 8: the line before it");
    let mut other = owned.clone();
    other.swap(3, 5);
    changed("another order", &other, "line 4: the line before it");
    // One who also computes all hashes anew cannot hide a quota that was not kept.
    let mut other = owned.clone();
    let is_anna = |line: &&String| line.contains("\"event\":\"begun\"") && line.contains("\"anna\"");
    let line = other.iter().find(is_anna).unwrap().clone();
    let (from, to) = ("\"combination\":0", "\"combination\":1");
    let swapped = if line.contains(from) { line.replacen(from, to, 1) } else { line.replacen(to, from, 1) };
    *other.iter_mut().find(|other| **other == line).unwrap() = swapped;
    changed("another choice", &rechained(&owned, &other), "the quotas give");
    let other = rechained(&owned, &owned);
    std::fs::write(at("changed"), other.join("\n") + "\n").unwrap();
    assert!(verify(&at("changed"), &[]).status.success(), "the hashes are computed as the log's are");
}

/// Changed lines with the hashes that fit them.
fn rechained(before: &[String], lines: &[String]) -> Vec<String> {
    let (mut previous, mut names) = ("0".repeat(64), std::collections::HashMap::<String, String>::new());
    let mut chained = Vec::new();
    for (before, line) in before.iter().zip(lines) {
        let at = line.find("\"previous\":\"").unwrap() + 12;
        let mut next = line.clone();
        next.replace_range(at..at + 64, &previous);
        if let Some(at) = next.find("\"picture\":\"").map(|at| at + 11) {
            let old = next[at..at + 64].to_string();
            next.replace_range(at..at + 64, names[&old].as_str());
        }
        previous = sha256(next.as_bytes());
        names.insert(sha256(before.as_bytes()), previous.clone());
        chained.push(next);
    }
    chained
}

#[test]
fn logs_without_prompts_hold_hashes_alone() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(at("policy.toml"), "audit_prompts = false\n").unwrap();
    let server = Server::start(&["--policy", &at("policy.toml"), "--audit", &at("audit.log")]);
    let body = json!({"prompt": "a secretary", "negative_prompt": "a hat", "seed": 3, "num_inference_steps": 2});
    server.png(&body);
    // Another server cannot write to the log.
    let mut command = Command::new(env!("CARGO_BIN_EXE_respodiff"));
    let second = command.args(["serve", "--port", "0", "--audit", &at("audit.log")]).output().unwrap();
    assert!(!second.status.success() && text(&second.stderr).contains("another process"), "{}", text(&second.stderr));
    let log = std::fs::read_to_string(at("audit.log")).unwrap();
    assert!(log.contains(&sha256(b"a secretary")) && !log.contains("secretary") && !log.contains("a hat"), "{log}");
    let checked = verify(Path::new(&at("audit.log")), &[]);
    assert!(checked.status.success(), "{}", text(&checked.stderr));
    let checked = verify(Path::new(&at("audit.log")), &["--remake", "1"]);
    assert!(!checked.status.success() && text(&checked.stderr).contains("audit_prompts"), "{}", text(&checked.stderr));
    // A file that is no log is left as it is.
    std::fs::write(at("notes"), "dear diary\n").unwrap();
    for output in [
        Command::new(env!("CARGO_BIN_EXE_respodiff")).args(["serve", "--port", "0", "--audit", &at("notes")]).output(),
        Ok(verify(Path::new(&at("notes")), &[])),
        Ok(verify(Path::new(&at("missing")), &[])),
    ] {
        assert_eq!(output.unwrap().status.code(), Some(1));
    }
    assert_eq!(std::fs::read_to_string(at("notes")).unwrap(), "dear diary\n");
}

#[test]
fn keys_have_names() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let who = |keys: &str, key: &str| {
        std::fs::write(at("keys"), keys).unwrap();
        let server = Server::start(&["--key-file", &at("keys")]);
        server.ask("GET", "/v1/models", &format!("authorization: Bearer {key}\r\n"), "").0
    };
    assert_eq!(who("one key: alone\n", "alone"), 200);
    assert_eq!(who("k3y:with/colons\n", "k3y:with/colons"), 200);
    assert_eq!(who("{\"anna\": \"a\", \"ben\": \"b\"}", "b"), 200);
    assert_eq!(who("anna: a\nanna: b\n", "b"), 200);
    assert_eq!(who("anna: a\nben: b\n", "anna"), 401);
    let refused = |keys: &str, word: &str| {
        std::fs::write(at("keys"), keys).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_respodiff"));
        let output = command.args(["serve", "--port", "0", "--key-file", &at("keys")]).output().unwrap();
        let error = text(&output.stderr);
        assert!(!output.status.success() && error.contains(word) && !error.contains("s3cret"), "{keys}: {error}");
    };
    refused("anna: s3cret\nben: s3cret\n", "to anna and to ben");
    refused("anna: s3cret\ns3cret2\n", "no name");
    refused("anna: \nben: s3cret", "empty");
    refused("{\"anna\": 3}", "JSON");
    refused("# nobody\n", "no key");
    // A quota for each tenant needs tenants.
    std::fs::write(at("keys"), "s3cret").unwrap();
    std::fs::write(at("policy"), "[[quota]]\nconcepts = [\"woman\", \"man\"]\nscope = \"tenant\"\n").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_respodiff"));
    let flags = ["--key-file", &at("keys"), "--policy", &at("policy")];
    let output = command.args(["serve", "--port", "0"]).args(flags).output().unwrap();
    assert!(output.status.code() == Some(2) && text(&output.stderr).contains("no key has a name"));
}

/// The log has the hash of the file before it is signed, which the signed file's picture still has.
#[cfg(feature = "c2pa")]
#[test]
fn signed_pictures_are_in_the_log_as_they_were_before() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("audit.log");
    let [chain, key] = ["chain.pem", "key.pem"]
        .map(|name| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/c2pa").join(name).display().to_string());
    let server = Server::start(&["--audit", log.to_str().unwrap(), "--sign", &chain, "--sign-key", &key]);
    let body = json!({"prompt": "a doctor", "seed": 3, "num_inference_steps": 2});
    let png = draw(&server, "nobody", &body);
    let reader = c2pa::Reader::from_context(c2pa::Context::new()).with_stream("image/png", std::io::Cursor::new(&png));
    assert_eq!(reader.unwrap().validation_state(), c2pa::ValidationState::Valid);
    drop(server);
    let checked = verify(&log, &["--remake", "1"]);
    assert!(checked.status.success(), "{}", text(&checked.stderr));
    assert!(!std::fs::read_to_string(&log).unwrap().contains(&sha256(&png)));
}
