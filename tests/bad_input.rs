//! Damaged checkpoints always give an error that names the file, never a panic or a picture.

mod support;

use respodiff::engine::Engine;
use respodiff::weights::Source;
use respodiff::{Device, Error};
use std::fs;
use std::path::{Path, PathBuf};
use support::copy;

fn open(folder: &Path) -> Result<Engine, Error> {
    Engine::open(&Source::folder(folder)?, Device::cpu())
}

/// Opens the checkpoint, and expects an error of one line that contains all of `words`.
fn refused(folder: &Path, words: &[&str]) {
    let error = open(folder).err().expect("refused").to_string();
    assert!(!error.contains('\n'), "{error}");
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";

/// The smallest file of the checkpoint, so that many versions of it can be tried.
fn file_to_damage(folder: &Path) -> (PathBuf, Vec<u8>, usize) {
    let file = folder.join(UNET);
    let whole = fs::read(&file).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    (file, whole, header)
}

#[test]
fn truncated_weights() {
    let folder = copy("sd1");
    let (file, whole, header) = file_to_damage(folder.path());
    let spread = (0..40).map(|i| whole.len() * i / 40);
    for len in (0..12).chain(header..header + 12).chain(whole.len() - 5..whole.len()).chain(spread) {
        fs::write(&file, &whole[..len]).unwrap();
        refused(folder.path(), &[UNET, "download"]);
    }
    fs::write(&file, [&whole[..], &[0]].concat()).unwrap();
    refused(folder.path(), &[UNET, "download"]);
    fs::write(&file, &whole).unwrap();
    assert!(open(folder.path()).is_ok());
}

#[test]
fn corrupt_headers() {
    let folder = copy("sd1");
    let (file, whole, header) = file_to_damage(folder.path());
    for bit in 0..64 {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(&file, &bytes).unwrap();
        refused(folder.path(), &[UNET]);
    }
    for position in (8..header + 8).step_by(header / 150) {
        let mut bytes = whole.clone();
        bytes[position] ^= 0x15;
        fs::write(&file, &bytes).unwrap();
        // A flip in a name that is not read, or in white space, may be harmless; a panic never is.
        let _ = open(folder.path());
    }
}

/// Networks are loaded in parallel, yet of several problems the same one is always reported.
#[test]
fn the_first_of_several_problems() {
    let folder = copy("sdxl");
    for file in [
        "vae/diffusion_pytorch_model.safetensors",
        UNET,
        "text_encoder_2/model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer_2/vocab.json",
        "tokenizer/vocab.json",
        // Configurations are read before everything else.
        "scheduler/scheduler_config.json",
    ] {
        fs::write(folder.path().join(file), "damaged").unwrap();
        (0..10).for_each(|_| refused(folder.path(), &[file]));
    }
}

/// A text encoder whose tensors are there under both of their names. If two of them differ, nothing says which one is
/// meant, and the same pair is always reported.
#[test]
fn tensors_under_two_names() {
    use safetensors::SafeTensors;
    let folder = copy("sd1");
    let file = folder.path().join("text_encoder/model.safetensors");
    let whole = fs::read(&file).unwrap();
    let tensors = SafeTensors::deserialize(&whole).unwrap();
    let short = |name: &str| name.replace("text_model.", "");
    let both = || tensors.iter().flat_map(|(name, view)| [(short(name), view.clone()), (name.into(), view)]);
    // Equal tensors under both names do no harm.
    fs::write(&file, safetensors::serialize(both(), None).unwrap()).unwrap();
    assert!(open(folder.path()).is_ok());
    let first = tensors.names().into_iter().min().unwrap();
    let other = tensors.tensor(first).unwrap();
    let negated: Vec<u8> =
        other.data().iter().enumerate().map(|(i, b)| if i % 2 == 1 { b ^ 0x80 } else { *b }).collect();
    let negated = safetensors::tensor::TensorView::new(other.dtype(), other.shape().to_vec(), &negated).unwrap();
    let differ = both().map(|(name, view)| if name == first { (name, negated.clone()) } else { (name, view) });
    fs::write(&file, safetensors::serialize(differ, None).unwrap()).unwrap();
    (0..10).for_each(|_| refused(folder.path(), &["text_encoder", &format!("`{first}` is there a second time")]));
}

/// The file with a changed header and the same numbers.
fn with_header(whole: &[u8], header: usize, change: impl FnOnce(&mut String)) -> Vec<u8> {
    let mut text = String::from_utf8(whole[8..8 + header].to_vec()).unwrap();
    change(&mut text);
    [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &whole[8 + header..]].concat()
}

#[test]
fn tensors_that_are_not_what_they_should_be() {
    let folder = copy("sd1");
    let (file, whole, header) = file_to_damage(folder.path());
    for (number, word) in [(0x7e00u16, "NaN"), (0x7c00, "inf"), (0xfc00, "-inf")] {
        let mut bytes = whole.clone();
        let end = bytes.len();
        bytes[end - 2..].copy_from_slice(&number.to_le_bytes());
        fs::write(&file, &bytes).unwrap();
        refused(folder.path(), &[UNET, word, "tensor `"]);
    }
    let name = "\"conv_in.bias\"";
    for (word, change) in [
        ("I16", Box::new(|t: &mut String| *t = t.replacen("\"F16\"", "\"I16\"", 1)) as Box<dyn Fn(&mut String)>),
        ("missing", Box::new(|t: &mut String| *t = t.replace(name, "\"conv_in.bios\""))),
        ("", Box::new(|t: &mut String| *t = t.replace(name, "\"conv_in.weight\""))),
    ] {
        fs::write(&file, with_header(&whole, header, change)).unwrap();
        refused(folder.path(), &[UNET, word]);
    }
    // A bias of [32] is declared as [16, 2]: as many numbers in another shape.
    let reshaped = with_header(&whole, header, |t| {
        let at = t.find(name).unwrap();
        let shape = at + t[at..].find("\"shape\":[").unwrap() + 9;
        let end = shape + t[shape..].find(']').unwrap();
        let len: usize = t[shape..end].parse().unwrap();
        t.replace_range(shape..end, &format!("{},2", len / 2));
    });
    fs::write(&file, reshaped).unwrap();
    refused(folder.path(), &[UNET, "conv_in.bias", "shape"]);
}

#[test]
fn tokenizers_of_another_model() {
    let folder = copy("sd1");
    let vocabulary = folder.path().join("tokenizer/vocab.json");
    let mut words: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&fs::read(&vocabulary).unwrap()).unwrap();
    words.insert("toomuch</w>".into(), 100_000.into());
    fs::write(&vocabulary, serde_json::to_vec(&words).unwrap()).unwrap();
    refused(folder.path(), &["tokenizer", "100001"]);
    fs::write(&vocabulary, "{\"a\": ").unwrap();
    refused(folder.path(), &["vocab.json"]);
}

