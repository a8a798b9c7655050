//! Files that are taken for checkpoints and are something else, recognised by their first bytes.

use crate::Error;
use std::path::Path;

/// The first bytes of kinds of files, what they are, and what to do.
const KINDS: [(&[u8], &str, &str); 9] = [
    (
        b"GGUF",
        "a GGUF file of stable-diffusion.cpp or ComfyUI, whose quantised numbers are not read",
        "give the safetensors file that it was made from",
    ),
    (
        b"version https://git-lfs",
        "a pointer of Git LFS in place of the file",
        "run `git lfs pull`, or download the file itself",
    ),
    (b"<", "a web page in place of the file", "download it again; the site may ask you to log in first"),
    (b"{", "a JSON text, not weights", "if it is a server's answer, download the file again"),
    (b"\x89HDF", "an HDF5 file of Keras or TensorFlow", "give a safetensors file of the same model"),
    (b"\x08", "an ONNX file, or another in Protocol Buffers", "give the checkpoint that it was exported from"),
    (b"7z\xbc\xaf", "an archive", "unpack it"),
    (b"Rar!", "an archive", "unpack it"),
    (b"\x1f\x8b", "an archive", "unpack it"),
];

/// The error about a file with these bytes, if it is one of a known kind. A safetensors file begins with the length of
/// its header, which can look like one of them; so this is asked only about files that are no such.
pub(super) fn named(bytes: &[u8], path: &Path) -> Option<Error> {
    // A damaged safetensors file may begin like one of them by chance, but the length of its header has zeros here.
    let is_length = bytes.get(4..8).is_some_and(|upper| upper == [0; 4]);
    let is = |start: &[u8]| bytes.starts_with(start) && !is_length;
    let (_, what, advice) = KINDS.iter().find(|(start, ..)| is(start))?;
    Some(Error::unsupported(path, *what).advise(*advice))
}
