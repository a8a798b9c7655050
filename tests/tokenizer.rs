//! The tokenizer compared with transformers' `CLIPTokenizer`, on the real CLIP vocabulary and on those of the tiny
//! checkpoints.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use respodiff::models::tokenizer::{Tokenizer, TokenizerRules};
use respodiff::{ErrorKind, Subject};
use serde_json::{Value, json};
use tempfile::TempDir;

const EOS: i64 = 49407;

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path)
}

/// The real vocabulary's merges, which the crate compiles in.
fn merges() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/models/clip-tokenizer/merges.txt")
}

/// `vocab.json` from `merges.txt`: byte symbols, the same with `</w>`, the merges joined, two special tokens.
fn clip_vocab(merges: &str) -> Vec<u8> {
    let printable = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut symbols: Vec<u32> = (0..256).filter(printable).collect();
    symbols.extend(256..256 + 256 - symbols.len() as u32);
    let symbols: Vec<String> = symbols.into_iter().filter_map(char::from_u32).map(String::from).collect();
    let ends = symbols.iter().map(|symbol| format!("{symbol}</w>"));
    let joined = merges.trim().lines().skip(1).map(|line| line.replace(' ', ""));
    let special = ["<|startoftext|>", "<|endoftext|>"].map(String::from);
    let tokens = symbols.iter().cloned().chain(ends).chain(joined).chain(special);
    let vocab: BTreeMap<String, usize> = tokens.enumerate().map(|(id, token)| (token, id)).collect();
    serde_json::to_vec(&vocab).unwrap()
}

/// A folder with CLIP's tokenizer and the pad token of SD1.x.
fn clip_folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        fs::copy(golden("clip-tokenizer").join(name), folder.path().join(name)).unwrap();
    }
    let merges = fs::read_to_string(merges()).unwrap();
    fs::write(folder.path().join("merges.txt"), &merges).unwrap();
    fs::write(folder.path().join("vocab.json"), clip_vocab(&merges)).unwrap();
    folder
}

/// A special token map with another pad token.
fn padded_with(token: &str) -> Vec<u8> {
    let map = fs::read(golden("clip-tokenizer/special_tokens_map.json")).unwrap();
    let mut map: Value = serde_json::from_slice(&map).unwrap();
    map["pad_token"] = json!(token);
    serde_json::to_vec(&map).unwrap()
}

#[test]
fn ids_are_those_of_transformers() {
    let clip = clip_folder();
    let cases: Value = serde_json::from_slice(&fs::read(golden("cases/tokenizer.json")).unwrap()).unwrap();
    let (mut tokenizers, mut different) = (BTreeMap::new(), 0);
    let compiled_in = Tokenizer::clip("<|endoftext|>").unwrap();
    for case in cases.as_array().unwrap() {
        let (vocabulary, prompt) = (case["vocabulary"].as_str().unwrap(), case["prompt"].as_str().unwrap());
        let tokenizer = tokenizers.entry(vocabulary).or_insert_with(|| {
            let folder = match vocabulary {
                "clip" => clip.path().to_path_buf(),
                checkpoint => golden("checkpoints").join(checkpoint).join("tokenizer"),
            };
            [TokenizerRules::Slow, TokenizerRules::Fast]
                .map(|rules| Tokenizer::load(&folder).unwrap().with_rules(rules).unwrap())
        });
        let [slow, fast] = tokenizer;
        // A special token in capitals: the one known difference to the fast tokenizer.
        let capitals = prompt.contains("<|StartOfText|>");
        // The cases have the fast tokenizer's ids only where they differ.
        let differs = case.get("fast_ids").is_some();
        let fast_keys = if differs { ["fast_ids", "fast_beyond"] } else { ["ids", "beyond"] };
        for (tokenizer, rules, [ids, beyond]) in [(slow, "slow", ["ids", "beyond"]), (fast, "fast", fast_keys)] {
            if capitals && rules == "fast" {
                continue;
            }
            let encoded = tokenizer.encode(prompt).unwrap();
            assert_eq!(json!(encoded.ids), case[ids], "{rules} {vocabulary}: {prompt:?}");
            if vocabulary == "clip" && rules == "fast" {
                assert_eq!(compiled_in.encode(prompt).unwrap(), encoded, "{prompt:?}");
            }
            assert!(encoded.ids.iter().all(|&id| (0..tokenizer.vocab_size() as i64).contains(&id)));
            let fits = case[beyond].as_array().unwrap().is_empty();
            assert_eq!(encoded.lost.is_empty(), fits, "{rules} {vocabulary}: {prompt:?} lost {:?}", encoded.lost);
            assert!(prompt.trim_end().ends_with(&encoded.lost));
        }
        different += usize::from(differs);
    }
    assert!(different > 30, "only {different} prompts tell the two tokenizers apart");
    assert!(tokenizers.contains_key("clip"), "no cases of the real vocabulary");
}

