//! Reading files, atomic writes, and locks of run folders. All crates of the workspace use this module.
//!
//! Inputs are regular files, or links to them. FIFOs, sockets and devices are refused at once, and no more bytes are
//! read than the metadata of the file report.
//!
//! Outputs appear completely or not at all:
//!
//! ```text
//! write to <folder>/.ternary-XXXXXXXXXXXX.partial      random name, locked while it is written
//! sync the file
//! rename it to its final name                          readers see the old file or the new one
//! sync the folder                                      the name survives a power failure
//! ```
//!
//! An existing regular file is replaced. A link is replaced itself; its target is never changed. Anything else at the
//! path is an error. Scratch files of killed processes are removed by the next write into the folder, once they are
//! unlocked and ten minutes old.

mod lock;

use crate::FormatError;
pub use lock::{LOCK, LockError, RunLock};
use std::{
    fs::{self, DirEntry, File, Metadata, OpenOptions},
    io::{self, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::Duration,
};
use tempfile::{Builder, TempDir, TempPath};

/// Scratch files are named by this prefix, [`RANDOM_CHARS`] letters and digits, and [`SUFFIX`].
const PREFIX: &str = ".ternary-";
const SUFFIX: &str = ".partial";
const RANDOM_CHARS: usize = 12;
/// Age after which an unlocked scratch file belongs to a killed process. A new one is unlocked for a moment.
const ABANDONED: Duration = Duration::from_secs(600);

/// Opens a regular file for reading.
///
/// # Errors
/// Those of the file system. `InvalidInput`: not a regular file (`IsADirectory`: a folder).
pub fn open(path: &Path) -> io::Result<File> {
    expect_plain(&fs::metadata(path)?)?;
    let mut options = File::options();
    // The path may name a FIFO by now: a non-blocking open does not wait for its writer.
    let file = with_flags(options.read(true), Flags::NonBlocking).open(path)?;
    expect_plain(&file.metadata()?)?;
    Ok(file)
}

/// Reads a regular file.
///
/// # Errors
/// As [`open`].
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_limited(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Reads a regular text file.
///
/// # Errors
/// As [`open`]. `InvalidData`: not UTF-8.
pub fn read_to_string(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    open_limited(path)?.read_to_string(&mut text)?;
    Ok(text)
}

/// Opens a file up to the length that its metadata report, so that a growing file ends.
fn open_limited(path: &Path) -> io::Result<impl Read> {
    let file = open(path)?;
    let length = file.metadata()?.len();
    Ok(file.take(length))
}

/// Describes what is at a path: a plain file, a folder, a symbolic link, a FIFO, a socket or a device.
pub fn kind(metadata: &Metadata) -> &'static str {
    let kind = metadata.file_type();
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_fifo() {
            return "a FIFO";
        } else if kind.is_socket() {
            return "a socket";
        } else if kind.is_char_device() || kind.is_block_device() {
            return "a device";
        }
    }
    match () {
        () if kind.is_file() => "a plain file",
        () if kind.is_dir() => "a folder",
        () if kind.is_symlink() => "a symbolic link",
        () => "something else",
    }
}

fn expect_plain(metadata: &Metadata) -> io::Result<()> {
    if metadata.is_file() {
        return Ok(());
    }
    let error = if metadata.is_dir() { io::ErrorKind::IsADirectory } else { io::ErrorKind::InvalidInput };
    Err(io::Error::new(error, format!("expected a plain file, found {}", kind(metadata))))
}

/// A file in the process of an atomic write. [`commit`](Self::commit) gives it its name, replacing an existing file.
/// Dropping it before leaves nothing behind.
pub struct NewFile {
    file: BufWriter<File>,
    scratch: TempPath,
    path: PathBuf,
}

impl NewFile {
    /// Opens a scratch file in the folder of `path`.
    ///
    /// # Errors
    /// Those of the file system. `InvalidInput` or `IsADirectory`: `path` is neither a regular file nor a link.
    /// `NotFound`: the folder of `path` does not exist.
    pub fn create(path: &Path) -> io::Result<Self> {
        match metadata_of_entry(path)? {
            Some(entry) if !entry.is_symlink() => expect_plain(&entry)?,
            _ => (),
        }
        let folder = parent(path);
        remove_abandoned(folder);
        let new =
            scratch_builder().make_in(folder, |scratch| File::create_new(scratch)).map_err(|error| {
                if error.kind() != io::ErrorKind::NotFound {
                    return error;
                }
                // The error of the system would name the scratch file, which the user does not know.
                io::Error::new(error.kind(), format!("the folder {} does not exist", folder.display()))
            })?;
        let (file, scratch) = new.into_parts();
        // Protects the file from `remove_abandoned`. On a file system without locks, only its age does.
        let _ = file.try_lock();
        Ok(Self { file: BufWriter::new(file), scratch, path: path.into() })
    }

