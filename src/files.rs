//! Writing files whole or not at all, and safetensors files whose bytes follow from their content.

use crate::{Error, ErrorKind, Result};
use safetensors::SafeTensorError;
use safetensors::tensor::TensorView;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Writes a file. A reader of the path finds the old file or the new one, even after a power cut: the bytes go to a
/// draft beside it, which is renamed. Symbolic links stay and lead to the new file, whose permissions are the old
/// one's. Devices, pipes and sockets are written to and stay what they are.
///
/// # Errors
/// [`crate::ErrorKind::Io`] or [`crate::ErrorKind::NotFound`]; the draft is removed.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    place(path).and_then(|place| place.write(bytes)).map_err(Error::io("write", path))
}

/// Keeps a folder for this process, until the returned file is closed. On file systems without locks nothing is kept.
///
/// # Errors
/// [`crate::ErrorKind::Mismatch`] if another process has it, [`crate::ErrorKind::Io`].
pub(crate) fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(".lock");
    let open = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = open.map_err(Error::io("write", &path))?;
    match file.try_lock() {
        Err(fs::TryLockError::WouldBlock) => Err(Error::mismatch(folder, "another process is working in this folder")
            .advise("wait until it is done, or give another folder")),
        Ok(()) | Err(fs::TryLockError::Error(_)) => Ok(file),
    }
}

/// Reads a text, without the mark at its beginning that some editors write (a BOM).
///
/// # Errors
/// [`crate::ErrorKind::Io`] or [`crate::ErrorKind::NotFound`].
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_string).unwrap_or(text))
}

/// Refuses to write a file over one that the same run reads.
///
/// # Errors
/// [`crate::ErrorKind::Invalid`].
pub(crate) fn check_not_input(path: &Path, inputs: &[impl AsRef<Path>]) -> Result<()> {
    let whole = |path: &Path| fs::canonicalize(path).ok();
    match whole(path).is_some_and(|path| inputs.iter().any(|input| whole(input.as_ref()).as_ref() == Some(&path))) {
        true => Err(Error::invalid("out", format!("{} is read by this run and would be overwritten", path.display()))
            .advise("give another name")),
        false => Ok(()),
    }
}

/// Writes a copy of a file.
///
/// # Errors
/// [`crate::ErrorKind::Io`] or [`crate::ErrorKind::NotFound`].
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    write(to, &fs::read(from).map_err(Error::io("read", from))?)
}

/// Finds now, not after minutes of work, that a file cannot be written.
///
/// # Errors
/// [`crate::ErrorKind::Io`] or [`crate::ErrorKind::NotFound`] with the system's answer.
pub(crate) fn check_writable(path: &Path) -> Result<()> {
    let check = |place: Place| match place {
        // Opening a pipe would wait for its reader.
        Place::Stream(_) => Ok(()),
        Place::Regular { path, .. } => {
            let (draft, _) = draft(&path)?;
            fs::remove_file(draft)
        }
    };
    place(path).and_then(check).map_err(Error::io("write", path))
}

/// The bytes of a safetensors file. Equal content gives equal bytes: `safetensors::serialize` sorts tensors, but writes
/// metadata in the order of a hash map, which changes from run to run.
///
/// # Errors
/// The safetensors crate's, for tensors whose sizes do not agree.
pub(crate) fn safetensors<'a>(
    tensors: impl IntoIterator<Item = (&'a str, TensorView<'a>)>,
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>, SafeTensorError> {
    let plain = safetensors::serialize(tensors, None)?;
    let (length, rest) = plain.split_at(size_of::<u64>());
    let length = length.try_into().map_or(0, u64::from_le_bytes) as usize;
    let (header, numbers) = rest.split_at(length);
    let fields = serde_json::to_vec(metadata).map_err(SafeTensorError::JsonError)?;
    // The header is a JSON object of at least one tensor, padded by spaces so that the numbers are aligned.
    let mut header = [b"{\"__metadata__\":", &fields[..], b",", header[1..].trim_ascii_end()].concat();
    header.resize(header.len().next_multiple_of(size_of::<u64>()), b' ');
    Ok([&(header.len() as u64).to_le_bytes(), &header[..], numbers].concat())
}

/// A folder beside a destination, in which the destination's content is made. It is removed with all that is in it,
/// unless it is kept.
pub(crate) struct Draft {
    folder: PathBuf,
    destination: PathBuf,
}

