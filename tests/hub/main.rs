//! Models by their ids: the layout of the cache, downloads, and everything that can go wrong on the way.

mod server;

use std::fs;
use std::net::TcpListener;
use std::path::Path;

use respodiff::ErrorKind;
use respodiff::weights::hub::{HubConfig, resolve};
use server::{COMMIT, INDEX, Server, etag};

/// The files of a small model on the hub, with many that no pipeline reads.
const FILES: [&str; 24] = [
    ".gitattributes",
    "README.md",
    "model_index.json",
    "v1-5-pruned.safetensors",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/flax_model.msgpack",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/model.onnx",
    "vae/config.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
];
const UNET: &str = "unet/diffusion_pytorch_model.fp16.safetensors";

/// All files below a folder, as paths from it.
fn tree(folder: &Path) -> Vec<String> {
    fn walk(folder: &Path, prefix: &str, found: &mut Vec<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let name = format!("{prefix}{}", entry.file_name().to_str().unwrap());
            match entry.path().is_dir() {
                true => walk(&entry.path(), &format!("{name}/"), found),
                false => found.push(name),
            }
        }
    }
    let mut found = Vec::new();
    walk(folder, "", &mut found);
    found.sort();
    found
}

#[test]
fn downloads_what_is_needed_into_the_shared_layout() {
    let server = Server::new(&FILES);
    let snapshot = server.resolve("owner/name").unwrap();
    assert_eq!(snapshot, server.repo().join("snapshots").join(COMMIT));
    assert_eq!(
        tree(&snapshot),
        [
            "model_index.json",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "text_encoder/model.fp16.safetensors",
            "tokenizer/merges.txt",
            "tokenizer/tokenizer_config.json",
            "tokenizer/vocab.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.fp16.safetensors",
        ]
    );
    for path in tree(&snapshot) {
        let bytes = server.set(|state| state.files[&path].clone());
        assert_eq!(fs::read(snapshot.join(&path)).unwrap(), bytes, "{path}");
        assert_eq!(fs::read(server.repo().join("blobs").join(etag(&path, &bytes))).unwrap(), bytes, "{path}");
        #[cfg(unix)]
        {
            let up = if path.contains('/') { "../../.." } else { "../.." };
            let target = fs::read_link(snapshot.join(&path)).unwrap();
            assert_eq!(target, Path::new(up).join("blobs").join(etag(&path, &bytes)));
        }
    }
    assert_eq!(fs::read_dir(server.repo().join("blobs")).unwrap().count(), 11, "nothing incomplete stays");
    assert_eq!(fs::read_dir(server.repo().join("refs")).unwrap().count(), 1);
    assert_eq!(fs::read_to_string(server.repo().join("refs/main")).unwrap(), COMMIT);
    assert_eq!(server.set(|state| state.authorization.clone()).as_deref(), Some("Bearer secret"));
    let requests = server.take_requests();
    assert_eq!(requests[0], "/api/models/owner/name/revision/main?blobs=true");
    assert_eq!(requests.len(), 12);

    // From now on the cache is enough: by branch, by commit, and without network.
    assert_eq!(server.resolve("owner/name").unwrap(), snapshot);
    assert_eq!(server.resolve(&format!("owner/name@{COMMIT}")).unwrap(), snapshot);
    assert_eq!(resolve("owner/name", &HubConfig { offline: true, ..server.config() }, &mut |_| ()).unwrap(), snapshot);
    assert_eq!(server.take_requests(), [""; 0]);
    // Another revision asks the server, and shares the blobs.
    assert_eq!(server.resolve("owner/name@refs/pr/1").unwrap(), snapshot);
    assert_eq!(server.take_requests(), ["/api/models/owner/name/revision/refs%2Fpr%2F1?blobs=true"]);
    assert_eq!(fs::read_to_string(server.repo().join("refs/refs/pr/1")).unwrap(), COMMIT);
}

