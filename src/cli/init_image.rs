//! The flags for pictures to begin with: image to image and inpainting.

use crate::engine::{EncodedPicture, Engine, InitImage, Size};
use crate::image::{Filter, Picture, Region, UsedFile, UsedPicture};
use crate::{Error, Result, Subject};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// The choice of a picture to begin with.
#[derive(clap::Args)]
#[group(id = "beginning")]
pub(super) struct Flags {
    /// Begin with this picture (PNG, JPEG or WebP) in place of noise. It is resized to --width and --height [default
    /// size: its own, rounded down to multiples of 8]
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// How much of the picture is made anew: the share of the steps that are taken, from 0 to 1 [default: 0.8; with
    /// --mask 1]
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true, requires = "image")]
    strength: Option<f64>,
    /// Make anew only what is light in this picture; the rest of --image stays as it is
    #[arg(long, value_name = "FILE", requires = "image")]
    mask: Option<PathBuf>,
    /// Paint the part of the picture around the mask, with so many pixels at every side, at --width and --height alone,
    /// and put it back [default: paint the whole picture]
    #[arg(long, value_name = "PIXELS", requires = "mask")]
    inpaint_padding: Option<u32>,
}

/// A picture to begin with, read from its files.
pub(super) struct Canvas {
    picture: Picture,
    /// Of the picture's size.
    mask: Option<Picture>,
    strength: f64,
    padding: Option<u32>,
    record: UsedPicture,
}

impl Flags {
    /// The flags that a picture's record stands for.
    pub(super) fn of_record(record: &UsedPicture) -> Self {
        Flags {
            image: Some((&record.picture.file).into()),
            strength: Some(record.strength),
            mask: record.mask.as_ref().map(|mask| (&mask.file).into()),
            inpaint_padding: record.padding,
        }
    }

    /// The files that are read.
    pub(super) fn files(&self) -> impl Iterator<Item = PathBuf> {
        self.image.clone().into_iter().chain(self.mask.clone())
    }

    /// Reads the files; `None` without a picture.
    pub(super) fn open(&self) -> Result<Option<Canvas>> {
        let Some(image) = &self.image else { return Ok(None) };
        // Transparent parts of a picture are white, as in A1111, and those of a mask stay as they are.
        let (picture, used) = read(image, 255)?;
        let mask = self.mask.as_ref().map(|path| read(path, 0)).transpose()?;
        let strength = self.strength.unwrap_or(if mask.is_some() { 1.0 } else { 0.8 });
        let (mask, used_mask) = mask.unzip();
        let mask = mask.map(|mask| mask.resized(picture.width, picture.height, Filter::Lanczos));
        if let (Some(mask), Some(path)) = (&mask, &self.mask)
            && Region::around(mask, 0, (1, 1)).is_none()
        {
            let problem = "is dark everywhere, so that nothing would be made anew";
            return Err(Error::new(
                crate::ErrorKind::Invalid,
                Subject::Field("mask"),
                format!("{} {problem}", path.display()),
            )
            .advise("paint white what is to be made anew"));
        }
        let padding = self.inpaint_padding;
        let record = UsedPicture { picture: used, strength, mask: used_mask, padding };
        Ok(Some(Canvas { picture, mask, strength, padding, record }))
    }
}

/// A picture and the record of its file.
fn read(path: &Path, background: u8) -> Result<(Picture, UsedFile)> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let sha256 = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((Picture::decode(&bytes, background, path)?, UsedFile { file: path.display().to_string(), sha256 }))
}

impl Canvas {
    /// The record in a picture's file.
    pub(super) fn record(&self) -> UsedPicture {
        self.record.clone()
    }

    /// The size that the images have by default: the picture's own, with sides that are multiples of 8. If one side is
    /// given, the other keeps the proportions. `None` if only a part of the picture is painted.
    pub(super) fn size(&self, width: Option<usize>, height: Option<usize>) -> Option<Size> {
        let (w, h) = (self.picture.width as usize, self.picture.height as usize);
        let whole = |pixels: usize| (pixels / 8).max(1) * 8;
        let size = match (width, height) {
            (None, None) => Size::new(whole(w), whole(h)),
            (Some(width), None) => Size::new(width, whole((h * width + w / 2) / w)),
            (None, Some(height)) => Size::new(whole((w * height + h / 2) / h), height),
            (Some(width), Some(height)) => Size::new(width, height),
        };
        self.padding.is_none().then_some(size)
    }

    /// The part of the picture that is painted at a size.
    fn region(&self, size: Size) -> Region {
        let around = |padding| Region::around(self.mask.as_ref()?, padding, (size.width as u32, size.height as u32));
        self.padding.and_then(around).unwrap_or(Region::whole(&self.picture))
    }

    /// Encodes it for images of a size.
    pub(super) fn encode(&self, engine: &Engine, size: Size) -> Result<EncodedPicture> {
        let region = self.region(size);
        let mask = self.mask.as_ref().map(|mask| region.of(mask));
        engine.encode_picture(&region.of(&self.picture), mask.as_ref(), size)
    }

    /// The beginning of an image with it.
    pub(super) fn begin(&self, encoded: &EncodedPicture) -> InitImage {
        InitImage::encoded(encoded.clone(), self.strength)
    }

    /// The finished picture: with a mask, what is dark in it stays as it was to the last bit. A part goes back into the
    /// whole picture, which keeps its own size.
    pub(super) fn finish(&self, painted: Picture) -> Picture {
        let Some(mask) = &self.mask else { return painted };
        let size = (painted.width, painted.height);
        match self.padding {
            Some(_) => {
                let region = self.region(Size::new(size.0 as usize, size.1 as usize));
                region.put_back(&painted, &self.picture, mask)
            }
            None => {
                let [picture, mask] = [&self.picture, mask].map(|x| x.resized(size.0, size.1, Filter::Lanczos));
                Region::whole(&picture).put_back(&painted, &picture, &mask)
            }
        }
    }
}
