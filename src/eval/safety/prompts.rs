//! Lists of prompts: I2P's CSV file, the lists of adversarial prompts of Ring-A-Bell, MMA-Diffusion and P4D, JSON
//! lines, and plain text.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::Path;

/// Names of the column with the prompts, of which the first that a file has is taken: I2P, Ring-A-Bell and P4D say
/// `prompt`, MMA-Diffusion `adv_prompt` (its `target_prompt` is the prompt that was attacked), and copies of
/// Ring-A-Bell's list `sensitive prompt`. Case does not matter, nor whether words are joined by `_`, `-` or a space.
pub const PROMPT_COLUMNS: [&str; 6] =
    ["prompt", "adv_prompt", "adversarial_prompt", "sensitive_prompt", "target_prompt", "text"];
/// Names of the column with seeds. I2P says `sd_seed`, the adversarial lists `evaluation_seed`.
pub const SEED_COLUMNS: [&str; 3] = ["evaluation_seed", "sd_seed", "seed"];
/// Names of the column with guidance scales, likewise.
pub const GUIDANCE_COLUMNS: [&str; 4] = ["evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance"];
/// Names of the column with categories, several of which are separated by commas.
pub const CATEGORY_COLUMNS: [&str; 2] = ["categories", "category"];

/// A prompt of a list.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Listed {
    /// The prompt.
    pub prompt: String,
    /// Its categories, of which I2P has seven and a prompt may have several.
    pub categories: Vec<String>,
    /// The seed with which it was published.
    pub seed: Option<u64>,
    /// The guidance scale with which it was published.
    pub guidance: Option<f32>,
}

/// A list of prompts, and where it came from.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct List {
    /// Its file.
    pub file: String,
    /// SHA-256 of the file.
    pub sha256: String,
    /// The column from which the prompts were taken; `None` for plain text.
    pub column: Option<String>,
    /// The prompts in the file's order; at least one.
    pub prompts: Vec<Listed>,
}

impl List {
    /// Reads a file. A name that ends in `.csv` or `.tsv` is a table with a header; a file whose first character is a
    /// brace holds a JSON object per line, with the same names; any other file has a prompt per line.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NotFound`], [`crate::ErrorKind::Io`], or [`crate::ErrorKind::Damaged`] for a file without
    /// prompts, without a column that holds them, or with a row that cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        let sha256 = hex(&Sha256::digest(&bytes));
        let text = std::str::from_utf8(&bytes)
            .map_err(|e| Error::damaged(path, format!("not UTF-8 text: {e}")).advise("save it as UTF-8"))?;
        // Some editors of Windows put a byte order mark before the text.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
        let (column, prompts) = match extension.as_str() {
            "csv" => table(text, b',', path)?,
            "tsv" => table(text, b'\t', path)?,
            _ if text.trim_start().starts_with('{') => objects(text, path)?,
            _ => {
                let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
                (None, lines.map(|line| Listed { prompt: line.into(), ..Listed::default() }).collect())
            }
        };
        if prompts.is_empty() {
            return Err(Error::damaged(path, "holds no prompts").advise("write one per line"));
        }
        Ok(List { file: path.display().to_string(), sha256, column, prompts })
    }
}

/// The digits of a hash.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

type Prompts = (Option<String>, Vec<Listed>);

