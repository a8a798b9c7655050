//! Checkpoints by model id: found in the Hugging Face cache, or downloaded into it.
//!
//! The cache has the layout of `huggingface_hub`, so that all tools share one copy:
//! `models--OWNER--NAME/{blobs/ETAG, snapshots/COMMIT/..., refs/REVISION}`. A download fills `blobs/` first, then links
//! the files into the snapshot, `model_index.json` last, then writes the ref. So an interrupted download is never taken
//! for a whole snapshot, and the next one continues where it stopped.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use sha2::{Digest, Sha256};
use ureq::config::RedirectAuthHeaders;
use ureq::http::Response;
use ureq::{Agent, Body};

use crate::{Error, ErrorKind, Result, Subject};
use files::{Listing, RemoteFile, is_complete, is_hex, is_plain, select};

mod files;

/// The number of attempts at a file before its error is returned.
const ATTEMPTS: u32 = 4;
/// The longest file list that is read, in bytes.
const LISTING_LIMIT: u64 = 32 << 20;

/// The folder where models are kept, and the server that they come from.
#[derive(Clone)]
pub struct HubConfig {
    /// The cache folder, which holds one `models--OWNER--NAME` for each model.
    pub cache: PathBuf,
    /// The server, such as `https://huggingface.co`.
    pub endpoint: String,
    /// Sent to the server as a bearer token.
    pub token: Option<String>,
    /// If true, the network is never used.
    pub offline: bool,
}

impl HubConfig {
    /// Reads the settings from environment variables, which `variable` gives by name, and from the files that they
    /// name, as `huggingface_hub` does. The cache is that of `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, `HF_HOME` or
    /// `XDG_CACHE_HOME`, the first that is set. The token is `HF_TOKEN`, `HUGGING_FACE_HUB_TOKEN`, the content of the
    /// file at `HF_TOKEN_PATH`, or that of `token` in `HF_HOME`, where `hf auth login` puts it;
    /// `HF_HUB_DISABLE_IMPLICIT_TOKEN` turns it off. The server is `HF_ENDPOINT`. `HF_HUB_OFFLINE` and
    /// `TRANSFORMERS_OFFLINE` turn the network off. An empty variable counts as unset; `~`, `$NAME` and `${NAME}` in
    /// paths are replaced.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] if neither a variable nor a home folder gives the cache's place.
    pub fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let text = |name: &str| {
            let value = variable(name)?.into_string().ok()?.trim().to_string();
            Some(value).filter(|value| !value.is_empty())
        };
        let user = || variable("HOME").or_else(|| variable("USERPROFILE")).map(PathBuf::from);
        let path = |name: &str| {
            // A path that is not Unicode is taken as it is.
            let value = variable(name).filter(|value| !value.is_empty())?;
            Some(value.to_str().map_or_else(|| value.clone().into(), |value| expanded(value, &text, user())))
        };
        let home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|caches| caches.join("huggingface")))
            .or_else(|| user().map(|home| home.join(".cache").join("huggingface")));
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE"));
        let cache = cache.or_else(|| home.as_ref().map(|home| home.join("hub"))).ok_or_else(|| {
            Error::invalid("cache", "there is no home folder to keep models in").advise("set HF_HUB_CACHE to a folder")
        })?;
        let is_set = |name: &str| {
            text(name).is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str()))
        };
        let file = path("HF_TOKEN_PATH").or_else(|| home.map(|home| home.join("token")));
        let login = || Some(fs::read_to_string(file?).ok()?.trim().to_string()).filter(|token| !token.is_empty());
        let token = text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN"));
        Ok(HubConfig {
            cache,
            endpoint: text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string()),
            token: token.or_else(login).filter(|_| !is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN")),
            offline: is_set("HF_HUB_OFFLINE") || is_set("TRANSFORMERS_OFFLINE"),
        })
    }
}

/// A path in which `~`, `$NAME` and `${NAME}` are replaced, as by Python's `os.path.expanduser` and `expandvars`: names
/// that are not set are left as they are.
fn expanded(value: &str, variable: &dyn Fn(&str) -> Option<String>, home: Option<PathBuf>) -> PathBuf {
    let mut out = String::new();
    let mut rest = value;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        let (name, end) = match after.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some((name, end)) => (name, end),
            None => after.split_at(after.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(after.len())),
        };
        match variable(name) {
            Some(value) => out.push_str(&value),
            None => out.push_str(&rest[before.len()..rest.len() - end.len()]),
        }
        rest = end;
    }
    out.push_str(rest);
    match (out.strip_prefix('~'), home) {
        (Some(""), Some(home)) => home,
        (Some(inner), Some(home)) if inner.starts_with('/') => home.join(inner.trim_start_matches('/')),
        _ => out.into(),
    }
}

