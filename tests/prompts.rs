//! Prompts: syntaxes, chunks, learnt words. The truth is in `golden/prompts.py`, which writes down what A1111 and
//! ComfyUI do; `cli/probe.rs` compares the hidden states that come of it.

mod support;

use respodiff::adapters::Embedding;
use respodiff::models::prompt::Part;
use respodiff::models::tokenizer::Tokenizer;
use respodiff::prompts::{PromptSyntax, PromptText, lora_tags};
use respodiff::{
    Device, Engine, EngineOptions, Error, ErrorKind, Image, Output, Request, Sampler, SessionOptions, Size, Source,
    Subject,
};
use serde_json::Value;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use support::{cases, golden, relative_l2};

fn checkpoint(name: &str) -> PathBuf {
    golden().join("checkpoints").join(name)
}

fn engine(name: &str) -> Engine {
    Engine::open(&Source::folder(checkpoint(name)).unwrap(), Device::cpu()).unwrap()
}

fn a1111(text: impl Into<String>) -> PromptText {
    PromptText::new(text).syntax(PromptSyntax::A1111)
}

fn generate(engine: &Engine, options: SessionOptions, images: &[Image]) -> Output {
    let request = Request::new(images.to_vec()).steps(3).sampler("DDIM".parse().unwrap());
    engine.session(options).unwrap().generate(&request, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn refused(engine: &Engine, prompt: PromptText) -> Error {
    engine.encode(prompt.clone()).err().unwrap_or_else(|| panic!("{prompt:?} is not refused"))
}

#[test]
fn tokens_and_weights_are_those_of_a1111_and_comfyui() {
    let tokenizer = Tokenizer::load(&checkpoint("sd1").join("tokenizer")).unwrap();
    let cases: Value = serde_json::from_slice(&std::fs::read(golden().join("cases/prompts.json")).unwrap()).unwrap();
    let (mut split, mut weighted) = (0, 0);
    for case in cases.as_array().unwrap() {
        let (syntax, prompt) = (case["syntax"].as_str().unwrap(), case["prompt"].as_str().unwrap());
        let ours = tokenizer.chunks(prompt, syntax.parse().unwrap()).unwrap_or_else(|e| panic!("{prompt:?}: {e}"));
        let ids: Vec<Vec<i64>> = serde_json::from_value(case["ids"].clone()).unwrap();
        let runs: Vec<Vec<(f64, usize)>> = serde_json::from_value(case["weights"].clone()).unwrap();
        assert_eq!(ours.chunks.len(), ids.len(), "{syntax}: {prompt:?}");
        split += usize::from(ids.len() > 1);
        for (chunk, (ids, runs)) in ours.chunks.iter().zip(ids.iter().zip(&runs)) {
            // The vocabulary has 602 tokens, of which the last two are the start and the end; sd1 pads with the end.
            let mut framed = [&[600], &ids[..], &[601]].concat();
            framed.resize(77, 601);
            assert_eq!(chunk.ids, framed, "{syntax}: {prompt:?}");
            let weights = runs.iter().flat_map(|(weight, n)| vec![*weight as f32; *n]);
            let mut weights: Vec<f32> = std::iter::once(1.0).chain(weights).collect();
            weights.resize(77, 1.0);
            weighted += usize::from(weights.iter().any(|weight| *weight != 1.0));
            assert_eq!(chunk.weights, weights, "{syntax}: {prompt:?}");
        }
    }
    assert!(split > 20 && weighted > 30, "{split} prompts of several chunks, {weighted} weighted chunks");
}

/// Examples in the documentation of A1111's `prompt_parser`.
#[test]
fn what_changes_from_step_to_step_is_refused() {
    let parts = |prompt: &str| PromptSyntax::A1111.parts(prompt);
    for prompt in [
        "a [b:3]",
        "a [b: 3]",
        "a [[[b]]:2]",
        "[(a:2):3]",
        "a [b : c : 1] d",
        "a[b:[c:d:2]:1]e",
        "a [b:.5] c",
        "((a][:b:c [d:3]",
        "[a|(b:1.1)]",
        "[a|b|c] d",
        "[|a]",
        "[fantasy:cyberpunk:-5]",
        "[a::0.5]",
        "x (a [b:c:0.5]:1.2)",
        "[:a:1e1]",
    ] {
        let error = parts(prompt).expect_err(prompt);
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{prompt}: {error}");
        assert!(error.to_string().contains("from step to step") && error.advice().is_some(), "{error}");
    }
    // These are text there as well: nothing closes, no number, too many colons, a bar that the grammar does not know,
    // escaped brackets.
    for prompt in [
        "a [unbalanced",
        "[a:b]",
        "[a:b:c:0.5]",
        "[a:b:0.5",
        "a | b [c:d:0.5]",
        "[(a:b:0.5]",
        "\\[a:b:0.5\\]",
        "[a|b:c]",
        "[a:0.5 ]",
        "[a:inf]",
    ] {
        assert!(parts(prompt).is_ok(), "{prompt}");
    }
    for prompt in ["a cat AND a dog", "a AND", "AND"] {
        let error = parts(prompt).expect_err(prompt);
        assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("`AND`"), "{error}");
    }
    assert!(parts("SANDY, ANDROID, and").is_ok());
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let engine = engine("sd1");
    for (prompt, word) in [
        ("(a:1.2.3)", "1.2.3"),
        ("(a:.)", "`.`"),
        ("(a:2000)", "weight of 2000"),
        ("(a:-1000.5)", "weight of -1000.5"),
        (&*format!("{}a{}", "(".repeat(65), ")".repeat(65)), "nested"),
        (&*"[".repeat(100_000), "nested"),
        (&*"the ".repeat(75 * 64 + 1), "65 chunks"),
        ("a <lora:toy:0.8>", "<lora:toy>"),
        ("a <lora:toy:x>", "`<lora:toy:x>`"),
        ("a <hypernet:toy:1>", "hypernet"),
    ] {
        let error = refused(&engine, a1111(prompt));
        assert!(error.to_string().contains(word) && error.advice().is_some(), "{word}: {error}");
    }
    for (prompt, word) in [("(a:nan)", "NaN"), ("(a:inf)", "inf"), ("(a:1e9)", "1000000000"), ("embedding:toy", "toy")]
    {
        let error = refused(&engine, PromptText::new(prompt).syntax(PromptSyntax::Comfy));
        assert!(error.to_string().contains(word), "{word}: {error}");
    }
    let deep = format!("{}a", "(b ".repeat(100_000) + &")".repeat(100_000));
    assert!(refused(&engine, PromptText::new(deep).syntax(PromptSyntax::Comfy)).to_string().contains("nested"));
    for skip in [0, 4, usize::MAX] {
        let error = refused(&engine, PromptText::new("a").clip_skip(skip));
        assert!(error.subject() == &Subject::Field("clip_skip") && error.to_string().contains("3 layers"), "{error}");
    }
    let error = refused(&engine, PromptText::new("a").second(Some("b".into())));
    assert_eq!((error.kind(), error.subject()), (ErrorKind::Invalid, &Subject::Field("prompt_2")));
    assert!("x".parse::<PromptSyntax>().unwrap_err().to_string().contains("a1111"));
}

#[test]
fn lora_tags_are_taken_out() {
    let (text, tags) = lora_tags("a <lora:my toy:0.8>, b <lyco:x> <3 < b:c> <a:> <:> x<").unwrap();
    assert_eq!(text, "a , b  <3 < b:c> <a:> <:> x<");
    let named: Vec<(&str, f32)> = tags.iter().map(|tag| (tag.name.as_str(), tag.weight)).collect();
    assert_eq!(named, [("my toy", 0.8), ("x", 1.0)]);
    assert!(lora_tags("<lora:a:nan>").is_err() && lora_tags("<lora:a:1:2>").is_err());
}

#[test]
fn plain_prompts_that_look_weighted_are_noticed() {
    let plain = PromptSyntax::Plain;
    for prompt in ["a (word:1.3)", "((word))", "a <lora:x:1>", "(a b: -.5 )"] {
        assert!(plain.is_suspect(prompt) && !PromptSyntax::Comfy.is_suspect(prompt), "{prompt}");
    }
    for prompt in ["a (word)", "at 12:30", "(a:b)", "(:1.3)", "f(x) = (1)", "[a]", "((a"] {
        assert!(!plain.is_suspect(prompt), "{prompt}");
    }
}

/// No text makes a parser panic or gives a weight that is not finite.
#[test]
fn any_text_is_read_or_refused() {
    let tokenizer = Tokenizer::load(&checkpoint("sd1").join("tokenizer")).unwrap();
    let pieces = [
        "(",
        ")",
        "[",
        "]",
        ":",
        "1.3",
        "-",
        "\\",
        "BREAK",
        "AND",
        " ",
        ",",
        "a",
        "|",
        "<lora:x:1>",
        "<",
        ">",
        "\n",
        "\u{732b}",
        "embedding:",
        "e\u{301}",
        "0.5",
        ".",
        "1e400",
    ];
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize
    };
    let mut read = 0;
    for _ in 0..30_000 {
        let text: String = (0..random() % 24).map(|_| pieces[random() % pieces.len()]).collect();
        for syntax in [PromptSyntax::A1111, PromptSyntax::Comfy] {
            if let Ok(parts) = syntax.parts(&text) {
                let finite = |part: &Part| !matches!(part, Part::Text { weight, .. } if !weight.is_finite());
                assert!(parts.iter().all(finite), "{text:?}");
                read += 1;
            }
            if random() % 50 == 0 {
                let _ = tokenizer.chunks(&text, syntax);
            }
        }
        let _ = (lora_tags(&text), PromptSyntax::Plain.is_suspect(&text));
    }
    assert!(read > 20_000, "only {read} texts were read");
}