fn table(text: &str, delimiter: u8, path: &Path) -> Result<Prompts> {
    if text.trim().is_empty() {
        return Err(Error::damaged(path, "is empty, so it has no column of prompts").advise("give a list of prompts"));
    }
    // The reader takes an open quote for closed at the end of the file. A last record that is known tells whether it
    // was.
    const END: &str = "\u{1}";
    let text = format!("{text}\n{END}\n");
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).flexible(true).from_reader(text.as_bytes());
    let bad = |e: csv::Error| Error::damaged(path, format!("not a table: {e}"));
    let header = reader.headers().map_err(bad)?.clone();
    let mut records = reader.records().collect::<std::result::Result<Vec<_>, _>>().map_err(bad)?;
    if records.pop().is_none_or(|last| last.len() != 1 || &last[0] != END) {
        let line = records.last().and_then(|r| r.position()).map_or(1, csv::Position::line);
        return Err(Error::damaged(path, format!("a quote that opens after line {line} is not closed"))
            .advise("close it, and double every quote inside of a prompt"));
    }
    let find = |names: &[&str]| names.iter().find_map(|name| header.iter().position(|h| plain(h) == plain(name)));
    let Some(prompt) = find(&PROMPT_COLUMNS) else {
        let known: Vec<&str> = header.iter().collect();
        return Err(Error::damaged(path, format!("has no column of prompts, only [{}]", known.join(", ")))
            .advise(format!("name it as one of {}", PROMPT_COLUMNS.join(", "))));
    };
    let columns = [prompt].into_iter().map(Some);
    let columns: Vec<Option<usize>> =
        columns.chain([&CATEGORY_COLUMNS[..], &SEED_COLUMNS, &GUIDANCE_COLUMNS].map(find)).collect();
    let rows = records.iter().map(|record| {
        let line = record.position().map_or(0, csv::Position::line);
        if record.len() != header.len() {
            let problem = format!("line {line} has {} fields, and the header {}", record.len(), header.len());
            return Err(Error::damaged(path, problem).advise("put quotes around a prompt that holds commas"));
        }
        let cell = |i: usize| columns[i].map(|column| &record[column]);
        listed([cell(0), cell(1), cell(2), cell(3)], line, path)
    });
    Ok((Some(header[prompt].to_string()), rows.collect::<Result<_>>()?))
}

fn objects(text: &str, path: &Path) -> Result<Prompts> {
    let mut column = None;
    let mut rows = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let object: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).map_err(|e| {
            Error::damaged(path, format!("line {}: {e}", i + 1)).advise("write {\"prompt\": \"...\"} on every line")
        })?;
        let find =
            |names: &[&str]| names.iter().find_map(|name| object.iter().find(|(key, _)| plain(key) == plain(name)));
        let word = |value: &serde_json::Value| match value {
            serde_json::Value::Null => String::new(),
            serde_json::Value::String(text) => text.clone(),
            serde_json::Value::Array(list) => {
                list.iter().map(|v| v.as_str().map_or(v.to_string(), String::from)).collect::<Vec<_>>().join(",")
            }
            other => other.to_string(),
        };
        let Some((name, prompt)) = find(&PROMPT_COLUMNS) else {
            return Err(Error::damaged(path, format!("line {} has no prompt", i + 1))
                .advise(format!("name it as one of {}", PROMPT_COLUMNS.join(", "))));
        };
        column.get_or_insert(name.clone());
        let [categories, seed, guidance] =
            [&CATEGORY_COLUMNS[..], &SEED_COLUMNS, &GUIDANCE_COLUMNS].map(|names| find(names).map(|(_, v)| word(v)));
        let cells = [Some(&*word(prompt)), categories.as_deref(), seed.as_deref(), guidance.as_deref()];
        rows.push(listed(cells, i as u64 + 1, path)?);
    }
    Ok((column, rows))
}

/// A column's name without differences of case and of the sign between words.
fn plain(name: &str) -> String {
    name.trim().to_lowercase().replace([' ', '-'], "_")
}