#[test]
fn shards_and_half_precision_side_by_side() {
    let shards = [
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    ];
    let index = [
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
    ];
    let without = FILES.iter().filter(|path| !path.starts_with("unet/diffusion"));
    let paths: Vec<&str> = without.chain(&shards).chain(&index).copied().collect();
    let snapshot = Server::new(&paths);
    let files = tree(&snapshot.resolve("owner/name").unwrap());
    let weights: Vec<&str> = files.iter().map(String::as_str).filter(|path| path.contains("safetensors")).collect();
    assert_eq!(
        weights,
        [
            "text_encoder/model.fp16.safetensors",
            shards[0],
            shards[1],
            "unet/diffusion_pytorch_model.safetensors.index.json",
            "vae/diffusion_pytorch_model.fp16.safetensors",
        ]
    );
    // If a shard is missing both on the server and in the cache, the weights count as missing.
    let blob = fs::canonicalize(snapshot.repo().join("snapshots").join(COMMIT).join(shards[1])).unwrap();
    fs::remove_file(blob).unwrap();
    snapshot.set(|state| state.files.remove(shards[1]));
    let message = snapshot.resolve("owner/name").unwrap_err().to_string();
    assert!(message.contains("safetensors"), "{message}");
}

/// Files of `torch.save` are taken if there are no others, and found again without the server.
#[test]
fn pickles_if_there_is_nothing_else() {
    let without = FILES.iter().filter(|path| !path.starts_with("unet/diffusion") && !path.contains("vae/diffusion"));
    let pickles = ["unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin"];
    let both = ["vae/diffusion_pytorch_model.fp16.bin", "vae/diffusion_pytorch_model.fp16.safetensors"];
    let paths: Vec<&str> = without.chain(&pickles).chain(&both).copied().collect();
    let server = Server::new(&paths);
    let snapshot = server.resolve("owner/name").unwrap();
    let files = tree(&snapshot);
    let weights: Vec<&str> =
        files.iter().map(String::as_str).filter(|path| path.contains("model.") && path.contains('/')).collect();
    assert_eq!(weights, ["text_encoder/model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", both[1]]);
    server.take_requests();
    assert_eq!(server.resolve("owner/name").unwrap(), snapshot);
    assert!(server.take_requests().is_empty());
}

#[test]
fn dropped_connections_resume() {
    let server = Server::new(&FILES);
    server.set(|state| state.drops.insert(UNET.to_string(), 2));
    server.resolve("owner/name").unwrap();
    let url = format!("/owner/name/resolve/{COMMIT}/{UNET}");
    let requests: Vec<String> = server.take_requests().into_iter().filter(|line| line.starts_with(&url)).collect();
    assert_eq!(requests, [url.clone(), format!("{url} 100000-"), format!("{url} 150000-")]);
}

#[test]
fn interrupted_downloads_go_on_later() {
    for ignores_ranges in [false, true] {
        let server = Server::new(&FILES);
        server.set(|state| state.drops.insert(UNET.to_string(), 4));
        let message = server.failure("owner/name");
        assert!(message.contains(UNET) && message.contains("run again"), "{message}");
        let blob = server.set(|state| etag(UNET, &state.files[UNET]));
        let partial = server.repo().join("blobs").join(format!("{blob}.incomplete"));
        let have = fs::metadata(&partial).unwrap().len();
        assert_eq!(have, 187_500);
        server.take_requests();

        server.set(|state| state.ignores_ranges = ignores_ranges);
        let snapshot = server.resolve("owner/name").unwrap();
        assert_eq!(fs::read(snapshot.join(UNET)).unwrap(), server.set(|state| state.files[UNET].clone()));
        let requests = server.take_requests();
        assert!(requests.contains(&format!("/owner/name/resolve/{COMMIT}/{UNET} {have}-")), "{requests:?}");
        assert!(!requests.iter().any(|line| line.contains("text_encoder")), "whole files are not fetched again");
        assert!(!partial.exists());
    }
}

#[test]
fn damaged_files_are_refused() {
    let server = Server::new(&FILES);
    let wrong = "0".repeat(64);
    server.set(|state| state.wrong_sha.insert(UNET.to_string(), wrong.clone()));
    let message = server.failure("owner/name");
    assert!(message.contains(UNET) && message.contains("SHA-256"), "{message}");
    assert!(!server.repo().join("blobs").join(format!("{wrong}.incomplete")).exists());
    // A partial file that is too long, left over from another file of the same name, is discarded.
    server.set(|state| state.wrong_sha.clear());
    let blob = server.set(|state| etag(UNET, &state.files[UNET]));
    fs::write(server.repo().join("blobs").join(format!("{blob}.incomplete")), vec![7; 300_000]).unwrap();
    let snapshot = server.resolve("owner/name").unwrap();
    assert_eq!(fs::read(snapshot.join(UNET)).unwrap(), server.set(|state| state.files[UNET].clone()));
}