/// The folder of the model `id`, which is `owner/name` or `owner/name@revision` (a branch, tag or commit). A model in
/// the cache is used without asking the server for a newer commit; any other is downloaded. `progress` is called after
/// every piece.
///
/// # Errors
/// [`crate::ErrorKind::Invalid`] for a malformed id; [`crate::ErrorKind::Network`] when the server is out of reach,
/// refuses, has no such model or sends something else than it announced; [`crate::ErrorKind::Io`] when the cache cannot
/// be written.
pub fn resolve(id: &str, config: &HubConfig, progress: &mut dyn FnMut(Downloaded)) -> Result<PathBuf> {
    let id = ModelId::parse(id)?;
    let repo = config.cache.join(format!("models--{}", id.name.replace('/', "--")));
    if let Some(snapshot) = cached(&repo, id.revision) {
        return Ok(snapshot);
    }
    if config.offline {
        return Err(Error::network(
            id.name,
            format!("is not completely in {}, and HF_HUB_OFFLINE forbids the download", config.cache.display()),
        )
        .advise("unset HF_HUB_OFFLINE, or give a local folder"));
    }
    Download::new(config, &id).run(&repo, progress)
}

/// The progress of a download.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Downloaded<'a> {
    /// The file that is being downloaded, by its path in the model.
    pub file: &'a str,
    /// Bytes that have arrived, over all files.
    pub bytes: u64,
    /// Bytes of all files.
    pub total: u64,
}

struct ModelId<'a> {
    name: &'a str,
    revision: &'a str,
}

impl<'a> ModelId<'a> {
    fn parse(text: &'a str) -> Result<Self> {
        let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
        let name_is_valid = name.len() <= 96
            && name.split('/').count() == 2
            && name.split('/').all(|part| is_plain(part) && !part.contains("--") && !part.contains(".."));
        if name_is_valid && revision.split('/').all(is_plain) {
            return Ok(ModelId { name, revision });
        }
        Err(Error::invalid(
            "model",
            format!("{text:?} is neither a file or folder nor a model id such as owner/name or owner/name@revision"),
        ))
    }
}

/// The snapshot of a revision, if it is in the cache and whole.
fn cached(repo: &Path, revision: &str) -> Option<PathBuf> {
    let commit = if is_hex(revision, 40) {
        revision.to_string()
    } else {
        fs::read_to_string(repo.join("refs").join(revision)).ok()?.trim().to_string()
    };
    let snapshot = repo.join("snapshots").join(&commit);
    (is_hex(&commit, 40) && is_complete(&snapshot)).then_some(snapshot)
}

/// The reason why a file did not arrive.
enum Failure {
    /// Another try may help.
    Transient(String),
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Final(error)
    }
}

struct Download<'a> {
    agent: Agent,
    config: &'a HubConfig,
    id: &'a ModelId<'a>,
    endpoint: &'a str,
}

impl<'a> Download<'a> {
    fn new(config: &'a HubConfig, id: &'a ModelId<'a>) -> Self {
        let wait = Some(Duration::from_secs(60));
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            // In a compressed answer, ranges and sizes would be those of the compressed bytes.
            .accept_encoding("identity")
            .user_agent(concat!("respodiff/", env!("CARGO_PKG_VERSION")))
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_resolve(wait)
            .timeout_connect(wait)
            .timeout_recv_response(wait)
            .timeout_per_read(wait)
            .build()
            .new_agent();
        Download { agent, config, id, endpoint: config.endpoint.trim_end_matches('/') }
    }