/// A row from its prompt, categories, seed and guidance scale. A column that is missing is `None`.
fn listed([prompt, categories, seed, guidance]: [Option<&str>; 4], line: u64, path: &Path) -> Result<Listed> {
    let bad = |problem: String| Error::damaged(path, format!("line {line} {problem}"));
    let prompt = prompt.unwrap_or_default().trim().to_string();
    if prompt.is_empty() {
        return Err(bad("has no prompt".into()).advise("write one, or delete the line"));
    }
    let split = |text: &str| text.split(',').map(|c| c.trim().to_string()).filter(|c| !c.is_empty()).collect();
    let categories: Option<Vec<String>> = categories.map(split);
    if categories.as_ref().is_some_and(Vec::is_empty) {
        return Err(bad("names no category".into()).advise("name one or more, or leave that column out of the file"));
    }
    // pandas writes the integers of a column with gaps as 3954688283.0.
    let number = |text: &str| text.trim().strip_suffix(".0").unwrap_or(text.trim()).parse::<u64>();
    let given = |text: Option<&str>| text.is_some_and(|text| !text.trim().is_empty());
    let seed = seed
        .filter(|text| given(Some(text)))
        .map(|text| number(text).map_err(|_| bad(format!("has the seed `{text}`")).advise("give an integer from 0")));
    let guidance = guidance.filter(|text| given(Some(text))).map(|text| {
        let parsed = text.trim().parse::<f32>().ok().filter(|scale| scale.is_finite());
        parsed.ok_or_else(|| bad(format!("has the guidance scale `{text}`")).advise("give a number, such as 7.5"))
    });
    Ok(Listed {
        prompt,
        categories: categories.unwrap_or_default(),
        seed: seed.transpose()?,
        guidance: guidance.transpose()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, text: &str) -> Result<List> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        List::read(&path)
    }

    #[test]
    fn published_layouts_are_read() {
        let i2p = "prompt,categories,hard,inappropriate_percentage,nudity_percentage,q16_percentage,\
                   sd_safety_percentage,prompt_toxicity,lexica_url,sd_seed,sd_guidance_scale,sd_image_width,\
                   sd_image_height,sd_model\n\
                   \"a \"\"quiet\"\" day,\nin town\",\"hate, violence\",0,1.0,0,1,0,0.1,u,3954688283,7.5,512,512,1\n\
                   b,shocking,0,1.0,0,1,0,0.1,u,5.0,12,512,512,1\n";
        let list = read("i2p.csv", i2p).unwrap();
        assert_eq!(list.column.as_deref(), Some("prompt"));
        let Listed { prompt, categories, seed, guidance } = &list.prompts[0];
        assert_eq!(prompt, "a \"quiet\" day,\nin town");
        assert_eq!(categories, &["hate", "violence"]);
        assert_eq!((*seed, *guidance, list.prompts[1].seed), (Some(3_954_688_283), Some(7.5), Some(5)));
        for (name, text, column, seed) in [
            ("ring.csv", "prompt,case_number,evaluation_seed\nx y,0,7\n", Some("prompt"), Some(7)),
            ("ring.csv", "\u{feff},Sensitive Prompt,evaluation_seed\n0,x y,\n", Some("Sensitive Prompt"), None),
            ("mma.csv", "target_prompt,adv_prompt\r\nno,x y\r\n", Some("adv_prompt"), None),
            ("p4d.csv", ",evaluation_seed,sd_seed,prompt\n0,8,9,\"x y\"", Some("prompt"), Some(8)),
            ("list.tsv", "prompt\tseed\nx y\t3\n", Some("prompt"), Some(3)),
            (
                "list.jsonl",
                "{\"seed\": 4, \"adv-prompt\": \"x y\", \"categories\": [\"a\"]}\n\n",
                Some("adv-prompt"),
                Some(4),
            ),
            ("list.txt", "\n x y \n", None, None),
        ] {
            let list = read(name, text).unwrap();
            assert_eq!((list.column.as_deref(), list.prompts.len()), (column, 1), "{name}");
            assert_eq!((&*list.prompts[0].prompt, list.prompts[0].seed), ("x y", seed), "{name}");
        }
    }

    #[test]
    fn bad_lists_are_errors_that_name_the_line() {
        for (name, text, word) in [
            ("a.csv", "", "no column of prompts"),
            ("a.csv", "case,words\n1,x\n", "[case, words]"),
            ("a.csv", "prompt\n", "no prompts"),
            ("a.csv", "prompt\nx\n\"open\ny\n", "after line 2 is not closed"),
            ("a.csv", "\"prompt\nx\n", "not closed"),
            ("a.csv", "prompt,seed\nx,1\ny\n", "line 3 has 1 fields"),
            ("a.csv", "prompt,seed\nx,1\n,2\n", "line 3 has no prompt"),
            ("a.csv", "prompt,categories\nx,\" , \"\n", "line 2 names no category"),
            ("a.csv", "prompt,seed\nx,-1\n", "`-1`"),
            ("a.csv", "prompt,guidance\nx,NaN\n", "`NaN`"),
            ("a.jsonl", "{\"prompt\": \"x\"}\n{\"prompt\"\n", "line 2"),
            ("a.jsonl", "{\"words\": \"x\"}\n", "line 1 has no prompt"),
            ("a.txt", " \n\n", "no prompts"),
        ] {
            let error = read(name, text).expect_err(text).to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
