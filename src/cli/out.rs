//! Output of pictures: file names, templates and formats.

use super::sign::Signing;
use crate::files;
use crate::image::{GenerationInfo, XMP, xmp_segment};
use crate::{Error, ErrorKind, Picture, Result, Size, Subject};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A picture file's format, by its extension.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Png,
    /// Quality 95, without chroma subsampling.
    Jpeg,
    /// Lossless.
    WebP,
}

impl Format {
    fn of(path: &Path) -> Result<Self> {
        let Some(extension) = path.extension() else { return Ok(Format::Png) };
        match extension.to_string_lossy().to_lowercase().as_str() {
            "png" => Ok(Format::Png),
            "jpg" | "jpeg" => Ok(Format::Jpeg),
            "webp" => Ok(Format::WebP),
            other => Err(Error::invalid("out", format!("`{other}` is not a picture format"))
                .advise("end the name in .png, .jpg or .webp")),
        }
    }

    fn media_type(self) -> &'static str {
        match self {
            Format::Png => "image/png",
            Format::Jpeg => "image/jpeg",
            Format::WebP => "image/webp",
        }
    }
}

/// The names of a run's pictures.
pub(super) enum Pictures {
    /// The only picture goes to stdout, as PNG.
    Stdout,
    /// Each picture goes to a file of its own.
    Files(Vec<PathBuf>),
}

/// The parts of a picture's name that differ from picture to picture.
pub(super) struct Named<'a> {
    pub(super) prompt: &'a str,
    pub(super) seed: u64,
}

/// Chooses a file name for each picture, and checks that it can be written. The folder of `out` is created if
/// it is not there. Names that the user did not choose overwrite no file. `seed` is the run's.
pub(super) fn pictures(out: Option<&Path>, pictures: &[Named], seed: u64, size: Option<Size>) -> Result<Pictures> {
    let text = out.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
    if text == "-" {
        return match pictures.len() {
            1 => Ok(Pictures::Stdout),
            several => Err(Error::invalid("out", format!("{several} pictures cannot go to stdout")).advise("make one")),
        };
    }
    let is_folder = text.ends_with(['/', std::path::MAIN_SEPARATOR]);
    let folder = out.filter(|path| is_folder || path.is_dir());
    let own_name = out.is_none() || folder.is_some();
    let first = pictures.first().map_or("", |picture| picture.prompt);
    let one_prompt = pictures.iter().all(|picture| picture.prompt == first)
        && pictures.first().is_none_or(|picture| picture.seed == seed);
    let default = match one_prompt {
        true => PathBuf::from(format!("{}-{seed}.png", slug(first))),
        false => PathBuf::from("{prompt}-{seed}.png"),
    };
    let pattern = match (out, folder) {
        (_, Some(folder)) => folder.join(default),
        (Some(path), None) => path.to_path_buf(),
        (None, None) => default,
    };
    Format::of(&pattern)?;
    if let Some(folder) = pattern.parent().filter(|folder| folder.to_string_lossy().contains(['{', '}'])) {
        let problem = format!("{}: only the file's own name is a template, not its folder's", folder.display());
        return Err(Error::invalid("out", problem).advise("leave braces out of the folder"));
    }
    let mut names = named(&pattern, pictures, size)?;
    let mut count = 1;
    while own_name && names.iter().any(|name| name.exists()) {
        let stem = pattern.file_stem().unwrap_or_default().to_string_lossy();
        names = named(&pattern.with_file_name(format!("{stem}_{count}.png")), pictures, size)?;
        count += 1;
    }
    // Mistakes show before the work and not after it.
    if let Some(folder) = pattern.parent() {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    }
    for name in names.first().into_iter().chain(names.last()) {
        files::check_writable(name)?;
    }
    Ok(Pictures::Files(names))
}

/// The names that follow from a pattern: `{prompt}`, `{seed}`, `{i}`, `{width}` and `{height}` are replaced. If two
/// names would be equal, all get `-0`, `-1` and so on.
fn named(pattern: &Path, pictures: &[Named], size: Option<Size>) -> Result<Vec<PathBuf>> {
    let file = pattern.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let fill = |i: usize, picture: &Named| -> Result<PathBuf> {
        let mut name = String::new();
        let mut rest = file.as_str();
        while let Some((before, after)) = rest.split_once('{') {
            let Some((key, after)) = after.split_once('}') else {
                return Err(Error::invalid("out", format!("`{{{after}` is not closed")).advise("write {seed}"));
            };
            let value = match (key, size) {
                ("prompt", _) => slug(picture.prompt),
                ("seed", _) => picture.seed.to_string(),
                ("i", _) => i.to_string(),
                ("width", Some(size)) => size.width.to_string(),
                ("height", Some(size)) => size.height.to_string(),
                ("width" | "height", None) => {
                    return Err(Error::invalid("out", format!("`{{{key}}}` is not known before the model is loaded"))
                        .advise("give --width and --height, or leave it out"));
                }
                _ => {
                    return Err(Error::invalid("out", format!("`{{{key}}}` is not known"))
                        .advise("use {prompt}, {seed}, {i}, {width} and {height}"));
                }
            };
            name = name + before + &value;
            rest = after;
        }
        Ok(pattern.with_file_name(name + rest))
    };
    let mut names = pictures.iter().enumerate().map(|(i, picture)| fill(i, picture)).collect::<Result<Vec<_>>>()?;
    let distinct: std::collections::HashSet<&PathBuf> = names.iter().collect();
    if distinct.len() < names.len() {
        for (i, name) in names.iter_mut().enumerate() {
            let stem = name.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let extension = name.extension().map_or("png".into(), |e| e.to_string_lossy().into_owned());
            *name = name.with_file_name(format!("{stem}-{i}.{extension}"));
        }
    }
    Ok(names)
}