    /// Syncs the file and renames it to its final name.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn commit(self) -> io::Result<()> {
        self.file.into_inner()?.sync_all()?;
        self.scratch.persist(&self.path)?;
        sync_folder(parent(&self.path))
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for NewFile {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.file.seek(position)
    }
}

/// Writes a whole file atomically, replacing an existing one.
///
/// # Errors
/// As [`NewFile`].
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = NewFile::create(path)?;
    file.write_all(bytes)?;
    file.commit()
}

/// An atomic write with the errors of model files.
pub(crate) fn atomic_write(
    path: &Path,
    write: impl FnOnce(&mut NewFile) -> Result<(), FormatError>,
) -> Result<(), FormatError> {
    let mut file = NewFile::create(path).map_err(FormatError::io(path))?;
    write(&mut file)?;
    file.commit().map_err(FormatError::io(path))
}

/// Writes and syncs a file that does not exist yet, such as one in a [`NewFolder`].
///
/// # Errors
/// Those of the file system. `AlreadyExists`.
pub fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// A folder in the process of an atomic write. [`commit`](Self::commit) gives it its name. Dropping it before leaves
/// nothing behind.
pub struct NewFolder {
    scratch: TempDir,
    path: PathBuf,
    /// Protects the folder from [`remove_abandoned`], on systems that can lock folders.
    _lock: Option<File>,
}

impl NewFolder {
    /// Creates a scratch folder next to `path`, and missing parent folders.
    ///
    /// # Errors
    /// Those of the file system. `AlreadyExists`: `path` exists.
    pub fn create(path: &Path) -> io::Result<Self> {
        expect_vacant(path)?;
        Self::successor(path)
    }

    /// Creates a scratch folder for a `path` that still exists. The caller must remove or rename the old folder
    /// before [`commit`](Self::commit).
    ///
    /// # Errors
    /// Those of the file system.
    pub fn successor(path: &Path) -> io::Result<Self> {
        fs::create_dir_all(parent(path))?;
        remove_abandoned(parent(path));
        let scratch = scratch_folder(parent(path))?;
        let lock = File::open(scratch.path()).ok().filter(|folder| folder.try_lock().is_ok());
        Ok(Self { scratch, path: path.into(), _lock: lock })
    }

    /// The folder to write files to. The writer of each file must sync it.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// Renames the folder to its final name.
    ///
    /// # Errors
    /// Those of the file system. `AlreadyExists`.
    pub fn commit(self) -> io::Result<()> {
        sync_folder(self.scratch.path())?;
        expect_vacant(&self.path)?;
        fs::rename(self.scratch.path(), &self.path)?;
        let _ = self.scratch.keep();
        sync_folder(parent(&self.path))
    }
}

/// Removes a folder, or a link to one. It is renamed first, so a killed process never leaves half of it under its
/// name.
///
/// # Errors
/// Those of the file system.
pub fn remove_folder(path: &Path) -> io::Result<()> {
    let scratch = scratch_folder(parent(path))?;
    fs::rename(path, scratch.path().join("removed"))?;
    scratch.close()
}

/// Removes scratch files and folders of killed processes. No other process may write to the folder; see [`RunLock`].
///
/// # Errors
/// Those of the file system.
pub fn remove_leftovers(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(is_scratch) {
            remove(&entry)?;
        }
    }
    Ok(())
}

fn remove(entry: &DirEntry) -> io::Result<()> {
    if entry.file_type()?.is_dir() { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) }
}

