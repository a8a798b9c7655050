//! The part of a picture that a mask asks to make anew, and the way back into the picture.

use super::{Filter, Picture};

/// The lightness from which on a mask's pixel is made anew.
pub const LIGHT: u8 = 128;

/// A rectangle of a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Columns left of it.
    pub left: u32,
    /// Rows above it.
    pub top: u32,
    /// Its columns.
    pub width: u32,
    /// Its rows.
    pub height: u32,
}

impl Region {
    /// The whole picture.
    pub fn whole(picture: &Picture) -> Self {
        Region { left: 0, top: 0, width: picture.width, height: picture.height }
    }

    /// The rectangle around a mask's light pixels and `padding` pixels more at every side, widened in one direction to
    /// the proportions of `size`, as far as the picture reaches; `None` if no pixel is light. The rule is that of
    /// A1111's "only masked" and of diffusers' `padding_mask_crop`.
    pub fn around(mask: &Picture, padding: u32, size: (u32, u32)) -> Option<Self> {
        let light = mask.lightness();
        let mut rows = light.chunks_exact(mask.width as usize);
        let is_light = |x: &u8| *x >= LIGHT;
        let top = rows.clone().position(|row| row.iter().any(is_light))?;
        let bottom = rows.clone().count() - rows.clone().rev().position(|row| row.iter().any(is_light))?;
        let left = rows.clone().filter_map(|row| row.iter().position(is_light)).min()?;
        let right = rows.by_ref().filter_map(|row| row.iter().rposition(is_light)).max()? + 1;
        let grown = |from: usize, to: usize, whole: u32| {
            ((from as i64 - i64::from(padding)).max(0), (to as i64 + i64::from(padding)).min(i64::from(whole)))
        };
        let (mut x, mut y) = (grown(left, right, mask.width), grown(top, bottom, mask.height));
        let proportion = f64::from(size.0) / f64::from(size.1);
        let (w, h) = (x.1 - x.0, y.1 - y.0);
        match w as f64 / h as f64 > proportion {
            true => y = widened(y, (w as f64 / proportion) as i64 - h, mask.height),
            false => x = widened(x, (h as f64 * proportion) as i64 - w, mask.width),
        }
        let [left, width, top, height] = [x.0, x.1 - x.0, y.0, y.1 - y.0].map(|n| n as u32);
        Some(Region { left, top, width, height })
    }

    /// The region of a picture.
    pub fn of(&self, picture: &Picture) -> Picture {
        picture.cropped(self.left, self.top, self.width, self.height)
    }

    /// The picture with `painted`, resized to the region, where the mask is light: mixed by the mask's lightness, so
    /// that dark parts stay as they are to the last bit. Picture and mask have one size.
    pub fn put_back(&self, painted: &Picture, picture: &Picture, mask: &Picture) -> Picture {
        let painted = painted.resized(self.width, self.height, Filter::Lanczos);
        let (lightness, mut whole) = (mask.lightness(), picture.clone());
        let columns = picture.width as usize;
        for (row, new) in painted.rgb.chunks_exact(self.width as usize * 3).enumerate() {
            let first = (self.top as usize + row) * columns + self.left as usize;
            let old = &mut whole.rgb[first * 3..][..new.len()];
            for (i, (old, new)) in old.iter_mut().zip(new).enumerate() {
                let light = u32::from(lightness[first + i / 3]);
                *old = ((light * u32::from(*new) + (255 - light) * u32::from(*old) + 127) / 255) as u8;
            }
        }
        whole
    }
}

/// A range that is longer by `more`, half at each side, and shifted if it would leave `0..whole`.
fn widened((from, to): (i64, i64), more: i64, whole: u32) -> (i64, i64) {
    let whole = i64::from(whole);
    let (mut from, mut to) = (from - more / 2, to + more - more / 2);
    if to >= whole {
        (from, to) = (from - (to - whole), whole);
    }
    if from < 0 {
        (from, to) = (0, to - from);
    }
    (from, to.min(whole))
}