#[test]
fn refusals_say_what_to_do() {
    let server = Server::new(&FILES);
    for (status, words) in [
        (401, ["licence", "HF_TOKEN"]),
        (403, ["licence", "HF_TOKEN"]),
        (404, ["spelling", "local folder"]),
        (503, ["503", "local folder"]),
    ] {
        server.set(|state| state.status = status);
        let message = server.failure("owner/name");
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    }
    // A port where nobody listens.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let nowhere = HubConfig { endpoint: format!("http://127.0.0.1:{port}"), ..server.config() };
    let message = resolve("owner/name", &nowhere, &mut |_| ()).unwrap_err().to_string();
    assert!(message.contains("network") && message.contains("local folder"), "{message}");
    let offline = HubConfig { offline: true, ..server.config() };
    let message = resolve("owner/name", &offline, &mut |_| ()).unwrap_err().to_string();
    assert!(message.contains("HF_HUB_OFFLINE") && message.contains("local folder"), "{message}");
}

#[test]
fn repositories_without_a_model_are_refused_before_the_download() {
    for (missing, word) in
        [("model_index.json", "model_index.json"), ("unet/", "unet"), (".safetensors", "safetensors")]
    {
        let server = Server::new(&FILES);
        server.set(|state| state.files.retain(|path, _| !path.contains(missing)));
        let message = server.failure("owner/name");
        assert!(message.contains(word) && message.contains("local folder"), "{message}");
        assert_eq!(server.take_requests().len(), 1);
    }
}

#[test]
fn names_cannot_leave_the_cache() {
    let server = Server::new(&FILES);
    let evil = ["../evil.json", "/evil.json", "unet/../../../evil.json", "unet/..\\..\\evil.json", "unet/C:evil.json"];
    for path in evil.iter().chain(&["tokenizer/../evil.json", "unet/.json"]) {
        server.set(|state| state.files.insert(path.to_string(), b"{}".to_vec()));
    }
    let snapshot = server.resolve("owner/name").unwrap();
    assert_eq!(tree(&snapshot).len(), 11);
    assert!(!tree(server.cache.path()).iter().any(|path| path.contains("evil")));
    // Nor can a checksum, which becomes the name of a blob.
    let server = Server::new(&FILES);
    server.set(|state| state.wrong_sha.insert(UNET.to_string(), "../../../../evil".to_string()));
    let message = server.failure("owner/name");
    assert!(message.contains("checksum"), "{message}");
}

#[test]
fn invalid_ids_are_usage_errors() {
    let server = Server::new(&FILES);
    let long = format!("owner/{}", "n".repeat(100));
    for id in [
        "",
        "name",
        "/",
        "a/",
        "/b",
        "a/b/c",
        "..",
        "../b",
        "a/..",
        "/etc/passwd",
        "a b/c",
        "a/b@",
        "a/b@../x",
        "a/b@/x",
        "a/b@x@y",
        "a--b/c",
        "-a/b",
        "a/.b",
        "a\\b/c",
        "a/b?x",
        "a/\u{e9}",
        &long,
    ] {
        assert!(server.resolve(id).is_err_and(|e| e.kind() == ErrorKind::Invalid), "{id:?}");
    }
    assert_eq!(server.take_requests(), [""; 0]);
    assert!(!server.config().cache.exists());
}

#[test]
fn snapshots_of_other_tools_are_used_when_whole() {
    let server = Server::new(&[]);
    let snapshot = server.repo().join("snapshots").join(COMMIT);
    let write = |path: &str, text: &str| {
        fs::create_dir_all(snapshot.join(path).parent().unwrap()).unwrap();
        fs::write(snapshot.join(path), text).unwrap();
    };
    fs::create_dir_all(server.repo().join("refs")).unwrap();
    fs::write(server.repo().join("refs/main"), format!("{COMMIT}\n")).unwrap();
    let offline = HubConfig { offline: true, ..server.config() };
    let found = || resolve("owner/name", &offline, &mut |_| ()).ok();
    write("model_index.json", INDEX);
    write("unet/diffusion_pytorch_model.bin", "");
    write("vae/diffusion_pytorch_model.safetensors", "");
    write("text_encoder/model.fp16.safetensors", "");
    assert_eq!(found(), None);
    write("unet/diffusion_pytorch_model-00001-of-00002.safetensors", "");
    assert_eq!(found(), None);
    write("unet/diffusion_pytorch_model-00002-of-00002.safetensors", "");
    assert_eq!(found(), None);
    // An interrupted download may lack only small files.
    let small = ["unet/config.json", "vae/config.json", "text_encoder/config.json"];
    small.iter().for_each(|path| write(path, "{}"));
    assert_eq!(found(), Some(snapshot.clone()));
    fs::remove_file(snapshot.join("vae/config.json")).unwrap();
    assert_eq!(found(), None);
    write("vae/config.json", "{}");
    let index = INDEX.replace(
        "\"vae\":",
        "\"scheduler\": [\"diffusers\", \"X\"], \"tokenizer\": [\"transformers\", \"Y\"], \"vae\":",
    );
    write("model_index.json", &index);
    assert_eq!(found(), None);
    write("scheduler/scheduler_config.json", "{}");
    write("tokenizer/vocab.json", "{}");
    assert_eq!(found(), None);
    write("tokenizer/merges.txt", "");
    assert_eq!(found(), Some(snapshot.clone()));
    // The model is called by its id, not by the commit.
    assert_eq!(respodiff::Source::folder(&snapshot).unwrap().name(), "owner/name");
    // A ref may not lead out of the snapshots.
    fs::write(server.repo().join("refs/main"), format!("../snapshots/{COMMIT}")).unwrap();
    assert_eq!(found(), None);
}

