//! The JSON of checkpoints, as Python's `json` writes it: with `NaN`, `Infinity` and `-Infinity`, which are no JSON.

use crate::{Error, Result};
use serde::de::DeserializeOwned;
use std::path::Path;

/// Parses a file's text; `path` is for messages. Infinities become the largest numbers of f64, NaN becomes null.
///
/// # Errors
/// [`crate::ErrorKind::Damaged`] for anything else that is not JSON, or not what `T` reads.
pub(crate) fn parse<T: DeserializeOwned>(text: &str, path: &Path) -> Result<T> {
    // Some editors of Windows put a byte order mark before the text.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.starts_with("version https://git-lfs") {
        return Err(Error::damaged(path, "a pointer of Git LFS in place of the file").advise("run `git lfs pull`"));
    }
    serde_json::from_str(&plain(text)).map_err(|problem| {
        Error::damaged(path, format!("not the JSON that belongs there: {problem}")).advise("get the file again")
    })
}

/// The text with Python's three words outside of strings replaced.
fn plain(text: &str) -> String {
    let words = [("-Infinity", "-1.7976931348623157e308"), ("Infinity", "1.7976931348623157e308"), ("NaN", "null")];
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut in_string = false;
    while let Some(c) = rest.chars().next() {
        if !in_string && let Some((word, value)) = words.iter().find(|(word, _)| rest.starts_with(word)) {
            out.push_str(value);
            rest = &rest[word.len()..];
            continue;
        }
        let escaped = in_string && c == '\\';
        in_string ^= c == '"';
        let taken = rest.chars().take(1 + usize::from(escaped)).map(char::len_utf8).sum();
        out.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn what_python_writes_is_read() {
        let text =
            "\u{feff}{\"a\": -Infinity, \"b\": [Infinity, NaN, 1], \"NaN\": \"-Infinity \\\" NaN \\\\\", \"é\": 2}";
        let parsed: Value = parse(text, "x".as_ref()).unwrap();
        let truth = json!({"a": f64::MIN, "b": [f64::MAX, null, 1], "NaN": "-Infinity \" NaN \\", "é": 2});
        assert_eq!(parsed, truth);
        for text in
            ["", "{", "{\"a\": Nan}", "version https://git-lfs.github.com/spec/v1\n", "\"\\", "{\"a\": --Infinity}"]
        {
            assert!(parse::<Value>(text, "x".as_ref()).is_err(), "{text}");
        }
    }
}
