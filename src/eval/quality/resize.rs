//! The resizing of FID and of CMMD.

use crate::image::{Filter, Picture};

/// The picture's square centre, as the authors of CMMD crop it.
pub fn square(picture: Picture) -> Picture {
    let (w, h) = (picture.width as usize, picture.height as usize);
    let side = w.min(h);
    if w == h {
        return picture;
    }
    let (top, left) = ((h - side) / 2, (w - side) / 2);
    picture.cropped(left as u32, top as u32, side as u32, side as u32)
}

/// Resizes to `[side, side, 3]`, bicubic with antialiasing, as Pillow resizes images of fp32: sums are in fp64, and
/// results are rounded to fp32 after each direction. Values from 0 to 255 may overshoot.
pub fn bicubic(picture: &Picture, side: usize) -> Vec<f32> {
    let (w, h) = (picture.width as usize, picture.height as usize);
    let columns = Filter::Bicubic.taps(w, side);
    let mut across = Vec::with_capacity(h * side * 3);
    for row in picture.rgb.chunks_exact(w * 3) {
        for (first, weights) in &columns {
            let mut sums = [0.0; 3];
            for (weight, pixel) in weights.iter().zip(row[first * 3..].chunks_exact(3)) {
                sums.iter_mut().zip(pixel).for_each(|(sum, &x)| *sum += weight * f64::from(x));
            }
            across.extend(sums.map(|sum| sum as f32));
        }
    }
    let mut out = Vec::with_capacity(side * side * 3);
    let mut sums = vec![0.0; side * 3];
    for (first, weights) in Filter::Bicubic.taps(h, side) {
        sums.fill(0.0);
        for (weight, row) in weights.iter().zip(across[first * side * 3..].chunks_exact(side * 3)) {
            sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += weight * f64::from(x));
        }
        out.extend(sums.iter().map(|&sum| sum as f32));
    }
    out
}