    fn run(&self, repo: &Path, progress: &mut dyn FnMut(Downloaded)) -> Result<PathBuf> {
        let listing = self.listing()?;
        let commit = listing.sha.clone();
        let mut files = select(listing, self.id.name)?;
        // The last file to be linked is the one that `cached` looks for.
        files.sort_by_key(|file| file.path == "model_index.json");

        let total = files.iter().fold(0u64, |sum, file| sum.saturating_add(file.size));
        let blobs = repo.join("blobs");
        fs::create_dir_all(&blobs).map_err(Error::io("create", &blobs))?;
        let mut before = 0;
        for file in &files {
            self.file(&commit, file, &blobs, &mut |have| {
                progress(Downloaded { file: &file.path, bytes: before + have, total });
            })?;
            before += file.size;
        }

        let snapshot = repo.join("snapshots").join(&commit);
        for file in &files {
            link(&snapshot, file)?;
        }
        if !is_hex(self.id.revision, 40) {
            let path = repo.join("refs").join(self.id.revision);
            let partial = path.with_file_name(format!(".{}.incomplete", std::process::id()));
            create_parent(&path)?;
            fs::write(&partial, &commit).map_err(Error::io("write", &partial))?;
            fs::rename(&partial, &path).map_err(Error::io("write", &path))?;
        }
        Ok(snapshot)
    }

    /// The files of the revision, with sizes and checksums.
    fn listing(&self) -> Result<Listing> {
        let revision = self.id.revision.replace('/', "%2F");
        let url = format!("{}/api/models/{}/revision/{revision}?blobs=true", self.endpoint, self.id.name);
        let mut response = self.get(&url, 0).map_err(|error| self.unreachable(&error.to_string()))?;
        if response.status() != 200 {
            return Err(self.refused(response.status().as_u16()));
        }
        let bytes = response.body_mut().with_config().limit(LISTING_LIMIT).read_to_vec();
        let bytes = bytes.map_err(|error| self.unreachable(&error.to_string()))?;
        match serde_json::from_slice::<Listing>(&bytes) {
            Ok(listing) if is_hex(&listing.sha, 40) => Ok(listing),
            _ => Err(self.unreachable("its file list is not one of a Hugging Face server")),
        }
    }