/// The words of a prompt as a file's name.
fn slug(prompt: &str) -> String {
    let words: String = prompt.chars().map(|c| if c.is_alphanumeric() { c } else { ' ' }).collect();
    let mut slug = words.split_whitespace().collect::<Vec<_>>().join("-");
    // File systems limit names to 255 bytes.
    slug.truncate(slug.floor_char_boundary(100));
    if slug.is_empty() { "image".into() } else { slug }
}

/// Writes a picture in the format of its file name, together with its generation parameters.
pub(super) fn save(picture: &Picture, path: &Path, info: &GenerationInfo, signing: &Signing) -> Result<()> {
    let format = Format::of(path)?;
    files::write(path, &signing.sign(encode(picture, format, info)?, format.media_type())?)
}

/// Writes a picture to stdout, as PNG.
pub(super) fn print(picture: &Picture, info: &GenerationInfo, signing: &Signing) -> Result<()> {
    let bytes = signing.sign(picture.to_recorded_png(info)?, Format::Png.media_type())?;
    let mut out = std::io::stdout().lock();
    out.write_all(&bytes).and_then(|()| out.flush()).map_err(Error::io("write", "stdout"))
}

fn encode(picture: &Picture, format: Format, info: &GenerationInfo) -> Result<Vec<u8>> {
    let parameters = info.parameters();
    let refused = |problem: String| Error::new(ErrorKind::Unsupported, Subject::Field("out"), problem);
    let mut bytes = Vec::new();
    match format {
        Format::Png => return picture.to_recorded_png(info),
        Format::Jpeg => {
            let (Ok(width), Ok(height)) = (u16::try_from(picture.width), u16::try_from(picture.height)) else {
                return Err(refused("JPEG allows at most 65535 pixels per side".into()));
            };
            let mut encoder = jpeg_encoder::Encoder::new(&mut bytes, 95);
            encoder.set_sampling_factor(jpeg_encoder::SamplingFactor::F_1_1);
            let segment = [b"Exif\0\0", &exif(&parameters)[..]].concat();
            if encoder.add_app_segment(1, segment).is_err() {
                super::warn("the picture's parameters are left out, since they exceed JPEG's limit of 64 KiB");
            }
            let encoded = encoder
                .add_app_segment(1, xmp_segment())
                .and_then(|()| encoder.encode(&picture.rgb, width, height, jpeg_encoder::ColorType::Rgb));
            encoded.map_err(|problem| refused(format!("the picture cannot be written as JPEG: {problem}")))?;
        }
        Format::WebP => {
            let mut encoder = image_webp::WebPEncoder::new(&mut bytes);
            encoder.set_exif_metadata(exif(&parameters));
            encoder.set_xmp_metadata(XMP.into());
            let encoded = encoder.encode(&picture.rgb, picture.width, picture.height, image_webp::ColorType::Rgb8);
            encoded.map_err(|problem| refused(format!("the picture cannot be written as WebP: {problem}")))?;
        }
    }
    Ok(bytes)
}

/// EXIF data with a text as its user comment, from which the A1111 web UI reads parameters in JPEG and WebP files. It
/// consists of a TIFF header, a first directory with the offset of the EXIF directory, and the EXIF directory with the
/// comment in big-endian UTF-16 (CIPA DC-008, 4.6.5).
fn exif(comment: &str) -> Vec<u8> {
    let text: Vec<u8> = b"UNICODE\0".iter().copied().chain(comment.encode_utf16().flat_map(u16::to_be_bytes)).collect();
    let directory = |tag: u16, kind: u16, count: u32, value: u32| {
        let mut entry = 1u16.to_le_bytes().to_vec();
        entry.extend_from_slice(&tag.to_le_bytes());
        entry.extend_from_slice(&kind.to_le_bytes());
        entry.extend_from_slice(&count.to_le_bytes());
        entry.extend_from_slice(&value.to_le_bytes());
        entry.extend_from_slice(&0u32.to_le_bytes());
        entry
    };
    const HEADER: u32 = 8;
    const DIRECTORY: u32 = 18;
    [
        b"II*\0".to_vec(),
        HEADER.to_le_bytes().to_vec(),
        // ExifIFD, a LONG.
        directory(0x8769, 4, 1, HEADER + DIRECTORY),
        // UserComment, UNDEFINED.
        directory(0x9286, 7, text.len() as u32, HEADER + 2 * DIRECTORY),
        text,
    ]
    .concat()
}
