//! Folders of pictures, and the prompts in their metadata.

use crate::image::{GenerationInfo, JSON_KEYWORD, PARAMETERS_KEYWORD, Picture, read_png_text};
use crate::{Error, Result};
use std::io::Cursor;
use std::path::{Path, PathBuf};
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

/// The largest number of pixels of a picture, as in Pillow's check against decompression bombs.
const MOST_PIXELS: usize = 1 << 28;

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
/// orientation in EXIF is not applied. JPEG's pixels may differ from libjpeg-turbo's by rounding.
///
/// # Errors
/// [`crate::ErrorKind::Damaged`] if it is damaged or of another format than its name says, [`crate::ErrorKind::Io`].
pub fn read(path: &Path) -> Result<Picture> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let picture = match format(path)? {
        Some(Format::Png) => png(&bytes),
        Some(Format::Jpeg) => jpeg(&bytes),
        Some(Format::WebP) => webp(&bytes),
        None => Err("not a PNG, JPEG or WebP file by its name".into()),
    };
    let damaged = |problem| {
        Error::damaged(path, format!("cannot be read as a picture: {problem}")).advise("replace or remove it")
    };
    picture.map_err(damaged)
}

type Decoded<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn checked(width: usize, height: usize) -> Decoded<(u32, u32)> {
    match width.checked_mul(height) {
        Some(1..MOST_PIXELS) => Ok((u32::try_from(width)?, u32::try_from(height)?)),
        _ => Err(format!("it has {width}x{height} pixels").into()),
    }
}

fn png(bytes: &[u8]) -> Decoded<Picture> {
    let mut decoder = png::Decoder::new(Cursor::new(bytes));
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info()?;
    let (width, height) = checked(reader.info().width as usize, reader.info().height as usize)?;
    let mut pixels = vec![0; reader.output_buffer_size().ok_or("it is too large")?];
    let frame = reader.next_frame(&mut pixels)?;
    pixels.truncate(frame.buffer_size());
    reader.finish()?;
    let rgb = match frame.color_type.samples() {
        1 => pixels.iter().flat_map(|&grey| [grey; 3]).collect(),
        2 => pixels.chunks_exact(2).flat_map(|pixel| [pixel[0]; 3]).collect(),
        3 => pixels,
        _ => pixels.chunks_exact(4).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect(),
    };
    Ok(Picture { width, height, rgb })
}

fn jpeg(bytes: &[u8]) -> Decoded<Picture> {
    // Strictly, for a truncated file would otherwise be filled up with grey.
    let options = DecoderOptions::default().jpeg_set_out_colorspace(ColorSpace::RGB).set_strict_mode(true);
    // Behind the last scan's header, this marker is the end of the picture and nothing else. The decoder does not miss
    // it.
    let find = |marker: [u8; 2]| bytes.windows(2).rposition(|bytes| bytes == marker);
    if find([0xff, 0xd9]) <= find([0xff, 0xda]) {
        return Err("it is cut off".into());
    }
    let mut decoder = JpegDecoder::new_with_options(Cursor::new(bytes), options);
    decoder.decode_headers()?;
    let (width, height) = decoder.dimensions().ok_or("it has no size")?;
    let (width, height) = checked(width, height)?;
    Ok(Picture { width, height, rgb: decoder.decode()? })
}

fn webp(bytes: &[u8]) -> Decoded<Picture> {
    let mut decoder = image_webp::WebPDecoder::new(Cursor::new(bytes))?;
    let (width, height) = decoder.dimensions();
    checked(width as usize, height as usize)?;
    let mut pixels = vec![0; decoder.output_buffer_size().ok_or("it is too large")?];
    decoder.read_image(&mut pixels)?;
    let rgb = match decoder.has_alpha() {
        true => pixels.chunks_exact(4).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect(),
        false => pixels,
    };
    Ok(Picture { width, height, rgb })
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
        return Ok(text(PARAMETERS_KEYWORD).and_then(|text| of_parameters(text)));
    }
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    Ok(comment(&bytes).and_then(|text| of_parameters(&text)))
}

/// The prompt in A1111's text: all that comes before the negative prompt, or before the line of settings.
fn of_parameters(text: &str) -> Option<String> {
    let settings = text.rfind("\nSteps: ").or_else(|| text.starts_with("Steps: ").then_some(0))?;
    let end = text[..settings].find("\nNegative prompt: ").unwrap_or(settings);
    Some(text[..end].trim().to_string())
}

/// The UTF-16 text of EXIF's UserComment (tag 0x9286) in a file: an entry of a directory, whose offset counts from the
/// header of the TIFF structure around it.
fn comment(file: &[u8]) -> Option<String> {
    let start = file.windows(6).position(|bytes| matches!(bytes, b"II*\0\x08\0" | b"MM\0*\0\0"))?;
    let tiff = &file[start..];
    let big = tiff.starts_with(b"MM");
    let number = |at: usize, len: usize| -> Option<usize> {
        let bytes = tiff.get(at..at.checked_add(len)?)?;
        let join = |n: usize, b: &u8| n << 8 | usize::from(*b);
        Some(if big { bytes.iter().fold(0, join) } else { bytes.iter().rev().fold(0, join) })
    };
    let entry = |directory: usize, tag: usize| -> Option<(usize, usize)> {
        let count = number(directory, 2)?;
        let at = (0..count).map(|i| directory + 2 + 12 * i).find(|&at| number(at, 2) == Some(tag))?;
        Some((number(at + 4, 4)?, number(at + 8, 4)?))
    };
    let (_, directory) = entry(number(4, 4)?, 0x8769)?;
    let (len, at) = entry(directory, 0x9286)?;
    let text = tiff.get(at..at.checked_add(len)?)?.strip_prefix(b"UNICODE\0")?;
    // A1111 and we write UTF-16 with the high byte first, whatever the order of the structure.
    let units: Vec<u16> = text.as_chunks::<2>().0.iter().map(|&unit| u16::from_be_bytes(unit)).collect();
    String::from_utf16(&units).ok()
}