impl Draft {
    /// Makes the folder.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] if something other than an empty folder is at the destination,
    /// [`crate::ErrorKind::Io`] or [`crate::ErrorKind::NotFound`].
    pub(crate) fn new(destination: &Path) -> Result<Self> {
        if fs::symlink_metadata(destination).is_ok() {
            let is_empty = fs::read_dir(destination).is_ok_and(|mut entries| entries.next().is_none());
            if !is_empty || destination.file_name().is_none() {
                let problem = "is there already, and is no empty folder";
                return Err(Error::new(ErrorKind::Invalid, destination, problem).advise("give another name"));
            }
        }
        loop {
            let folder = beside(destination);
            match fs::create_dir(&folder) {
                Ok(()) => return Ok(Draft { folder, destination: destination.to_path_buf() }),
                Err(problem) if problem.kind() == io::ErrorKind::AlreadyExists => {}
                Err(problem) => return Err(Error::io("write", destination)(problem)),
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.folder
    }

    /// Makes the folder the destination.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`].
    pub(crate) fn keep(self) -> Result<()> {
        self.put(&self.folder)
    }

    /// Makes a file in the folder the destination.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`].
    pub(crate) fn keep_file(self, file: &Path) -> Result<()> {
        self.put(file)
    }

    fn put(&self, what: &Path) -> Result<()> {
        // Only an empty folder is removed.
        let _ = fs::remove_dir(&self.destination);
        match fs::symlink_metadata(&self.destination) {
            Ok(_) => {
                let problem = "was made by another program meanwhile";
                Err(Error::new(ErrorKind::Invalid, self.destination.as_path(), problem).advise("give another name"))
            }
            Err(_) => fs::rename(what, &self.destination).map_err(Error::io("write", &self.destination)),
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// The thing that a path leads to.
enum Place {
    /// A device, a pipe or a socket.
    Stream(PathBuf),
    /// A file, which may be there already; the path has no links.
    Regular { path: PathBuf, permissions: Option<fs::Permissions> },
}

/// Follows links, the last of which may lead to a file that is not there yet.
fn place(path: &Path) -> io::Result<Place> {
    // Paths that end in a slash or a dot, and empty ones, name no file.
    let name = path.file_name().map_or(&[][..], |name| name.as_encoded_bytes());
    if name.is_empty() || !path.as_os_str().as_encoded_bytes().ends_with(name) {
        return Err(match path.is_dir() {
            true => io::ErrorKind::IsADirectory.into(),
            false => io::ErrorKind::InvalidFilename.into(),
        });
    }
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
        Ok(found) if found.is_file() => {
            // Renaming would replace even a file that must not be written.
            OpenOptions::new().write(true).open(path)?;
            Ok(Place::Regular { path: fs::canonicalize(path)?, permissions: Some(found.permissions()) })
        }
        // Only the system can follow the link behind `/dev/stdout`, whose target may be `pipe:[123]`.
        Ok(_) => Ok(Place::Stream(path.to_path_buf())),
        Err(problem) if problem.kind() == io::ErrorKind::NotFound => {
            let mut path = path.to_path_buf();
            // This ends: a circle of links is another error.
            while let Ok(target) = fs::read_link(&path) {
                path = path.parent().unwrap_or(Path::new("")).join(target);
            }
            Ok(Place::Regular { path, permissions: None })
        }
        Err(problem) => Err(problem),
    }
}

impl Place {
    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Place::Stream(path) => OpenOptions::new().write(true).open(path)?.write_all(bytes),
            Place::Regular { path, permissions } => {
                let (draft, mut file) = draft(path)?;
                let mut write = || {
                    // First, so that nobody reads what the old file hid.
                    if let Some(permissions) = permissions {
                        file.set_permissions(permissions.clone())?;
                    }
                    file.write_all(bytes)?;
                    file.sync_all()?;
                    fs::rename(&draft, path)
                };
                write().inspect_err(|_| {
                    let _ = fs::remove_file(&draft);
                })
            }
        }
    }
}

/// A name beside `path` for a draft, another one in every call.
fn beside(path: &Path) -> PathBuf {
    // Distinguishes threads; the process id distinguishes programs, but not those of two machines that share a folder.
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!(".respodiff-{}-{count}.partial", std::process::id()))
}

/// A new file beside `path`, under a name that nobody has.
fn draft(path: &Path) -> io::Result<(PathBuf, File)> {
    loop {
        let draft = beside(path);
        match OpenOptions::new().write(true).create_new(true).open(&draft) {
            Ok(file) => return Ok((draft, file)),
            Err(problem) if problem.kind() == io::ErrorKind::AlreadyExists => {}
            Err(problem) => return Err(problem),
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};

    #[test]
    fn links_stay_and_lead_to_the_new_file() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("inner")).unwrap();
        fs::write(at("inner/old"), "old").unwrap();
        symlink("inner/old", at("one")).unwrap();
        symlink(at("one"), at("two")).unwrap();
        symlink("inner/new", at("dangling")).unwrap();
        symlink("dangling", at("to a link")).unwrap();
        symlink("circle", at("circle")).unwrap();
        for (name, file) in [("two", "inner/old"), ("dangling", "inner/new"), ("to a link", "inner/new")] {
            check_writable(&at(name)).unwrap();
            write(&at(name), name.as_bytes()).unwrap();
            assert!(fs::symlink_metadata(at(name)).unwrap().is_symlink(), "{name}");
            assert_eq!(fs::read(at(file)).unwrap(), name.as_bytes());
        }
        copy(&at("two"), &at("dangling")).unwrap();
        assert_eq!(fs::read(at("inner/new")).unwrap(), b"two");
        for name in ["circle", "inner", "inner/", "inner/old/x", "nowhere/x", "nowhere/", "new/.", ".."] {
            assert!(check_writable(&at(name)).is_err() && write(&at(name), b"x").is_err(), "{name}");
        }
        assert!(check_writable(Path::new("")).is_err());
        // No draft is left.
        assert_eq!(fs::read_dir(at("inner")).unwrap().count(), 2);
    }

