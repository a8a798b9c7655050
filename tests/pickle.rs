//! Import of `torch.save` files made by torch (`tests/golden/pickles.py`).

mod support;

use respodiff::concept::{Concept, import};
use std::path::PathBuf;

const CHANNELS: usize = 128;

fn file(name: &str) -> PathBuf {
    support::golden().join("pickles").join(name)
}

fn read(name: &str, concept: &str, column: Option<usize>) -> Concept {
    import(&file(name), concept, column, CHANNELS).unwrap()
}

#[test]
fn layouts_agree() {
    // "old.pth" has the format before PyTorch 1.6, which published files such as FID's Inception still have.
    let old = read("old.pth", "a man", None);
    let (plain, strided) = (read("official.pth", "a man", None), read("strided.pth", "a man", None));
    assert_eq!(plain.ram.parameters, strided.ram.parameters);
    assert_eq!(plain.sam.as_ref().unwrap().parameters, strided.sam.unwrap().parameters);
    assert_eq!(plain.ram.parameters, old.ram.parameters);
    assert_eq!(plain.sam.as_ref().unwrap().parameters, old.sam.unwrap().parameters);
    assert_eq!(plain.ram.parameters, read("official.pth", "anything", Some(1)).ram.parameters);
    assert_ne!(plain.ram.parameters, read("official.pth", "a woman", None).ram.parameters);
    let first = read("official.pth", "a woman", None);
    assert_eq!((first.ram.shape().c, first.ram.shape().h, first.ram.shape().w), (CHANNELS, 2, 2));
    let sdisc = read("sdisc.pth", "female", None);
    assert!(sdisc.sam.is_none() && sdisc.ram.parameters.iter().all(|x| x.is_finite()));
}

/// What trainers leave beside the weights is passed over: counters, callbacks, the optimizer's state.
#[test]
fn checkpoints_of_trainers() {
    assert_eq!(
        read("lightning.ckpt", "a woman", None).ram.parameters,
        read("official.pth", "a woman", None).ram.parameters
    );
}

/// A part of a diffusers folder in either format of `torch.save`: the same numbers as in safetensors.
#[test]
fn parts_of_folders() {
    let source = |folder: &tempfile::TempDir| respodiff::Source::folder(folder.path()).unwrap();
    let folder = support::copy("sd1");
    let place = folder.path().join("text_encoder");
    let before = source(&folder).tensors("text_encoder").unwrap();
    let names: Vec<(String, Vec<usize>)> = before
        .entries()
        .map(|(name, shape)| (name.to_string(), shape.to_vec()))
        .filter(|(name, _)| !name.ends_with("position_ids"))
        .collect();
    assert!(names.len() > 40);
    std::fs::remove_file(place.join("model.safetensors")).unwrap();
    for name in ["text_encoder.bin", "text_encoder_old.bin"] {
        std::fs::copy(file(name), place.join("pytorch_model.bin")).unwrap();
        let after = source(&folder).tensors("text_encoder").unwrap();
        for (name, shape) in &names {
            assert_eq!(after.read(name, &[shape]).unwrap(), before.read(name, &[shape]).unwrap(), "{name}");
        }
        assert!(respodiff::Engine::open(&source(&folder), respodiff::Device::cpu()).is_ok());
        let whole = std::fs::read(file(name)).unwrap();
        for len in (0..whole.len()).step_by(whole.len() / 40) {
            std::fs::write(place.join("pytorch_model.bin"), &whole[..len]).unwrap();
            let error = source(&folder).tensors("text_encoder").err().expect("refused").to_string();
            assert!(error.contains("pytorch_model.bin") && !error.contains('\n'), "{error}");
        }
    }
}

#[test]
fn values_are_torchs() {
    // Column 0 of the matrix from its top. Row 4 r + p is pixel p of channel r.
    let bytes = std::fs::read(file("expected.json")).unwrap();
    let expected: Vec<f32> = serde_json::from_slice(&bytes).unwrap();
    let ram = read("official.pth", "a woman", None).ram.parameters;
    for (i, truth) in expected.iter().enumerate() {
        let (channel, pixel) = (i / 4, i % 4);
        assert_eq!(ram[pixel * CHANNELS + channel], *truth, "{i}");
    }
}

#[test]
fn unsuitable_files_and_names_are_refused() {
    let refused = |name: &str, concept: &str, column, channels, words: &[&str]| {
        let error = import(&file(name), concept, column, channels).expect_err("refused").to_string();
        assert!(words.iter().all(|w| error.contains(w)) && !error.contains('\n'), "{error}");
    };
    refused("malicious.pth", "a woman", None, CHANNELS, &["system", "nothing was run"]);
    assert!(!std::path::Path::new("/tmp/respodiff-was-tricked").exists());
    refused("expected.json", "a woman", None, CHANNELS, &["torch.save", "save it anew"]);
    refused("official.pth", "a dog", None, CHANNELS, &["a dog", "column"]);
    refused("official.pth", "a woman", Some(10), CHANNELS, &["10 columns"]);
    refused("official.pth", "a woman", None, 1280, &["1280", "trained on"]);
    refused("missing.pth", "a woman", None, CHANNELS, &["missing.pth"]);
}

#[test]
fn damaged_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.pth");
    for name in ["old.pth", "official.pth"] {
        let whole = std::fs::read(file(name)).unwrap();
        for len in (0..whole.len()).step_by(whole.len() / 60) {
            std::fs::write(&path, &whole[..len]).unwrap();
            assert!(import(&path, "a woman", None, CHANNELS).is_err(), "{name} {len}");
        }
        // Any byte of the pickle may be damaged: this gives an error or other numbers, but never a panic or a huge
        // allocation.
        let start = whole.windows(8).position(|w| w == b"data.pkl").unwrap_or(0);
        for at in start..(start + 500).min(whole.len()) {
            for flip in [0x01, 0x40, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] ^= flip;
                std::fs::write(&path, &bytes).unwrap();
                let _ = import(&path, "a woman", None, CHANNELS);
            }
        }
    }
}