/// A prompt of two chunks and a negative prompt of three, which are repeated to six, against calls of the UNet with
/// sequences of different lengths.
#[test]
fn prompts_of_different_lengths_are_as_apart() {
    let case = cases("prompt_apart", 1).remove(0);
    let meta = case.metadata();
    let devices = [
        (Device::cpu(), 1e-4),
        #[cfg(feature = "emulated")]
        (support::kernels(), 2e-2),
    ];
    for (device, limit) in devices {
        let engine = Engine::open(&Source::folder(checkpoint("sd1")).unwrap(), &device).unwrap();
        let image = Image::new(a1111(&meta["prompt"])).negative(a1111(&meta["negative_prompt"])).seed(4).guidance(6.0);
        assert_eq!(engine.chunks(&image, Sampler::Ddim).unwrap(), 6);
        let options = SessionOptions::new(Size::new(56, 40)).chunks(6);
        let error = relative_l2(&generate(&engine, options, &[image]).latents, &case.floats("out.latents"));
        println!("{}: {error:.1e}", device.name());
        assert!(error < limit, "{}: {error:.2e}", device.name());
    }
}

/// The number of chunks follows from the image alone, and with it a picture is the same in every batch.
#[test]
fn a_picture_does_not_depend_on_the_prompts_beside_it() {
    for name in ["sd1", "sdxl"] {
        let engine = engine(name);
        let long = a1111("(the:1.2) ".repeat(80));
        let images = [
            Image::new(long.clone()).seed(1),
            Image::new("a boat").negative(long.clone()).seed(2).guidance(3.0),
            // Without guidance the negative prompt has no effect, not even on the number of chunks.
            Image::new(long).negative(a1111("the ".repeat(150))).seed(3).guidance(1.0),
        ];
        for image in &images {
            assert_eq!(engine.chunks(image, Sampler::Ddim).unwrap(), 2, "{name}");
        }
        let options = SessionOptions::new(Size::new(40, 56)).chunks(2);
        let batch = generate(&engine, options.batch(3), &images);
        for (i, image) in images.iter().enumerate() {
            let alone = generate(&engine, options.guided(i < 2), std::slice::from_ref(image));
            assert_eq!(alone.pictures[0], batch.pictures[i], "{name}, image {i}");
        }
        let mut session = engine.session(options.chunks(1)).unwrap();
        let request = Request::new(images[..1].to_vec()).steps(2);
        let error = session.generate(&request, &mut |_| ControlFlow::Continue(())).unwrap_err();
        assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("2 chunks"), "{error}");
        assert!(engine.session(options.chunks(0)).is_err() && engine.session(options.chunks(65)).is_err());
        let apart = Image::new(a1111("the ".repeat(75 * 7))).negative(a1111("the ".repeat(75 * 11)));
        assert!(engine.chunks(&apart, Sampler::Ddim).unwrap_err().to_string().contains("7 chunks"));
    }
}

