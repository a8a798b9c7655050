//! The two formats of `torch.save`: a zip archive with the pickle and one member for each storage, and before PyTorch
//! 1.6 a row of pickles with the storages behind them.

use super::machine::{Machine, Outcome, Value};
use super::suspect;
use super::tensor::{Found, Search, size};
use crate::{Error, Result};
use std::collections::HashMap;
use std::io::Cursor;
use std::ops::Range;
use std::path::Path;
use zip::CompressionMethod::Stored;

/// The first bytes of a zip archive.
const ZIP: &[u8] = b"PK\x03\x04";
/// The pickle of a magic number with which files in the format before PyTorch 1.6 begin.
const OLD_FORMAT: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";
/// The largest size in bytes of an archive's pickle.
const MAX_PICKLE: usize = 64 << 20;

/// The range of each storage's bytes in the file, by the storage's key.
type Storages = HashMap<String, Range<usize>>;

/// True for a file that begins as those of `torch.save` do. No safetensors file begins so, because its first bytes are
/// the header's length, and no header is that long.
pub(in crate::weights) fn is_pickled(bytes: &[u8]) -> bool {
    // Eight bytes of the old format's magic number are enough.
    bytes.starts_with(ZIP) || bytes.starts_with(&OLD_FORMAT[..4])
}

/// The tensors of a file with these bytes, by their names, and the places of their storages.
///
/// # Errors
/// [`crate::ErrorKind::Damaged`] and [`crate::ErrorKind::Unsupported`].
pub(super) fn read(bytes: &[u8], path: &Path) -> Result<(Found, Storages)> {
    if bytes.starts_with(&OLD_FORMAT[..4]) {
        return old_format(bytes).map_err(|problem| suspect(path, problem));
    }
    let mut archive = zip::ZipArchive::new(Cursor::new(bytes))
        .map_err(|e| Error::damaged(path, format!("not a whole file of torch.save ({e})")).advise("save it anew"))?;
    // Names that cannot be decoded are not from torch.
    let names: Vec<Option<String>> = archive.file_names().map(|name| Some(name.ok()?.into_owned())).collect();
    if names.iter().flatten().any(|name| name.contains("/code/")) {
        return Err(Error::unsupported(path, "a TorchScript archive, which is a program and no list of tensors")
            .advise("give a file of the same model's state_dict"));
    }
    let bad = |problem: String| suspect(path, problem);
    let Some(pickle) = names.iter().flatten().find(|name| name.ends_with("/data.pkl")) else {
        return Err(bad("holds no data.pkl, as torch.save writes it".into()));
    };
    let folder = pickle.trim_end_matches("data.pkl").to_string();
    let mut program = &[][..];
    let mut storages = HashMap::new();
    for (i, name) in names.iter().enumerate() {
        let Some(name) = name.as_ref().and_then(|name| name.strip_prefix(&folder)) else { continue };
        let key = name.strip_prefix("data/").filter(|key| !key.contains('/'));
        if key.is_none() && !["data.pkl", "byteorder"].contains(&name) {
            continue;
        }
        let range = member(&mut archive, i, bytes.len()).map_err(|e| bad(format!("its member {name} {e}")))?;
        match (name, key) {
            (_, Some(key)) => drop(storages.insert(key.to_string(), range)),
            ("data.pkl", _) => program = &bytes[range],
            _ if &bytes[range.clone()] == b"little" => {}
            _ => return Err(Error::unsupported(path, "its numbers are in big-endian order").advise("save it anew")),
        }
    }
    if program.len() > MAX_PICKLE {
        return Err(bad(format!("its pickle has {} bytes, which is too large", program.len())));
    }
    let mut machine = Machine::new(program);
    let value = machine.run().map_err(bad)?;
    Ok((Search::run(&value).map_err(bad)?, storages))
}

/// The place of a member's bytes in the file.
fn member(archive: &mut zip::ZipArchive<Cursor<&[u8]>>, i: usize, end: usize) -> Outcome<Range<usize>> {
    let file = archive.by_index_raw(i).map_err(|e| format!("cannot be read ({e})"))?;
    if file.compression() != Stored || file.encrypted() {
        return Err("is compressed or encrypted, as torch.save never writes it".into());
    }
    let start = file.data_start().and_then(|start| usize::try_from(start).ok());
    let range = start.and_then(|start| Some(start..start.checked_add(usize::try_from(file.size()).ok()?)?));
    range.filter(|range| range.end <= end).ok_or_else(|| "reaches beyond the file".into())
}

/// Finds the tensors in a file of the old format, and its storages. After the magic number there are pickles of the
/// protocol's number, of the saving system's sizes, of the value, and of the storages' keys. Then follow the storages,
/// each as its length in elements and its numbers.
fn old_format(bytes: &[u8]) -> Outcome<(Found, Storages)> {
    if !bytes.starts_with(OLD_FORMAT) {
        return Err("begins as torch.save's files did before PyTorch 1.6, but not to the end of their mark".into());
    }
    let mut machine = Machine::new(bytes);
    machine.at = OLD_FORMAT.len();
    machine.run()?;
    machine.run()?;
    let value = machine.run()?;
    let found = Search::run(&value)?;
    let Value::List(keys) = machine.run()? else { return Err("its list of storages is damaged".into()) };
    let mut storages = HashMap::new();
    for key in keys.borrow().iter() {
        let Value::Text(key) = key else { return Err("its list of storages is damaged".into()) };
        let Some(dtype) = machine.storages.get(&**key).copied() else {
            return Err("its list of storages is damaged".into());
        };
        let bytes = usize::try_from(machine.number(8)?).ok().and_then(|len| len.checked_mul(size(dtype)));
        let start = machine.at;
        machine.take(bytes.ok_or("the length of a storage is damaged")?)?;
        storages.insert(key.to_string(), start..machine.at);
    }
    Ok((found, storages))
}
