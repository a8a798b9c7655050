//! Folders of pictures, and the prompts in their metadata.

use crate::image::{
    GenerationInfo, JSON_KEYWORD, PARAMETERS_KEYWORD, Parameters, Picture, exif, read_png_text, stored,
};
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// The formats that are read.
#[derive(Clone, Copy)]
enum Format {
    Png,
    Jpeg,
    WebP,
}

/// The format that a file's name promises; an error for the other formats that clean-fid would read.
fn format(path: &Path) -> Result<Option<Format>> {
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
    Ok(match extension.as_deref() {
        Some("png") => Some(Format::Png),
        Some("jpg" | "jpeg") => Some(Format::Jpeg),
        Some("webp") => Some(Format::WebP),
        Some("bmp" | "pgm" | "ppm" | "tif" | "tiff") => {
            return Err(
                Error::unsupported(path, "of a format that is not read").advise("convert it to PNG, or remove it")
            );
        }
        _ => None,
    })
}

/// The pictures in a folder and the folders in it, in the order of their paths: PNG, JPEG and WebP.
///
/// # Errors
/// [`crate::ErrorKind::NotFound`] if there are none, [`crate::ErrorKind::Unsupported`] for pictures of other formats,
/// [`crate::ErrorKind::Io`].
pub fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    collect(folder, &mut found)?;
    found.sort();
    match found.is_empty() {
        true => Err(Error::not_found(folder, "holds no pictures").advise("give a folder of PNG, JPEG or WebP files")),
        false => Ok(found),
    }
}

fn collect(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let entry = entry.map_err(Error::io("read", folder))?;
        let path = entry.path();
        // Links to folders are not followed, since they may form a circle.
        if entry.file_type().map_err(Error::io("read", &path))?.is_dir() {
            collect(&path, found)?;
        } else if format(&path)?.is_some() {
            found.push(path);
        }
    }
    Ok(())
}

/// Reads a picture as RGB, as Pillow's `convert("RGB")` does: grey levels are repeated, transparency is dropped, the
/// orientation in EXIF is not applied.
///
/// # Errors
/// [`crate::ErrorKind::Damaged`] if it is damaged, [`crate::ErrorKind::OutOfMemory`], [`crate::ErrorKind::Io`].
pub fn read(path: &Path) -> Result<Picture> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    Ok(stored(&bytes, path)?.picture)
}

/// The prompt in a picture's metadata, as [`GenerationInfo`] or A1111 write it, if there is one. JPEG and WebP hold
/// A1111's text in EXIF.
///
/// # Errors
/// [`crate::ErrorKind::Damaged`] or [`crate::ErrorKind::Io`] if the file cannot be read.
pub fn prompt(path: &Path) -> Result<Option<String>> {
    if let Some(Format::Png) = format(path)? {
        let texts = read_png_text(path)?;
        let text = |keyword: &str| texts.iter().find(|(known, _)| known == keyword).map(|(_, text)| text);
        if let Some(json) = text(JSON_KEYWORD) {
            let info: GenerationInfo = serde_json::from_str(json)
                .map_err(|e| Error::damaged(path, format!("its metadata is not a picture's record: {e}")))?;
            return Ok(Some(info.prompt));
        }
        return Ok(text(PARAMETERS_KEYWORD).and_then(|text| prompt_of(text)));
    }
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    Ok(exif::comment(&bytes).and_then(|text| prompt_of(&text)))
}

/// The prompt in A1111's text.
fn prompt_of(text: &str) -> Option<String> {
    Parameters::parse(text).map(|parameters| parameters.prompt)
}