fn embedding(file: &str) -> Arc<Embedding> {
    Arc::new(Embedding::open(golden().join("embeddings").join(file)).unwrap())
}

#[test]
fn learnt_words_are_found() {
    let learnt = ["a1111-toy.pt", "learned_embeds.bin"].map(embedding);
    let options = EngineOptions::default().embeddings(learnt.to_vec());
    let engine = Engine::open(&Source::folder(checkpoint("sd1")).unwrap(), options).unwrap();
    let names = |prompt: PromptText| -> Vec<String> {
        engine.encode(prompt).unwrap().embeddings().map(str::to_string).collect()
    };
    // Whole words alone, in any case of their letters; `<style>` has no letter at its ends.
    assert_eq!(names("A1111-TOY, a (boat)".into()), ["a1111-toy"]);
    assert_eq!(names("a1111-toys xa1111-toy a1111".into()), [""; 0]);
    assert_eq!(names("x<style>y".into()), ["<style>"]);
    // The second file has two names, of which one is told.
    assert_eq!(names(a1111("(embedding:a1111-toy:1.2) [LEARNED_embeds]")), ["<style>", "a1111-toy"]);
    let comfy = |text: &str| names(PromptText::new(text).syntax(PromptSyntax::Comfy));
    assert_eq!(comfy("a1111-toy"), [""; 0]);
    assert_eq!(comfy("a (embedding:a1111-toy:1.2), embedding:<style>,"), ["<style>", "a1111-toy"]);
    // Neither syntax divides a learnt word between chunks: with 74 words before it, the next chunk begins with it.
    for word in ["a1111-toy", "embedding:a1111-toy"] {
        let syntax = if word.starts_with('e') { PromptSyntax::Comfy } else { PromptSyntax::A1111 };
        let prompt = |before: usize| PromptText::new("the ".repeat(before) + word).syntax(syntax);
        assert_eq!(engine.encode(prompt(72)).unwrap().chunks(), 1);
        assert_eq!(engine.encode(prompt(73)).unwrap().chunks(), 2);
    }
}