/// Removes scratch files and folders of killed processes from a folder that other processes may write to: those that
/// are old and unlocked. Errors are ignored.
fn remove_abandoned(folder: &Path) {
    let abandoned = |entry: &DirEntry| {
        let is_ours = entry.file_name().to_str().is_some_and(is_scratch);
        // A scratch file exists for a moment before its owner locks it.
        let is_old = || entry.metadata().ok()?.modified().ok()?.elapsed().ok().map(|age| age > ABANDONED);
        // No writer creates a link under such a name, so a link is not ours.
        let is_free = || open_in_folder(&entry.path()).is_ok_and(|file| file.try_lock().is_ok());
        is_ours && is_old() == Some(true) && is_free()
    };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten().filter(abandoned) {
        let _ = remove(&entry);
    }
}

/// Opens a file or folder to lock it, without following a link.
fn open_in_folder(path: &Path) -> io::Result<File> {
    with_flags(File::options().read(true), Flags::InPlace).open(path)
}

fn is_scratch(name: &str) -> bool {
    let random = name.strip_prefix(PREFIX).and_then(|name| name.strip_suffix(SUFFIX));
    random.is_some_and(|random| {
        random.len() == RANDOM_CHARS && random.bytes().all(|b| b.is_ascii_alphanumeric())
    })
}

fn scratch_builder() -> Builder<'static, 'static> {
    let mut builder = Builder::new();
    builder.prefix(PREFIX).suffix(SUFFIX).rand_bytes(RANDOM_CHARS);
    builder
}

fn scratch_folder(parent: &Path) -> io::Result<TempDir> {
    let mut builder = scratch_builder();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // The permissions of any new folder; the umask applies.
        builder.permissions(fs::Permissions::from_mode(0o777));
    }
    builder.tempdir_in(parent)
}

/// Opens a file of a run folder to continue it, such as a log. A link is removed, never followed.
///
/// # Errors
/// Those of the file system. `InvalidInput` or `IsADirectory`: `path` is neither a regular file nor a link.
pub fn open_in_place(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    match metadata_of_entry(path)? {
        Some(entry) if entry.is_symlink() => fs::remove_file(path)?,
        Some(entry) => expect_plain(&entry)?,
        None => (),
    }
    let file = with_flags(options, Flags::InPlace).open(path)?;
    expect_plain(&file.metadata()?)?;
    Ok(file)
}

enum Flags {
    /// Opening a FIFO does not block.
    NonBlocking,
    /// In addition, links are not followed.
    InPlace,
}

fn with_flags(options: &mut OpenOptions, flags: Flags) -> &mut OpenOptions {
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.custom_flags(match flags {
            Flags::NonBlocking => libc::O_NONBLOCK,
            Flags::InPlace => libc::O_NONBLOCK | libc::O_NOFOLLOW,
        })
    }
    #[cfg(not(unix))]
    {
        let _ = flags;
        options
    }
}

/// Metadata of `path` itself, without following a link; `None` if it does not exist.
fn metadata_of_entry(path: &Path) -> io::Result<Option<Metadata>> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn expect_vacant(path: &Path) -> io::Result<()> {
    match metadata_of_entry(path)? {
        None => Ok(()),
        Some(entry) => Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            format!("expected nothing, found {}", kind(&entry)),
        )),
    }
}

