//! Resizing as Pillow does it, with antialiasing: each new pixel is a weighted mean of old ones, and the filter that
//! gives the weights is widened when the picture shrinks.

use super::Picture;
use rayon::prelude::*;
use std::f64::consts::PI;

/// A filter of Pillow's `resize`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// The cubic kernel of a = -0.5.
    Bicubic,
    /// A sinc under the main lobe of another that is three times as wide.
    Lanczos,
}

impl Filter {
    /// Half of the width of the kernel, in pixels.
    fn support(self) -> f64 {
        match self {
            Filter::Bicubic => 2.0,
            Filter::Lanczos => 3.0,
        }
    }

    fn at(self, x: f64) -> f64 {
        let sinc = |x: f64| if x == 0.0 { 1.0 } else { (PI * x).sin() / (PI * x) };
        match (self, x.abs()) {
            (Filter::Bicubic, x) if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            (Filter::Bicubic, x) if x < 2.0 => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
            (Filter::Lanczos, x) if x < 3.0 => sinc(x) * sinc(x / 3.0),
            _ => 0.0,
        }
    }

    /// For each of `new` pixels, the first of the `old` pixels that it is made of, and their weights.
    pub fn taps(self, old: usize, new: usize) -> Vec<(usize, Vec<f64>)> {
        let scale = old as f64 / new as f64;
        let wide = scale.max(1.0);
        let of = |i: usize| {
            let centre = (i as f64 + 0.5) * scale;
            let first = (centre - self.support() * wide + 0.5).max(0.0) as usize;
            let last = ((centre + self.support() * wide + 0.5) as usize).min(old);
            let weights: Vec<f64> = (first..last).map(|j| self.at((j as f64 - centre + 0.5) / wide)).collect();
            let total: f64 = weights.iter().sum();
            (first, weights.iter().map(|w| w / total).collect())
        };
        (0..new).map(of).collect()
    }

    /// The weights as Pillow has them for bytes: fixed-point numbers of [`BITS`] bits behind the point.
    fn fixed_taps(self, old: usize, new: usize) -> Vec<(usize, Vec<i64>)> {
        let fixed = |w: f64| (w * f64::from(1 << BITS)).round() as i64;
        self.taps(old, new).into_iter().map(|(first, ws)| (first, ws.into_iter().map(fixed).collect())).collect()
    }
}

const BITS: u32 = 22;

fn byte(sum: i64) -> u8 {
    ((sum + (1 << (BITS - 1))) >> BITS).clamp(0, 255) as u8
}

impl Picture {
    /// The picture in another size, the same bytes as Pillow's `resize` gives. Bytes are rounded after each direction.
    ///
    /// # Panics
    /// If the new size or the picture is empty.
    pub fn resized(&self, width: u32, height: u32, filter: Filter) -> Picture {
        let (w, h, new_w, new_h) = (self.width as usize, self.height as usize, width as usize, height as usize);
        assert!(w * h > 0 && new_w * new_h > 0, "{w}x{h} pixels cannot become {new_w}x{new_h}");
        let mut rgb = std::borrow::Cow::Borrowed(&self.rgb);
        if new_w != w {
            let taps = filter.fixed_taps(w, new_w);
            let mut across = vec![0; h * new_w * 3];
            across.par_chunks_exact_mut(new_w * 3).zip(rgb.par_chunks_exact(w * 3)).for_each(|(out, row)| {
                for (out, (first, weights)) in out.as_chunks_mut::<3>().0.iter_mut().zip(&taps) {
                    let mut sums = [0; 3];
                    for (weight, pixel) in weights.iter().zip(&row.as_chunks::<3>().0[*first..]) {
                        sums.iter_mut().zip(pixel).for_each(|(sum, &x)| *sum += weight * i64::from(x));
                    }
                    *out = sums.map(byte);
                }
            });
            rgb = std::borrow::Cow::Owned(across);
        }
        if new_h != h {
            let taps = filter.fixed_taps(h, new_h);
            let mut down = vec![0; new_h * new_w * 3];
            down.par_chunks_exact_mut(new_w * 3).zip(&taps).for_each(|(out, (first, weights))| {
                let mut sums = vec![0; out.len()];
                for (weight, row) in weights.iter().zip(rgb.chunks_exact(new_w * 3).skip(*first)) {
                    sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += weight * i64::from(x));
                }
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out = byte(sum));
            });
            rgb = std::borrow::Cow::Owned(down);
        }
        Picture { width, height, rgb: rgb.into_owned() }
    }

    /// A rectangle of the picture, by its left and upper edge, its width and its height.
    ///
    /// # Panics
    /// If it is not within the picture.
    pub fn cropped(&self, left: u32, top: u32, width: u32, height: u32) -> Picture {
        assert!(left + width <= self.width && top + height <= self.height, "a rectangle beyond the picture");
        let row = |y: u32| &self.rgb[(y as usize * self.width as usize + left as usize) * 3..][..width as usize * 3];
        Picture { width, height, rgb: (top..top + height).flat_map(row).copied().collect() }
    }
}