/// Imports a concept from a `torch.save` file with this pickle and one storage of four numbers.
fn program(pickle: &[u8]) -> Result<Concept, respodiff::Error> {
    use std::io::Write;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.pth");
    let mut archive = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [("x/data.pkl", pickle), ("x/data/0", &[0; 16])] {
        archive.start_file(name, stored).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap();
    import(&path, "a woman", Some(0), CHANNELS)
}

/// The instructions for a tensor `[rows, 1]` on the storage, all rows of which are its first number.
fn tensor(rows: u32) -> Vec<u8> {
    let storage = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n\
                    X\x01\0\0\x000X\x03\0\0\0cpuK\x04tQK\0";
    let rest = b"K\x01\x86K\0K\0\x86\x89ccollections\nOrderedDict\n)RtR";
    [&storage[..], b"J", &rows.to_le_bytes(), rest].concat()
}

/// The instructions for a dictionary that holds the same value `count` times.
fn dictionary(count: usize, value: &[u8]) -> Vec<u8> {
    let entries = (0..count).flat_map(|i| [b"X\x04\0\0\0", format!("{i:04}").as_bytes(), value].concat());
    b"}(".iter().copied().chain(entries).chain(*b"u").collect()
}

/// The instruction for a text of this length.
fn text(len: u32) -> Vec<u8> {
    [b"X", &len.to_le_bytes()[..], &vec![b'a'; len as usize]].concat()
}

/// A compressed member would grow when it is read; torch never compresses.
#[test]
fn compressed_archives_are_refused() {
    use std::io::{Read, Write};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.pth");
    let mut whole = zip::ZipArchive::new(std::fs::File::open(file("official.pth")).unwrap()).unwrap();
    let mut archive = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
    let deflated = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
    for i in 0..whole.len() {
        let mut member = whole.by_index(i).unwrap();
        let mut bytes = Vec::new();
        member.read_to_end(&mut bytes).unwrap();
        archive.start_file(member.name().unwrap(), deflated).unwrap();
        archive.write_all(&bytes).unwrap();
    }
    archive.finish().unwrap();
    let error = import(&path, "a woman", None, CHANNELS).expect_err("refused").to_string();
    assert!(error.contains("compressed"), "{error}");
}

#[test]
fn pickles_made_to_harm_are_refused() {
    // The parts of the programs below are valid: they give SDisc's layout with one column.
    assert!(program(&[&tensor(4 * CHANNELS as u32)[..], b"."].concat()).is_ok());
    let nested = [
        &tensor(1)[..],
        b"q\x00",
        &dictionary(900, b"h\x00"),
        b"q\x01",
        &dictionary(900, b"h\x01"),
        b"q\x02",
        &dictionary(900, b"h\x02"),
        b".",
    ];
    let doubling: Vec<u8> =
        (0..60).flat_map(|i| [b"]q", &[i + 1][..], b"(h", &[i], b"h", &[i], b"e"].concat()).collect();
    for (what, pickle, word) in [
        ("a tensor of 2^31 - 1 repeated numbers", [&tensor(i32::MAX as u32)[..], b"."].concat(), "too large"),
        ("a negative size", [&tensor(u32::MAX)[..], b"."].concat(), "shape"),
        ("gigabytes of repeated numbers", [&dictionary(300, &tensor(1 << 27))[..], b"."].concat(), "too large"),
        ("three levels of shared dictionaries", nested.concat(), "too many"),
        ("a dictionary in itself", b"}q\0X\0\0\0\0h\0s.".to_vec(), "neither"),
        ("a list in itself", b"]q\0h\0a.".to_vec(), "neither"),
        ("a list doubled sixty times", [b"]q\0", &doubling[..], b"."].concat(), "neither"),
        ("deep tuples", [b")", &[0x85; 39_900][..], b"."].concat(), "neither"),
        ("deep lists", [&[b']'; 19_950][..], &[b'a'; 19_949], b"."].concat(), "neither"),
        ("deep dictionaries", [&b"}K\0".repeat(13_200)[..], b"}", &[b's'; 13_200], b"."].concat(), "neither"),
        ("deep tuples at an error", [b")", &[0x85; 39_900][..], b"R"].concat(), "empty stack"),
        ("endless tuples", [b")", &[0x85; 2_100_000][..], b"."].concat(), "too long"),
        ("a key without end", [b"}", &text(2_000)[..], &tensor(1), b"s."].concat(), "2000 bytes"),
        ("a name without end", [b"c", &[b'a'; 5_000][..], b"\nb\n."].concat(), "aaa…"),
        ("a memo it has not", b"h\x07.".to_vec(), "memo"),
        ("an empty stack", b".".to_vec(), "empty stack"),
        ("a text beyond the end", b"X\xff\xff\xff\xffa.".to_vec(), "in the middle"),
        ("eval", b"cbuiltins\neval\n(X\x01\0\0\x001tR.".to_vec(), "builtins.eval"),
        ("a class by the stack", b"X\x02\0\0\0osX\x06\0\0\0system\x93.".to_vec(), "os.system"),
        ("a call of a text", b"X\x01\0\0\0a)R.".to_vec(), "nothing was run"),
        ("a storage elsewhere", b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x04\0\0\0../0tQ.".to_vec(), "../0"),
    ] {
        let error = program(&pickle).expect_err(what).to_string();
        assert!(error.contains(word) && !error.contains('\n'), "{what}: {error}");
    }
}