/// Every size in every configuration is set to absurd values, which are refused by name, immediately, and without a
/// large allocation.
#[test]
fn absurd_sizes() {
    use serde_json::{Value, json};
    let absurd =
        [json!(0), json!(-1), json!(1_000_000_000_000u64), json!(u64::MAX), json!(2.5), json!("64"), json!([])];
    let fields = [
        (
            "text_encoder",
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads \
            max_position_embeddings",
        ),
        (
            "unet",
            "in_channels out_channels norm_num_groups cross_attention_dim layers_per_block attention_head_dim \
            block_out_channels sample_size transformer_layers_per_block time_embedding_dim",
        ),
        ("vae", "in_channels out_channels latent_channels norm_num_groups layers_per_block block_out_channels"),
    ];
    let mut tried = 0;
    for (component, names) in fields {
        let folder = copy("sd1");
        let path = folder.path().join(component).join("config.json");
        let config: serde_json::Map<String, Value> = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        for name in names.split_whitespace() {
            for value in &absurd {
                let mut config = config.clone();
                config.insert(name.into(), value.clone());
                fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
                let error = open(folder.path()).err().unwrap_or_else(|| panic!("{component} {name} {value}: taken"));
                let error = error.to_string();
                assert!(error.contains(name) && error.contains("config.json"), "{component} {name} {value}: {error}");
                tried += 1;
            }
        }
    }
    assert!(tried > 100);
}

#[test]
fn missing_files() {
    for (name, word) in [
        ("unet/config.json", "unet/config.json"),
        (UNET, "no diffusion_pytorch_model.safetensors"),
        ("text_encoder/model.safetensors", "no model.safetensors"),
        ("scheduler/scheduler_config.json", "scheduler_config.json"),
        ("tokenizer/merges.txt", "tokenizer"),
    ] {
        let folder = copy("sd1");
        fs::remove_file(folder.path().join(name)).unwrap();
        refused(folder.path(), &[word]);
    }
    let folder = copy("sd2");
    fs::remove_file(folder.path().join("unet/diffusion_pytorch_model.fp16-00002-of-00003.safetensors")).unwrap();
    refused(folder.path(), &["00002-of-00003", "missing"]);
    assert!(Source::folder(PathBuf::from("/nowhere/at/all")).is_err());
}