#[test]
fn learnt_words_of_other_models_are_refused() {
    let open = |model: &str, file: &str| {
        let options = EngineOptions::default().embeddings(vec![embedding(file)]);
        Engine::open(&Source::folder(checkpoint(model)).unwrap(), options).map(|_| ())
    };
    assert!(open("sd2", "wide.safetensors").is_ok());
    for (model, file, words) in [
        ("sd1", "wide.safetensors", ["64", "32"]),
        ("sd1", "xl.safetensors", ["32 and 32", "read 32"]),
        ("sdxl", "toy2.safetensors", ["width 32,", "32 and 32"]),
        ("turbo", "xl.safetensors", ["32 and 32", "24 and 40"]),
    ] {
        let error = open(model, file).unwrap_err();
        let text = error.to_string();
        assert!(error.kind() == ErrorKind::Mismatch && words.iter().all(|word| text.contains(word)), "{text}");
        assert!(text.contains(file), "{text}");
    }
}

#[test]
fn files_that_are_no_learnt_words_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let open = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        Embedding::open(&path).expect_err(name)
    };
    let whole = std::fs::read(golden().join("embeddings/xl.safetensors")).unwrap();
    let pickle = std::fs::read(golden().join("embeddings/a1111-toy.pt")).unwrap();
    for end in [0, 7, 40, whole.len() - 1] {
        assert_eq!(open("x.safetensors", &whole[..end]).kind(), ErrorKind::Damaged, "{end}");
    }
    for end in [1, 100, pickle.len() - 30] {
        assert_eq!(open("x.pt", &pickle[..end]).kind(), ErrorKind::Damaged, "{end}");
    }
    assert!(open("x.pt", &[]).to_string().contains("x.pt"));
    let tensor = |named: &[(&str, Vec<usize>, Vec<f32>)]| {
        let views = named.iter().map(|(name, shape, values)| {
            let bytes = bytemuck::cast_slice(values);
            (*name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
        });
        safetensors::serialize(views, None).unwrap()
    };
    for (named, kind) in [
        (vec![("emb_params", vec![1, 2], vec![1.0, f32::NAN])], ErrorKind::Damaged),
        (vec![("emb_params", vec![0, 2], vec![])], ErrorKind::Unsupported),
        (vec![("emb_params", vec![1, 1, 2], vec![1.0; 2])], ErrorKind::Unsupported),
        (vec![("emb_params", vec![76, 1], vec![1.0; 76])], ErrorKind::Unsupported),
        (vec![("clip_l", vec![2, 1], vec![1.0; 2]), ("clip_g", vec![1, 2], vec![1.0; 2])], ErrorKind::Damaged),
        (vec![("a", vec![1], vec![1.0]), ("b", vec![1], vec![1.0])], ErrorKind::Unsupported),
        (vec![], ErrorKind::Unsupported),
    ] {
        let error = open("x.safetensors", &tensor(&named));
        assert_eq!(error.kind(), kind, "{named:?}: {error}");
    }
    assert_eq!(Embedding::open(folder.path()).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(Embedding::open(folder.path().join("none.pt")).unwrap_err().kind(), ErrorKind::NotFound);
}