    #[test]
    fn pipes_devices_and_sockets_stay_what_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        check_writable(&pipe).unwrap();
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || {
                let mut text = String::new();
                File::open(pipe).unwrap().read_to_string(&mut text).unwrap();
                text
            }
        });
        write(&pipe, b"picture").unwrap();
        assert_eq!(reader.join().unwrap(), "picture");
        assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo());
        // A pipe without a path, as /dev/stdout is one.
        let (mut reader, writer) = io::pipe().unwrap();
        let path = PathBuf::from(format!("/proc/self/fd/{}", writer.as_raw_fd()));
        check_writable(&path).unwrap();
        write(&path, b"picture").unwrap();
        drop(writer);
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"picture");
        // A link, for as root the device itself would be at stake.
        let link = folder.path().join("null");
        symlink("/dev/null", &link).unwrap();
        write(&link, b"picture").unwrap();
        assert!(fs::metadata(&link).unwrap().file_type().is_char_device());
        let socket = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(write(&socket, b"picture").is_err());
        assert!(fs::metadata(&socket).unwrap().file_type().is_socket());
    }

    #[test]
    fn permissions_are_kept_and_taken_names_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "old").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        // Drafts of another program with this process's number.
        for count in 0..1000 {
            fs::write(folder.path().join(format!(".respodiff-{}-{count}.partial", std::process::id())), "").unwrap();
        }
        write(&file, b"new").unwrap();
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(fs::read(&file).unwrap(), b"new");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1001);
    }

    /// Who may not write a file or its folder changes nothing, also where the tests run as root.
    #[test]
    fn refusals_leave_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let set = |name: &str, mode| fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
        fs::create_dir(at("locked")).unwrap();
        fs::write(at("locked/file"), "old").unwrap();
        fs::write(at("file"), "old").unwrap();
        for (name, mode) in [("", 0o777), ("locked", 0o555), ("locked/file", 0o666), ("file", 0o444)] {
            set(name, mode);
        }
        let as_nobody = || {
            // SAFETY: this makes the calling thread alone access files as the user `nobody`, where it may change users.
            unsafe { libc::setfsuid(65534) };
            for name in ["file", "locked/file", "locked/new"] {
                assert!(check_writable(&at(name)).is_err() && write(&at(name), b"new").is_err(), "{name}");
            }
        };
        std::thread::scope(|scope| scope.spawn(as_nobody).join()).unwrap();
        assert_eq!(fs::read(at("file")).unwrap(), b"old");
        assert_eq!(fs::read(at("locked/file")).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        set("locked", 0o755);
    }
}