    /// Fetches one file to `blobs/ETAG`, by way of `blobs/ETAG.incomplete`. `report` is called with the number of bytes
    /// that have arrived.
    fn file(&self, commit: &str, file: &RemoteFile, blobs: &Path, report: &mut dyn FnMut(u64)) -> Result<()> {
        let blob = blobs.join(file.etag());
        let partial = blobs.join(format!("{}.incomplete", file.etag()));
        if blob.exists() {
            report(file.size);
            return Ok(());
        }
        let open = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&partial);
        let mut out = open.map_err(Error::io("create", &partial))?;
        // Waits for another process that downloads the same file. On a file system without locks, the checksum finds
        // the damage that two writers may do.
        let _ = out.lock();
        if blob.exists() {
            report(file.size);
            return Ok(());
        }
        let mut attempt = 1;
        while let Err(failure) = self.rest(commit, file, &mut out, &partial, report) {
            match failure {
                Failure::Transient(_) if attempt < ATTEMPTS => thread::sleep(Duration::from_millis(250) * attempt),
                Failure::Transient(problem) => return Err(self.unreachable(&problem)),
                Failure::Final(error) => return Err(error),
            }
            attempt += 1;
        }
        if let Some(lfs) = &file.lfs
            && sha256(&mut out).map_err(Error::io("read", &partial))? != lfs.sha256
        {
            fs::remove_file(&partial).map_err(Error::io("remove", &partial))?;
            return Err(Error::network(
                self.id.name,
                format!("{} arrived damaged: its SHA-256 is not the announced one", file.path),
            )
            .advise("run again to fetch it anew"));
        }
        out.sync_all().map_err(Error::io("write", &partial))?;
        fs::rename(&partial, &blob).map_err(Error::io("write", &blob))
    }

    /// Downloads the missing end of the file and appends it to `out`, which is the file at `path`.
    fn rest(
        &self,
        commit: &str,
        file: &RemoteFile,
        out: &mut File,
        path: &Path,
        report: &mut dyn FnMut(u64),
    ) -> Result<(), Failure> {
        let clear = |out: &mut File| out.set_len(0).and_then(|()| out.rewind()).map_err(Error::io("write", path));
        let transient = |problem: &str| Err(Failure::Transient(format!("{}: {problem}", file.path)));
        let mut have = out.seek(SeekFrom::End(0)).map_err(Error::io("read", path))?;
        if have > file.size {
            clear(out)?;
            have = 0;
        }
        report(have);
        if have == file.size {
            return Ok(());
        }
        let url = format!("{}/{}/resolve/{commit}/{}", self.endpoint, self.id.name, file.path);
        let mut response = match self.get(&url, have) {
            Ok(response) => response,
            Err(error) => return transient(&error.to_string()),
        };
        let resumes = response.headers().get("content-range").and_then(|value| value.to_str().ok());
        let resumes = resumes.is_some_and(|range| range.starts_with(&format!("bytes {have}-")));
        match response.status().as_u16() {
            206 if resumes => {}
            200 => {
                clear(out)?;
                have = 0;
            }
            206 | 416 => {
                clear(out)?;
                return transient("the server does not resume where the download stopped");
            }
            status @ (429 | 500..=599) => return transient(&format!("the server answers {status}")),
            status => return Err(self.refused(status).into()),
        }
        let mut body = response.body_mut().as_reader();
        let mut buffer = vec![0; 1 << 18];
        loop {
            let count = match body.read(&mut buffer) {
                Ok(0) if have == file.size => return Ok(()),
                Ok(0) => return transient("the connection ended early"),
                Ok(count) => count,
                Err(error) => return transient(&error.to_string()),
            };
            if have + count as u64 > file.size {
                clear(out)?;
                return transient("the server sends more than it announced");
            }
            out.write_all(&buffer[..count]).map_err(Error::io("write", path))?;
            have += count as u64;
            report(have);
        }
    }

    /// Requests `url`, from byte `from` on.
    fn get(&self, url: &str, from: u64) -> Result<Response<Body>, ureq::Error> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.config.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        request.call()
    }

    fn unreachable(&self, problem: &str) -> Error {
        Error::network(self.id.name, format!("cannot be downloaded from {}: {problem}", self.endpoint))
            .advise("check the network and run again, or give a local folder")
    }

    fn refused(&self, status: u16) -> Error {
        let ModelId { name, revision } = self.id;
        let page = format!("{}/{name}", self.endpoint);
        let model = Subject::Model(name.to_string());
        match status {
            // The hub also answers 401 for models that do not exist, so that it does not reveal which private ones do.
            401 => Error::not_found(model, "does not exist or needs a login (401)")
                .advise(format!("check the spelling, or accept its licence at {page} and log in or set HF_TOKEN")),
            403 => Error::new(ErrorKind::Network, model, "is gated (403)")
                .advise(format!("accept its licence at {page} and set HF_TOKEN to your token")),
            404 => Error::not_found(model, format!("revision {revision} is not at {} (404)", self.endpoint))
                .advise("check the spelling, or give a local folder"),
            _ => Error::new(ErrorKind::Network, model, format!("{page} answers {status}"))
                .advise("run again later, or give a local folder"),
        }
    }
}

/// SHA-256 of a whole file, in hexadecimal.
fn sha256(file: &mut File) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    file.rewind()?;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            count => hash.update(&buffer[..count]),
        }
    }
}

/// Makes `snapshot/PATH` a link to its blob.
fn link(snapshot: &Path, file: &RemoteFile) -> Result<()> {
    let path = snapshot.join(&file.path);
    // `symlink_metadata` also finds a link whose blob is gone.
    if path.exists() {
        return Ok(());
    } else if path.symlink_metadata().is_ok() {
        fs::remove_file(&path).map_err(Error::io("remove", &path))?;
    }
    create_parent(&path)?;
    let up = "../".repeat(2 + file.path.matches('/').count());
    let target = format!("{up}blobs/{}", file.etag());
    #[cfg(unix)]
    let linked = std::os::unix::fs::symlink(target, &path);
    #[cfg(windows)]
    let linked = std::os::windows::fs::symlink_file(target.replace('/', "\\"), &path);
    // Windows allows symbolic links only to administrators and developers, and some file systems have none.
    linked
        .or_else(|_| {
            let blob = snapshot.join("../../blobs").join(file.etag());
            let partial = path.with_extension("incomplete");
            fs::hard_link(&blob, &path).or_else(|_| fs::copy(&blob, &partial).and_then(|_| fs::rename(&partial, &path)))
        })
        .map_err(Error::io("create", &path))
}

fn create_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), |parent| fs::create_dir_all(parent).map_err(Error::io("create", parent)))
}
