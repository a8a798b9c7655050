//! The records and features of a set of pictures, in memory and in a folder.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;

/// The judgement of one picture, without its features.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Record {
    /// Index of the picture among all of the set.
    pub index: usize,
    /// Its file name, or its caption if it was made here.
    pub name: String,
    /// 100 times the cosine of the embeddings of picture and prompt; none if it has no prompt.
    pub score: Option<f64>,
}

/// Pictures that have been judged. In a folder there is a line for each in `records.jsonl`, and in `features.bin` a row
/// of fp32 numbers: the features of the Inception, and the embedding of CLIP.
pub(super) struct Set {
    width: usize,
    records: Vec<Record>,
    rows: Vec<f32>,
    files: Option<Files>,
}

struct Files {
    records: File,
    features: File,
}

impl Set {
    /// A set in memory alone, with rows of `width` numbers.
    pub fn new(width: usize) -> Self {
        Set { width, records: Vec::new(), rows: Vec::new(), files: None }
    }

    /// Reads the set in a folder. What was being written as a run was killed is left out.
    pub fn read(folder: &Path, width: usize) -> Result<Self> {
        let (lines, features) = (folder.join("records.jsonl"), folder.join("features.bin"));
        let mut set = Set::new(width);
        if !lines.exists() || !features.exists() {
            return Ok(set);
        }
        let text = std::fs::read_to_string(&lines).map_err(Error::io("read", &lines))?;
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for (i, line) in whole.lines().enumerate() {
            let damaged = |e| Error::damaged(&lines, format!("line {} is damaged ({e})", i + 1));
            set.records.push(serde_json::from_str(line).map_err(|e| damaged(e).advise("delete the folder"))?);
        }
        let bytes = std::fs::read(&features).map_err(Error::io("read", &features))?;
        let count = set.records.len().min(bytes.len() / (4 * width).max(1));
        set.records.truncate(count);
        set.rows = bytes.as_chunks().0.iter().take(count * width).map(|&b| f32::from_le_bytes(b)).collect();
        if !set.rows.iter().all(|x| x.is_finite()) {
            return Err(Error::damaged(&features, "holds NaN or infinity").advise("delete the folder"));
        }
        Ok(set)
    }

    /// Reads the set in a folder, and writes there what is added from now on.
    pub fn open(folder: &Path, width: usize) -> Result<Self> {
        let mut set = Set::read(folder, width)?;
        set.write(folder)?;
        let append = |name: &str| {
            let path = folder.join(name);
            OpenOptions::new().append(true).open(&path).map_err(Error::io("write", &path))
        };
        set.files = Some(Files { records: append("records.jsonl")?, features: append("features.bin")? });
        Ok(set)
    }

    /// Writes the whole set into a folder.
    pub fn write(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let lines: String = self.records.iter().map(line).collect();
        crate::files::write(&folder.join("features.bin"), &bytes(&self.rows))?;
        crate::files::write(&folder.join("records.jsonl"), lines.as_bytes())
    }

    /// Adds a picture. Its features are in the file before its record, which alone counts.
    pub fn push(&mut self, record: Record, row: &[f32]) -> Result<()> {
        debug_assert_eq!(row.len(), self.width);
        if let Some(files) = &mut self.files {
            let written = files.features.write_all(&bytes(row)).and_then(|()| {
                let line = line(&record);
                files.records.write_all(line.as_bytes())
            });
            written.map_err(Error::io("write", "features.bin"))?;
        }
        self.records.push(record);
        self.rows.extend_from_slice(row);
        Ok(())
    }

    /// Adds the pictures of another part of the same run, except those that are here already.
    pub fn merge(&mut self, other: &Set) {
        let known = self.done();
        for (record, row) in other.records.iter().zip(other.rows.chunks_exact(self.width)) {
            if !known.contains(&record.index) {
                self.records.push(record.clone());
                self.rows.extend_from_slice(row);
            }
        }
    }

    /// The indices of the pictures.
    pub fn done(&self) -> HashSet<usize> {
        self.records.iter().map(|record| record.index).collect()
    }

    /// The number of pictures.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Records and rows in the order of their indices, which is the same however a run was cut or shared.
    pub fn sorted(&self) -> Vec<(&Record, &[f32])> {
        let mut all: Vec<_> = self.records.iter().zip(self.rows.chunks_exact(self.width.max(1))).collect();
        all.sort_by_key(|(record, _)| record.index);
        all
    }
}

fn line(record: &Record) -> String {
    serde_json::to_string(record).unwrap_or_default() + "\n"
}

fn bytes(row: &[f32]) -> Vec<u8> {
    row.iter().flat_map(|x| x.to_le_bytes()).collect()
}
