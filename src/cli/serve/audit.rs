//! The audit log of a server: a line of JSON for each picture that is begun, and one for each that has ended. Each line
//! holds the SHA-256 of the line before it, so that no line can be changed, put in or taken out of the middle without
//! a trace. Lines taken off the end leave none: who needs to see that too, keeps the hash of the last line elsewhere.

use super::policy::Document;
use super::quotas::Turn;
use crate::image::GenerationInfo;
use crate::{Error, Result};
use respodiff_serve::Caller;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// A line of the log.
#[derive(Serialize, Deserialize)]
pub(super) struct Line {
    /// SHA-256 of the line before, without its end; zeros in the first line.
    pub(super) previous: String,
    /// Seconds since 1970.
    pub(super) time: u64,
    #[serde(flatten)]
    pub(super) event: Event,
}

/// The event that a line records.
#[derive(Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub(super) enum Event {
    /// A server has opened the log.
    Opened {
        version: String,
        policy: Option<Document>,
    },
    Begun(Box<Begun>),
    Ended {
        /// SHA-256 of the line with which the picture was begun.
        picture: String,
        outcome: Outcome,
        /// SHA-256 of the file.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sha256: Option<String>,
    },
}

/// A picture that was begun.
#[derive(Serialize, Deserialize)]
pub(super) struct Begun {
    /// Id of the request.
    pub(super) id: String,
    /// Name of the key that the request brought.
    pub(super) tenant: Option<String>,
    pub(super) prompt_sha256: String,
    /// The quotas' choices of concepts.
    pub(super) quotas: Vec<Turn>,
    /// The record that is in the picture's file, with empty prompts if the policy keeps prompts out.
    pub(super) parameters: Value,
    /// True if the prompts are in the parameters.
    pub(super) has_prompts: bool,
}

/// The end of a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Outcome {
    Finished,
    /// It could not be made.
    Failed,
    /// Its client has left, or its time was over.
    Cancelled,
}

/// SHA-256 in hexadecimal.
pub(super) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The hash of the line before the first one.
pub(super) fn none() -> String {
    "0".repeat(64)
}

/// A log that is written to. No other process can open it meanwhile.
pub(super) struct Audit {
    path: PathBuf,
    file: File,
    /// Bytes of the whole lines.
    length: u64,
    last: String,
    prompts: bool,
}

impl Audit {
    /// Opens a log, or begins it. A last line that was cut by a kill is taken off. Also returns the turns of the last
    /// line if it began a picture, which the policy may not have counted.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] if the file's last line is not one of a log, [`crate::ErrorKind::Mismatch`] if
    /// another process writes to it, [`crate::ErrorKind::Io`].
    pub(super) fn open(path: &Path, policy: Option<&Document>) -> Result<(Self, Vec<Turn>)> {
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let mut file = open.map_err(Error::io("open", path))?;
        if let Err(std::fs::TryLockError::WouldBlock) = file.try_lock() {
            return Err(Error::mismatch(path, "another process writes to this log").advise("give each server its own"));
        }
        let (length, line) = last_line(&mut file).map_err(Error::io("read", path))?;
        let mut turns = Vec::new();
        let last = match line {
            None => none(),
            Some(line) => {
                let parsed: Line = serde_json::from_slice(&line).map_err(|problem| {
                    Error::damaged(path, format!("its last line is not one of an audit log: {problem}"))
                        .advise("give another file")
                })?;
                if let Event::Begun(begun) = parsed.event {
                    turns = begun.quotas;
                }
                sha256(&line)
            }
        };
        file.set_len(length).map_err(Error::io("write", path))?;
        let prompts = policy.is_none_or(|policy| policy.audit_prompts);
        let mut audit = Audit { path: path.to_path_buf(), file, length, last, prompts };
        audit.write(Event::Opened { version: env!("CARGO_PKG_VERSION").into(), policy: policy.cloned() })?;
        Ok((audit, turns))
    }

    /// Writes that a picture is begun, and returns the name by which its end refers to it.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`]; the log is then as before.
    pub(super) fn begun(&mut self, caller: &Caller, info: &GenerationInfo, quotas: &[Turn]) -> Result<String> {
        let kept = match self.prompts {
            true => info.clone(),
            false => GenerationInfo { prompt: String::new(), negative_prompt: None, ..info.clone() },
        };
        self.write(Event::Begun(Box::new(Begun {
            id: caller.id.to_string(),
            tenant: caller.tenant.as_deref().map(Into::into),
            prompt_sha256: sha256(info.prompt.as_bytes()),
            quotas: quotas.to_vec(),
            parameters: serde_json::to_value(kept).unwrap_or_default(),
            has_prompts: self.prompts,
        })))
    }

    /// Writes how a picture has ended, and the hash of its file.
    ///
    /// # Errors
    /// As for [`Audit::begun`].
    pub(super) fn ended(&mut self, picture: String, outcome: Outcome, file: Option<&[u8]>) -> Result<()> {
        self.write(Event::Ended { picture, outcome, sha256: file.map(sha256) }).map(|_| ())
    }

    /// Adds a line, which is on the disk when this returns, and returns its hash.
    fn write(&mut self, event: Event) -> Result<String> {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let line = Line { previous: self.last.clone(), time, event };
        let mut text = serde_json::to_vec(&line)
            .map_err(|problem| Error::internal(format!("a line of the audit log cannot be written: {problem}")))?;
        let hash = sha256(&text);
        text.push(b'\n');
        let written = self.file.seek(SeekFrom::Start(self.length)).and_then(|_| self.file.write_all(&text));
        if let Err(problem) = written.and_then(|()| self.file.sync_data()) {
            let _ = self.file.set_len(self.length);
            return Err(Error::io("write", &self.path)(problem));
        }
        self.length += text.len() as u64;
        self.last.clone_from(&hash);
        Ok(hash)
    }
}

/// The bytes of all whole lines, and the last one of these without its end.
fn last_line(file: &mut File) -> std::io::Result<(u64, Option<Vec<u8>>)> {
    let length = file.metadata()?.len();
    let mut tail = 1 << 16;
    loop {
        let from = length.saturating_sub(tail);
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        Read::by_ref(file).take(length - from).read_to_end(&mut bytes)?;
        let end = bytes.iter().rposition(|byte| *byte == b'\n');
        let before = end.and_then(|end| bytes[..end].iter().rposition(|byte| *byte == b'\n'));
        match (end, before) {
            (Some(end), Some(before)) => return Ok((from + end as u64 + 1, Some(bytes[before + 1..end].to_vec()))),
            (Some(end), None) if from == 0 => return Ok((end as u64 + 1, Some(bytes[..end].to_vec()))),
            (None, _) if from == 0 => return Ok((0, None)),
            _ => tail *= 4,
        }
    }
}
