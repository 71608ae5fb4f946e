//! Files that appear whole or not at all.

use crate::FormatError;
use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
};

/// Writes `path` under a scratch name beside it, and renames it once it is on the disk. What `write` fails with is
/// passed on, and nothing is left behind.
pub(crate) fn replace(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<(), FormatError>,
) -> Result<(), FormatError> {
    let mut scratch = path.as_os_str().to_owned();
    scratch.push(".partial");
    let scratch = Path::new(&scratch);
    let result = (|| {
        let mut file = BufWriter::new(File::create(scratch).map_err(FormatError::io(scratch))?);
        write(&mut file)?;
        file.flush().and_then(|()| file.get_ref().sync_all()).map_err(FormatError::io(scratch))?;
        fs::rename(scratch, path).map_err(FormatError::io(path))?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // Where folders cannot be opened, the rename is as durable as the system makes it.
        File::open(folder).and_then(|folder| folder.sync_all()).or(Ok(()))
    })();
    if result.is_err() {
        let _ = fs::remove_file(scratch);
    }
    result
}