/// Returns whether `path` is directly in `folder`, however both are spelled.
pub fn is_in(path: &Path, folder: &Path) -> bool {
    let [found, expected] = [parent(path), folder].map(fs::canonicalize);
    found.is_ok_and(|found| expected.is_ok_and(|expected| found == expected))
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes the names in a folder durable. Systems other than Unix have no call for this.
///
/// # Errors
/// Those of the file system.
pub fn sync_folder(path: &Path) -> io::Result<()> {
    match File::open(path) {
        Ok(folder) if cfg!(unix) => folder.sync_all(),
        // A folder with write but without read permission cannot be synced.
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_as_a_whole_or_stays_as_it_was() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("file");
        write(&path, b"old").unwrap();
        let mut unfinished = NewFile::create(&path).unwrap();
        unfinished.write_all(b"new").unwrap();
        assert_eq!(names(home.path()).len(), 2);
        drop(unfinished);
        assert_eq!((read(&path).unwrap(), names(home.path())), (b"old".to_vec(), vec!["file".to_string()]));
        write(&path, b"new").unwrap();
        assert_eq!(read_to_string(&path).unwrap(), "new");
        assert_eq!(names(home.path()), ["file"]);
        assert_eq!(write(&home.path().join("no/file"), b"").unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(write(home.path(), b"").unwrap_err().kind(), io::ErrorKind::IsADirectory);
    }

    #[test]
    fn a_folder_appears_as_a_whole_and_replaces_nothing() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("above/folder");
        let unfinished = NewFolder::create(&path).unwrap();
        write_new(&unfinished.scratch().join("file"), b"x").unwrap();
        drop(unfinished);
        assert!(names(&home.path().join("above")).is_empty());
        let folder = NewFolder::create(&path).unwrap();
        write_new(&folder.scratch().join("file"), b"x").unwrap();
        folder.commit().unwrap();
        assert_eq!(read(&path.join("file")).unwrap(), b"x");
        assert_eq!(NewFolder::create(&path).err().unwrap().kind(), io::ErrorKind::AlreadyExists);
        remove_folder(&path).unwrap();
        assert!(names(&home.path().join("above")).is_empty());
    }

    #[test]
    fn only_our_own_leftovers_are_removed() {
        let home = tempfile::tempdir().unwrap();
        let theirs = [".ternary-short.partial", "file.partial", ".ternary-0123456789a_.partial", "x.scratch"];
        for name in theirs {
            write(&home.path().join(name), b"theirs").unwrap();
        }
        std::mem::forget(NewFile::create(&home.path().join("file")).unwrap());
        std::mem::forget(NewFolder::create(&home.path().join("folder")).unwrap());
        assert_eq!(names(home.path()).len(), theirs.len() + 2);
        remove_leftovers(home.path()).unwrap();
        let mut expected = theirs.map(String::from);
        expected.sort();
        assert_eq!(names(home.path()), expected);
    }

    #[test]
    fn scratch_files_of_killed_processes_are_removed_later() {
        let home = tempfile::tempdir().unwrap();
        let age = |name: &str| {
            let old = std::time::SystemTime::now() - 2 * ABANDONED;
            File::open(home.path().join(name)).unwrap().set_modified(old).unwrap();
        };
        let killed = [".ternary-0123456789ab.partial", ".ternary-0123456789cd.partial"];
        write_new(&home.path().join(killed[0]), b"x").unwrap();
        fs::create_dir_all(home.path().join(killed[1]).join("inner")).unwrap();
        let living = NewFile::create(&home.path().join("living")).unwrap();
        let folder = NewFolder::create(&home.path().join("folder")).unwrap();
        // Too young.
        write(&home.path().join("a"), b"").unwrap();
        assert_eq!(names(home.path()).len(), 5);
        names(home.path()).iter().for_each(|name| age(name));
        write(&home.path().join("a"), b"").unwrap();
        assert_eq!(names(home.path()).len(), 3);
        living.commit().unwrap();
        folder.commit().unwrap();
        assert_eq!(names(home.path()), ["a", "folder", "living"]);
    }

    #[cfg(unix)]
    #[test]
    fn links_are_replaced_and_special_files_are_refused() {
        use std::os::unix::{fs::symlink, net::UnixListener};
        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        write(&at("target"), b"mine").unwrap();
        for name in ["written", "appended"] {
            symlink(at("target"), at(name)).unwrap();
        }
        assert_eq!(read(&at("written")).unwrap(), b"mine", "inputs may be links");
        write(&at("written"), b"ours").unwrap();
        let mut options = File::options();
        let file = open_in_place(&at("appended"), options.create(true).append(true));
        file.unwrap().write_all(b"ours").unwrap();
        for name in ["written", "appended"] {
            assert!(fs::symlink_metadata(at(name)).unwrap().is_file());
            assert_eq!(read(&at(name)).unwrap(), b"ours");
        }
        assert_eq!(read(&at("target")).unwrap(), b"mine");

        let _socket = UnixListener::bind(at("socket")).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(at("fifo")).status().unwrap().success());
        symlink("/dev/zero", at("zero")).unwrap();
        symlink(at("fifo"), at("pipe")).unwrap();
        for (name, found) in
            [("fifo", "a FIFO"), ("pipe", "a FIFO"), ("socket", "a socket"), ("zero", "a device")]
        {
            let error = read(&at(name)).unwrap_err().to_string();
            assert_eq!(error, format!("expected a plain file, found {found}"));
        }
        for name in ["fifo", "socket"] {
            assert_eq!(write(&at(name), b"").unwrap_err().kind(), io::ErrorKind::InvalidInput);
            let mut options = File::options();
            let error = open_in_place(&at(name), options.write(true)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