#[test]
fn known_prompt_by_hand() {
    let tokenizer = Tokenizer::load(clip_folder().path()).unwrap();
    let encoded = tokenizer.encode("a photo of a cat").unwrap();
    let mut expected = vec![49406, 320, 1125, 539, 320, 2368];
    expected.resize(77, EOS);
    assert_eq!(encoded.ids, expected);
    assert_eq!((encoded.tokens_used, encoded.lost.as_str()), (5, ""));
    assert_eq!((tokenizer.length(), tokenizer.vocab_size()), (77, 49408));
}

#[test]
fn words_that_do_not_fit_are_named() {
    let tokenizer = Tokenizer::load(clip_folder().path()).unwrap();
    let lost = |prompt: &str| {
        let encoded = tokenizer.encode(prompt).unwrap();
        assert_eq!((encoded.ids.len(), encoded.ids[76]), (77, EOS));
        assert_eq!(encoded.tokens_used, 75);
        encoded.lost
    };
    let cats = vec!["Cat"; 74].join(" ");
    assert_eq!(tokenizer.encode(&format!("{cats} DOG  ")).unwrap().lost, "");
    assert_eq!(lost(&format!("{cats} Dog, Caf\u{e9} au  LAIT. ")), ", Caf\u{e9} au  LAIT.");
    // "supercalifragilistic" is several tokens: it counts as lost from its start.
    assert_eq!(lost(&format!("{cats} Supercalifragilistic end")), "Supercalifragilistic end");
    // Offsets count bytes of the original prompt, also after characters that normalisation drops, composes or
    // lengthens.
    let odd = "\u{200b}e\u{301}\u{130}\u{1f600} ".repeat(75);
    assert_eq!(lost(&format!("{odd}LAST"))[..].rsplit(' ').next(), Some("LAST"));
    // These ideographs are one word of 77 letters, or by the slow rules 77 words, each of three tokens.
    assert_eq!(lost(&"\u{732b}".repeat(77)).chars().count(), 77);
    let slow = Tokenizer::load(clip_folder().path()).unwrap().with_rules(TokenizerRules::Slow).unwrap();
    assert_eq!(slow.encode(&"\u{732b}".repeat(77)).unwrap().lost.chars().count(), 77 - 75 / 3);
    assert_eq!(lost(&format!("{cats} dog <|endoftext|>!")), "<|endoftext|>!");
}

#[test]
fn pad_token_comes_from_the_files() {
    let read = |name: &str| fs::read(golden("clip-tokenizer").join(name)).unwrap();
    let (merges, config) = (fs::read(merges()).unwrap(), read("tokenizer_config.json"));
    let vocab = clip_vocab(std::str::from_utf8(&merges).unwrap());
    // SD2.x and SDXL pad with "!", which then is a special token in prompts too, with id 0 instead of 256.
    let map = padded_with("!");
    let tokenizer = Tokenizer::from_bytes(&vocab, &merges, Some(&config), Some(&map)).unwrap();
    let ids = tokenizer.encode("wow!!").unwrap().ids;
    assert_eq!(ids, Tokenizer::clip("!").unwrap().encode("wow!!").unwrap().ids);
    assert_eq!(ids[..6], [49406, 2781, 0, 0, EOS, 0]);
    assert!(ids[6..].iter().all(|&id| id == 0));
    // The map overrules the configuration, but not one that lists its added tokens.
    let config = json!({"added_tokens_decoder": {"0": {"content": "!"}, "49407": {"content": "<|endoftext|>"}}});
    let config = serde_json::to_vec(&config).unwrap();
    let tokenizer = Tokenizer::from_bytes(&vocab, &merges, Some(&config), Some(&map)).unwrap();
    assert_eq!(tokenizer.encode("wow!").unwrap().ids[..5], [49406, 2781, 0, EOS, EOS]);
    // Without both files, the pad token is CLIP's.
    let tokenizer = Tokenizer::from_bytes(&vocab, &merges, None, None).unwrap();
    assert_eq!(tokenizer.encode("wow!").unwrap().ids[..5], [49406, 2781, 256, EOS, EOS]);
}

#[test]
fn length_comes_from_the_configuration() {
    let folder = clip_folder();
    let config = folder.path().join("tokenizer_config.json");
    for (written, length) in [("16", 16), ("1000000000000000019884624838656", 77), ("null", 77)] {
        fs::write(&config, format!("{{\"model_max_length\": {written}}}")).unwrap();
        assert_eq!(Tokenizer::load(folder.path()).unwrap().encode("cat").unwrap().ids.len(), length);
    }
    for written in ["0", "2", "18446744073709551615"] {
        fs::write(&config, format!("{{\"model_max_length\": {written}}}")).unwrap();
        let error = Tokenizer::load(folder.path()).unwrap_err();
        assert!(error.to_string().contains("tokenizer_config.json"), "{error}");
    }
}

