//! Reading pictures from PNG, JPEG and WebP files.

use super::{Picture, exif};
use crate::{Error, Result, Subject};
use std::io::Cursor;
use std::path::Path;
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

/// The largest number of pixels of a picture, as in Pillow's check against decompression bombs.
const MOST_PIXELS: usize = 1 << 28;

/// The pixels of a file as they are stored.
pub struct Stored {
    /// The colours; grey levels are repeated, and 16 bits are cut to 8.
    pub picture: Picture,
    /// How opaque each pixel is; empty if all are.
    alpha: Vec<u8>,
}

impl Picture {
    /// Reads a PNG, JPEG or WebP file and turns it upright as its EXIF says. Transparent parts show `background`, a
    /// grey level. Of an animation the first picture is read.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] if it is not such a file, or not a whole one, [`crate::ErrorKind::OutOfMemory`] if
    /// it has more pixels than memory allows, [`crate::ErrorKind::NotFound`], [`crate::ErrorKind::Io`].
    pub fn read(path: &Path, background: u8) -> Result<Picture> {
        let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
        Picture::decode(&bytes, background, path)
    }

    /// [`Picture::read`] for the bytes of a file; `subject` is for messages.
    ///
    /// # Errors
    /// As there.
    pub fn decode(bytes: &[u8], background: u8, subject: impl Into<Subject>) -> Result<Picture> {
        let Stored { mut picture, alpha } = stored(bytes, subject)?;
        for (pixel, &alpha) in picture.rgb.as_chunks_mut::<3>().0.iter_mut().zip(&alpha) {
            let over = |x: u8| {
                let (alpha, x, under) = (u32::from(alpha), u32::from(x), u32::from(background));
                ((alpha * x + (255 - alpha) * under + 127) / 255) as u8
            };
            *pixel = pixel.map(over);
        }
        Ok(upright(picture, exif::orientation(bytes)))
    }
}

/// Turns a picture as EXIF's `orientation` asks, and as Pillow's `exif_transpose` does.
fn upright(picture: Picture, orientation: u8) -> Picture {
    let Picture { width: w, height: h, .. } = picture;
    let (width, height) = if orientation >= 5 { (h, w) } else { (w, h) };
    // The stored pixel that is shown at x and y.
    let source = |x: u32, y: u32| match orientation {
        2 => (w - 1 - x, y),
        3 => (w - 1 - x, h - 1 - y),
        4 => (x, h - 1 - y),
        5 => (y, x),
        6 => (y, h - 1 - x),
        7 => (w - 1 - y, h - 1 - x),
        8 => (w - 1 - y, x),
        _ => (x, y),
    };
    if orientation == 1 {
        return picture;
    }
    let pixels = picture.rgb.as_chunks::<3>().0;
    let at = |(x, y): (u32, u32)| pixels[y as usize * w as usize + x as usize];
    let rgb = (0..height).flat_map(|y| (0..width).flat_map(move |x| at(source(x, y)))).collect();
    Picture { width, height, rgb }
}

/// Reads the pixels of a PNG, JPEG or WebP file, whatever its name is. JPEG's pixels may differ from libjpeg-turbo's by
/// rounding.
///
/// # Errors
/// Those of [`Picture::read`] about the content.
pub fn stored(bytes: &[u8], subject: impl Into<Subject>) -> Result<Stored> {
    let decoded = match bytes {
        [0x89, b'P', b'N', b'G', ..] => png(bytes),
        [0xff, 0xd8, 0xff, ..] => jpeg(bytes),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => webp(bytes),
        [b'G', b'I', b'F', ..] => Err("it is a GIF file".into()),
        [b'B', b'M', ..] => Err("it is a BMP file".into()),
        [b'I', b'I', b'*', 0, ..] | [b'M', b'M', 0, b'*', ..] => Err("it is a TIFF file".into()),
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => Err("it is an AVIF, HEIC or MP4 file".into()),
        [] => Err("it is empty".into()),
        _ => Err("it is not a PNG, JPEG or WebP file".into()),
    };
    decoded.map_err(|problem| match problem.downcast::<Error>() {
        Ok(error) => *error,
        Err(problem) => {
            let problem = format!("cannot be read as a picture: {problem}");
            Error::new(crate::ErrorKind::Damaged, subject, problem).advise("give a whole PNG, JPEG or WebP file")
        }
    })
}

type Decoded<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Checks a picture's size before memory is taken for it.
fn checked(width: usize, height: usize) -> Decoded<(u32, u32)> {
    let pixels = match width.checked_mul(height) {
        Some(pixels @ 1..MOST_PIXELS) => pixels,
        _ => return Err(format!("it has {width}x{height} pixels").into()),
    };
    // Four bytes as they are decoded, and seven as colours, opacity and the picture turned upright.
    let needed = 11 * pixels;
    if crate::memory::free().is_some_and(|free| needed > free) {
        let problem = format!("{} MiB are needed to read a picture of {width}x{height} pixels", needed >> 20);
        return Err(Error::out_of_memory(problem).advise("give a smaller picture").into());
    }
    Ok((u32::try_from(width)?, u32::try_from(height)?))
}

/// Colours and opacity from pixels of 1 to 4 samples: grey or RGB, with opacity or without.
fn split((width, height): (u32, u32), pixels: Vec<u8>, samples: usize) -> Stored {
    let (rgb, alpha) = match samples {
        1 => (pixels.iter().flat_map(|&grey| [grey; 3]).collect(), Vec::new()),
        2 => {
            let (rgb, alpha): (Vec<_>, _) =
                pixels.as_chunks().0.iter().map(|&[grey, alpha]| ([grey; 3], alpha)).unzip();
            (rgb.into_flattened(), alpha)
        }
        3 => (pixels, Vec::new()),
        _ => {
            let (rgb, alpha): (Vec<_>, _) = pixels.as_chunks().0.iter().map(|&[r, g, b, a]| ([r, g, b], a)).unzip();
            (rgb.into_flattened(), alpha)
        }
    };
    Stored { picture: Picture { width, height, rgb }, alpha }
}

fn png(bytes: &[u8]) -> Decoded<Stored> {
    let mut decoder = png::Decoder::new(Cursor::new(bytes));
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info()?;
    let size = checked(reader.info().width as usize, reader.info().height as usize)?;
    let mut pixels = vec![0; reader.output_buffer_size().ok_or("it is too large")?];
    let frame = reader.next_frame(&mut pixels)?;
    pixels.truncate(frame.buffer_size());
    reader.finish()?;
    Ok(split(size, pixels, frame.color_type.samples()))
}

fn jpeg(bytes: &[u8]) -> Decoded<Stored> {
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
    let size = checked(width, height)?;
    Ok(split(size, decoder.decode()?, 3))
}

fn webp(bytes: &[u8]) -> Decoded<Stored> {
    let mut decoder = image_webp::WebPDecoder::new(Cursor::new(bytes))?;
    let (width, height) = decoder.dimensions();
    let size = checked(width as usize, height as usize)?;
    let mut pixels = vec![0; decoder.output_buffer_size().ok_or("it is too large")?];
    decoder.read_image(&mut pixels)?;
    Ok(split(size, pixels, if decoder.has_alpha() { 4 } else { 3 }))
}