#[test]
fn shard_names_stay_in_the_folder() {
    let folder = copy("sd2");
    let index = folder.path().join("unet/diffusion_pytorch_model.safetensors.index.fp16.json");
    let text = fs::read_to_string(&index).unwrap().replace("diffusion_pytorch_model.fp16-00002", "../../etc/x");
    fs::write(index, text).unwrap();
    refused(folder.path(), &["not the name of a shard"]);
}

#[test]
fn configs_of_another_model() {
    for (file, from, to, word) in [
        ("unet/config.json", "\"cross_attention_dim\": 32", "\"cross_attention_dim\": 40", "text"),
        ("unet/config.json", "\"layers_per_block\": 2", "\"layers_per_block\": 3", "missing"),
        ("unet/config.json", "\"layers_per_block\": 2", "\"layers_per_block\": 0", "layers_per_block"),
        ("unet/config.json", "\"act_fn\": \"silu\"", "\"act_fn\": \"mish\"", "act_fn"),
        ("unet/config.json", "UNet2DConditionModel", "UNet3DConditionModel", "UNet3DConditionModel"),
        ("scheduler/scheduler_config.json", "scaled_linear", "quadratic", "quadratic"),
        ("vae/config.json", "AutoencoderKL", "AutoencoderDC", "AutoencoderDC"),
        ("vae/config.json", "AutoencoderKL", "AutoencoderTiny", "act_fn"),
        ("unet/config.json", "{", "{{", "unet/config.json"),
    ] {
        let folder = copy("sd1");
        let path = folder.path().join(file);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{file} has no {from}");
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
        refused(folder.path(), &[word]);
    }
}

/// Parts of SDXL that do not belong together, or that are missing.
#[test]
fn other_kinds_of_sdxl() {
    use std::fs::{remove_dir_all, rename};
    let refused_after = |change: &dyn Fn(&Path), words: &[&str]| {
        let folder = copy("sdxl");
        change(folder.path());
        refused(folder.path(), words);
    };
    let replaced = |folder: &Path, file: &str, from: &str, to: &str| {
        let text = fs::read_to_string(folder.join(file)).unwrap();
        assert!(text.contains(from), "{file} has no {from}");
        fs::write(folder.join(file), text.replacen(from, to, 1)).unwrap();
    };
    refused_after(&|f| remove_dir_all(f.join("text_encoder")).unwrap(), &["refiner", "base model"]);
    let index = "model_index.json";
    refused_after(
        &|f| replaced(f, index, "\"image_encoder\"", "\"requires_aesthetics_score\": true, \"image_encoder\""),
        &["refiner"],
    );
    refused_after(&|f| replaced(f, index, "{", "{{"), &[index, "JSON"]);
    refused_after(&|f| remove_dir_all(f.join("text_encoder_2")).unwrap(), &["unet", "no text_encoder_2"]);
    refused_after(&|f| remove_dir_all(f.join("tokenizer_2")).unwrap(), &["tokenizer_2", "vocab.json"]);
    // Stable Diffusion's UNet, and SDXL's beside encoders of other widths.
    let config = "unet/config.json";
    refused_after(&|f| replaced(f, config, "\"text_time\"", "null"), &[config, "no pooled prompt", "text_encoder_2"]);
    let width = "\"cross_attention_dim\": 64";
    refused_after(&|f| replaced(f, config, width, "\"cross_attention_dim\": 32"), &[config, "width 32", "give 64"]);
    let width = "\"projection_class_embeddings_input_dim\": 88";
    let other = "\"projection_class_embeddings_input_dim\": 87";
    refused_after(&|f| replaced(f, config, width, other), &[config, "width 39", "project to 40"]);
    let twice = |f: &Path| {
        remove_dir_all(f.join("text_encoder_2")).unwrap();
        rename(f.join("text_encoder"), f.join("text_encoder_2")).unwrap();
        let original = support::golden().join("checkpoints/sdxl/text_encoder");
        fs::create_dir(f.join("text_encoder")).unwrap();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(original.join(file), f.join("text_encoder").join(file)).unwrap();
        }
    };
    refused_after(&twice, &[config, "have no projection"]);
    let tokens = "\"max_position_embeddings\": 77";
    let file = "text_encoder_2/config.json";
    refused_after(
        &|f| replaced(f, file, tokens, "\"max_position_embeddings\": 78"),
        &["text_encoder_2/model.safetensors", "[78, 32]"],
    );
}