/// Environment variables mean what they mean in `huggingface_hub` 0.36.
#[test]
fn variables_mean_what_they_mean_to_huggingface_hub() {
    let home = tempfile::tempdir().unwrap();
    let at = |path: &str| home.path().join(path);
    fs::create_dir_all(at("hf")).unwrap();
    fs::write(at("hf/token"), "of-login\n").unwrap();
    fs::write(at("other"), "of-file").unwrap();
    let config = |given: &[(&str, &str)]| {
        let home = home.path().to_str().unwrap().to_string();
        let given: Vec<(String, String)> =
            given.iter().map(|(k, v)| (k.to_string(), v.replace("HOME/", &format!("{home}/")))).collect();
        HubConfig::from_variables(|name| match name {
            "HOME" => Some(home.clone().into()),
            name => given.iter().find(|(known, _)| known == name).map(|(_, value)| value.into()),
        })
        .unwrap()
    };
    for (given, cache) in [
        (&[][..], ".cache/huggingface/hub"),
        (&[("HF_HUB_CACHE", "HOME/a")], "a"),
        (&[("HUGGINGFACE_HUB_CACHE", "HOME/b")], "b"),
        (&[("HF_HUB_CACHE", "~/c")], "c"),
        (&[("HF_HUB_CACHE", "$PLACE/d"), ("PLACE", "~/x")], "x/d"),
        (&[("HF_HUB_CACHE", "~/${PLACE}e"), ("PLACE", "y")], "ye"),
        (&[("HF_HUB_CACHE", "~/$UNSET/f")], "$UNSET/f"),
        (&[("HF_HUB_CACHE", ""), ("HF_HOME", "~/g")], "g/hub"),
        (&[("XDG_CACHE_HOME", "HOME/h")], "h/huggingface/hub"),
    ] {
        assert_eq!(config(given).cache, at(cache), "{given:?}");
    }
    for (given, token) in [
        (&[][..], None),
        (&[("HF_HOME", "HOME/hf")], Some("of-login")),
        (&[("HF_TOKEN_PATH", "HOME/other"), ("HF_HOME", "HOME/hf")], Some("of-file")),
        (&[("HF_TOKEN", " given "), ("HF_HOME", "HOME/hf")], Some("given")),
        (&[("HUGGING_FACE_HUB_TOKEN", "old")], Some("old")),
        (&[("HF_TOKEN", "given"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")], None),
    ] {
        assert_eq!(config(given).token.as_deref(), token, "{given:?}");
    }
    assert!(config(&[("TRANSFORMERS_OFFLINE", "1")]).offline && config(&[("HF_HUB_OFFLINE", "YES")]).offline);
    assert!(!config(&[("HF_HUB_OFFLINE", "0")]).offline);
}

/// Variants are chosen as `from_pretrained(variant="fp16")` of diffusers chooses them.
#[test]
fn each_component_comes_in_the_variant_that_it_has() {
    let lacking = |path: &&&str| ![UNET, "vae/diffusion_pytorch_model.safetensors"].contains(path);
    let paths: Vec<&str> = FILES.iter().filter(lacking).copied().collect();
    let server = Server::new(&paths);
    let snapshot = server.resolve("owner/name").unwrap();
    let names = tree(&snapshot);
    for name in ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"] {
        assert!(names.iter().any(|found| found == name), "{names:?}");
    }
    assert!(!names.iter().any(|name| name == "text_encoder/model.safetensors"), "{names:?}");
}