#[test]
fn tokenizer_json_alone_is_enough() {
    let folder = clip_folder();
    let path = |name: &str| folder.path().join(name);
    let prompt = "A CAT, 2 dogs & \u{732b}\u{732b}<|endoftext|>!";
    let expected = Tokenizer::load(folder.path()).unwrap().encode(prompt).unwrap();
    let vocab: Value = serde_json::from_slice(&fs::read(path("vocab.json")).unwrap()).unwrap();
    let merges = fs::read_to_string(path("merges.txt")).unwrap();
    let merges: Vec<&str> = merges.trim().lines().skip(1).collect();
    let pairs: Vec<Vec<&str>> = merges.iter().map(|merge| merge.split(' ').collect()).collect();
    let added = json!([{"id": 49407, "content": "<|endoftext|>"}]);
    fs::remove_file(path("vocab.json")).unwrap();
    for merges in [json!(merges), json!(pairs)] {
        let file = json!({"added_tokens": added, "model": {"type": "BPE", "vocab": vocab, "merges": merges}});
        fs::write(path("tokenizer.json"), serde_json::to_vec(&file).unwrap()).unwrap();
        assert_eq!(Tokenizer::load(folder.path()).unwrap().encode(prompt).unwrap(), expected);
    }
}

#[test]
fn added_tokens_have_their_own_ids() {
    let folder = clip_folder();
    fs::write(folder.path().join("added_tokens.json"), "{\"<cat-toy>\": 49408}").unwrap();
    let tokenizer = Tokenizer::load(folder.path()).unwrap();
    assert_eq!(tokenizer.encode("a <cat-toy>").unwrap().ids[..4], [49406, 320, 49408, EOS]);
    assert_eq!(tokenizer.vocab_size(), 49409);
}

/// diffusers' `maybe_convert_prompt`: the first token of an embedding with several vectors stands for all.
#[test]
fn tokens_of_several_vectors_are_written_out() {
    let folder = clip_folder();
    let added = "{\"<cat>\": 49408, \"<cat>_1\": 49409, \"<cat>_2\": 49410, \"<dog>\": 49411, \"<dog>_2\": 49412}";
    fs::write(folder.path().join("added_tokens.json"), added).unwrap();
    let tokenizer = Tokenizer::load(folder.path()).unwrap();
    let ids = |prompt: &str| tokenizer.encode(prompt).unwrap().ids;
    assert_eq!(ids("a <cat>")[..6], [49406, 320, 49408, 49409, 49410, EOS]);
    assert_eq!(ids("<cat> <dog>")[..6], [49406, 49408, 49409, 49410, 49411, EOS]);
    // If the further tokens are in the prompt already, nothing is added.
    assert_eq!(ids("<cat> <cat>_1")[..4], [49406, 49408, 49409, EOS]);
}

#[test]
fn malformed_files_are_named() {
    let broken: [(&str, &[u8]); 11] = [
        ("vocab.json", b"{"),
        ("vocab.json", b"[]"),
        ("vocab.json", b"{\"a\": -1}"),
        ("merges.txt", b"#version\ni n\nth\n"),
        ("merges.txt", b"#version\ni \xff\n"),
        ("merges.txt", b"#version\nverylongtokenthatnobodyhas andanotheroneofthem\n"),
        // Both parts are tokens, but their concatenation is longer than every token.
        ("merges.txt", b"#version\n<|startoftext|> <|startoftext|>\n"),
        ("tokenizer_config.json", b"3"),
        ("tokenizer_config.json", b"{\"added_tokens_decoder\": {\"x\": 1}}"),
        ("special_tokens_map.json", b"{\"pad_token\": \"<pad>\"}"),
        ("added_tokens.json", b"[1]"),
    ];
    for (name, bytes) in broken {
        let folder = clip_folder();
        fs::write(folder.path().join(name), bytes).unwrap();
        match Tokenizer::load(folder.path()) {
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
                assert_eq!(*error.subject(), Subject::File(folder.path().join(name)), "{error}");
                assert!(error.advice().is_some(), "{error}");
            }
            Ok(_) => panic!("{name} was taken"),
        }
    }
    let empty = tempfile::tempdir().unwrap();
    let error = Tokenizer::load(empty.path()).unwrap_err();
    assert!(error.to_string().contains("vocab.json and merges.txt"), "{error}");
    fs::write(empty.path().join("tokenizer.json"), "{\"model\": {\"type\": \"Unigram\", \"vocab\": []}}").unwrap();
    let error = Tokenizer::load(empty.path()).unwrap_err();
    assert!(error.to_string().contains("byte-pair"), "{error}");
}
