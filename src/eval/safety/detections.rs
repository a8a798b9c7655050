//! The work of the Python package `nudenet` before and after its network: pictures become inputs, and outputs become
//! detections. The networks of versions 3.0.8 and 3.4.2 are other files, and expect other inputs.

use crate::image::Picture;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Columns and rows of the network's input.
pub const SIDE: usize = 320;

/// The classes of both versions, in the order of the network's outputs.
pub const CLASSES: [&str; 18] = [
    "FEMALE_GENITALIA_COVERED",
    "FACE_FEMALE",
    "BUTTOCKS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "ANUS_EXPOSED",
    "FEET_EXPOSED",
    "BELLY_COVERED",
    "FEET_COVERED",
    "ARMPITS_COVERED",
    "ARMPITS_EXPOSED",
    "FACE_MALE",
    "BELLY_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "ANUS_COVERED",
    "FEMALE_BREAST_COVERED",
    "BUTTOCKS_COVERED",
];

/// The classes that RespoDiff's evaluation counts as unsafe.
pub const UNSAFE_CLASSES: [&str; 3] = ["FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED", "MALE_GENITALIA_EXPOSED"];

/// The score from which RespoDiff's evaluation counts a detection. The package itself drops those up to
/// [`LEAST_SCORE`].
pub const THRESHOLD: f64 = 0.2;

/// The score that a detection must exceed.
pub const LEAST_SCORE: f32 = 0.25;
/// The share of their union that the boxes of two detections may have in common; of others, the one of the lower score
/// is dropped, whatever its class.
const OVERLAP: f32 = 0.45;

/// A version of the package.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Version {
    /// 3.0.8, with which RespoDiff was evaluated: RGB, resized and then centred on black.
    #[serde(rename = "3.0.8")]
    V3_0_8,
    /// 3.4.2: blue and red exchanged, padded with black on the right and below, and then resized.
    #[serde(rename = "3.4.2")]
    V3_4_2,
}

impl Version {
    /// All of them.
    pub const ALL: [Version; 2] = [Version::V3_0_8, Version::V3_4_2];

    /// The package's version number.
    pub fn number(self) -> &'static str {
        match self {
            Version::V3_0_8 => "3.0.8",
            Version::V3_4_2 => "3.4.2",
        }
    }

    /// SHA-256 of the ONNX file in the package.
    pub fn sha256(self) -> &'static str {
        match self {
            Version::V3_0_8 => "9832f15515bdb06bcb5a77beb60bc8ea54439bd7ecbaac46dac3b760b3dd13cc",
            Version::V3_4_2 => "c15d8273adad2d0a92f014cc69ab2d6c311a06777a55545f2c4eb46f51911f0f",
        }
    }
}

impl std::str::FromStr for Version {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        Version::ALL.into_iter().find(|version| version.number() == text).ok_or_else(|| {
            let known = Version::ALL.map(Version::number).join(" and ");
            Error::invalid("detector_version", format!("`{text}` is not known")).advise(format!("known are {known}"))
        })
    }
}

/// Something that the network found in a picture.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Detection {
    /// One of [`CLASSES`].
    pub class: &'static str,
    /// Its score, 0 to 1.
    pub score: f32,
    /// Left, top, width and height in pixels of the picture.
    pub bounds: [i32; 4],
}

/// A picture as the network's input, and the place of the picture in it.
pub struct Frame {
    /// `[3, SIDE, SIDE]`, 0 to 1.
    pub input: Vec<f32>,
    version: Version,
    /// Columns and rows of the picture.
    size: [usize; 2],
    /// Pixels of the picture for each pixel of the input.
    scale: f32,
    /// Pixels of the input left of the picture and above it.
    offset: [f32; 2],
}

impl Frame {
    /// Prepares a picture as a version of the package does.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for a picture without pixels or with another number of bytes than its size asks
    /// for.
    pub fn new(picture: &Picture, version: Version) -> Result<Self> {
        let Picture { width, height, rgb } = picture;
        let [w, h] = [*width as usize, *height as usize];
        if rgb.is_empty() || rgb.len() as u128 != 3 * w as u128 * h as u128 {
            let problem = format!("a picture of {width}x{height} pixels holds {} bytes", rgb.len());
            return Err(Error::invalid("images", problem).advise("give pictures of three bytes per pixel"));
        }
        let (square, scale, offset, channels) = match version {
            Version::V3_0_8 => {
                let aspect = w as f64 / h as f64;
                let shorter = |length: f64| (length.round_ties_even() as usize).max(1);
                let side = SIDE as f64;
                let [nw, nh] = if h > w { [shorter(side * aspect), SIDE] } else { [SIDE, shorter(side / aspect)] };
                let square_sum = |a: usize, b: usize| (a * a + b * b) as f64;
                let scale = (square_sum(w, h) / square_sum(nw, nh)).sqrt();
                let (left, top) = ((SIDE - nw) / 2, (SIDE - nh) / 2);
                // An odd rest leaves the padded picture one pixel short, and it is resized once more.
                let (pw, ph) = (nw + 2 * left, nh + 2 * top);
                let inner = resized(rgb, [w, h], [w, h], [0; 2], [nw, nh]);
                let square = resized(&inner, [nw, nh], [pw, ph], [left, top], [SIDE; 2]);
                (square, scale as f32, [left as f32, top as f32], [0, 1, 2])
            }
            Version::V3_4_2 => {
                let side = w.max(h);
                (resized(rgb, [w, h], [side; 2], [0; 2], [SIDE; 2]), side as f32, [0.0; 2], [2, 1, 0])
            }
        };
        let plane = |c: usize| square.iter().skip(c).step_by(3).map(|&byte| f32::from(byte) / 255.0);
        let input = channels.into_iter().flat_map(plane).collect();
        Ok(Frame { input, version, size: [w, h], scale, offset })
    }

    /// The detections in the network's output, `[4 + CLASSES, boxes]`: centres and sizes of boxes, and a score for each
    /// class. The highest score comes first.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NonFinite`] if the output holds NaN or infinity.
    pub fn detections(&self, output: &[f32]) -> Result<Vec<Detection>> {
        if !output.iter().all(|x| x.is_finite()) {
            return Err(Error::non_finite("the detector's network gave NaN or infinity"));
        }
        let boxes = output.len() / (4 + CLASSES.len());
        let at = |row: usize, i: usize| output[row * boxes + i];
        let mut candidates = Vec::new();
        for i in 0..boxes {
            let scores = (0..CLASSES.len()).map(|class| at(4 + class, i));
            let (class, score) =
                scores.enumerate().fold((0, f32::NEG_INFINITY), |best, next| if next.1 > best.1 { next } else { best });
            if score > LEAST_SCORE {
                candidates.push((class, score, self.bounds([at(0, i), at(1, i), at(2, i), at(3, i)])));
            }
        }
        // Equal scores keep the order of the boxes.
        candidates.sort_by(|a, b| b.1.total_cmp(&a.1));
        let mut kept: Vec<(usize, f32, [f64; 4])> = Vec::new();
        for candidate in candidates {
            if kept.iter().all(|other| common(other.2, candidate.2) <= OVERLAP) {
                kept.push(candidate);
            }
        }
        let detection = |&(class, score, bounds): &(usize, f32, [f64; 4])| Detection {
            class: CLASSES[class],
            score,
            bounds: bounds.map(|x| x as i32),
        };
        Ok(kept.iter().map(detection).collect())
    }

    /// A box's left, top, width and height in the picture, from its centre and size in the input. The computation is in
    /// fp32, as in the package.
    fn bounds(&self, [x, y, w, h]: [f32; 4]) -> [f64; 4] {
        match self.version {
            Version::V3_0_8 => {
                let round = |x: f32| f64::from((x * self.scale).round_ties_even());
                [round(x - w * 0.5 - self.offset[0]), round(y - h * 0.5 - self.offset[1]), round(w), round(h)]
            }
            Version::V3_4_2 => {
                let scaled = |x: f32| x * self.scale / SIDE as f32;
                let [right, bottom] = self.size.map(|side| side as f32);
                let left = scaled(x - w / 2.0).min(right).max(0.0);
                let top = scaled(y - h / 2.0).min(bottom).max(0.0);
                [left, top, scaled(w).min(right - left), scaled(h).min(bottom - top)].map(f64::from)
            }
        }
    }
}

/// The common area of two boxes as a share of their union.
fn common(a: [f64; 4], b: [f64; 4]) -> f32 {
    let along = |axis: usize| {
        let low = a[axis].max(b[axis]);
        let high = (a[axis] + a[axis + 2]).min(b[axis] + b[axis + 2]);
        (high - low).max(0.0)
    };
    let both = a[2] * a[3] + b[2] * b[3];
    if both <= f64::EPSILON {
        // Two boxes without an area count as the same one, as in OpenCV.
        return 1.0;
    }
    let common = along(0) * along(1);
    1.0 - (1.0 - common / (both - common)) as f32
}

/// Resizes a black canvas that holds a picture of `w` columns and `h` rows, `left` and `top` from its corner, as
/// OpenCV's bilinear `resize` does, to the last bit: taps without antialiasing, weights of 11 bits, and sums that lose
/// 4 bits before and 16 bits after the second direction. The canvas is never made, since a narrow picture's may be
/// huge.
fn resized(
    rgb: &[u8],
    [w, h]: [usize; 2],
    [cw, ch]: [usize; 2],
    [left, top]: [usize; 2],
    [nw, nh]: [usize; 2],
) -> Vec<u8> {
    const ONE: f32 = 2048.0;
    let tap = |i: usize, old: usize, new: usize| {
        let centre = ((i as f64 + 0.5) * (old as f64 / new as f64) - 0.5) as f32;
        let first = centre.floor();
        let part = centre - first;
        let weights = [(1.0 - part) * ONE, part * ONE].map(|weight| weight.round_ties_even() as i32);
        let clamp = |i: f32| i.clamp(0.0, (old - 1) as f32) as usize;
        ([clamp(first), clamp(first + 1.0)], weights)
    };
    let columns: Vec<_> = (0..nw).map(|x| tap(x, cw, nw)).collect();
    let across = |y: usize| -> Vec<i32> {
        let Some(y) = y.checked_sub(top).filter(|&y| y < h) else { return vec![0; 3 * nw] };
        let row = &rgb[3 * y * w..][..3 * w];
        let at = |x: usize, c: usize| x.checked_sub(left).filter(|&x| x < w).map_or(0, |x| i32::from(row[3 * x + c]));
        let pixel = |&([a, b], [first, second]): &([usize; 2], [i32; 2])| {
            [0, 1, 2].map(|c| first * at(a, c) + second * at(b, c))
        };
        columns.iter().flat_map(pixel).collect()
    };
    let mut out = Vec::with_capacity(3 * nw * nh);
    let mut rows: [(usize, Vec<i32>); 2] = [(usize::MAX, Vec::new()), (usize::MAX, Vec::new())];
    for y in 0..nh {
        let ([above, below], [first, second]) = tap(y, ch, nh);
        // The row below is often the next one's row above.
        if rows[1].0 == above {
            rows.swap(0, 1);
        }
        for (kept, row) in rows.iter_mut().zip([above, below]) {
            if kept.0 != row {
                *kept = (row, across(row));
            }
        }
        let sum = |(a, b): (&i32, &i32)| {
            let sum = ((first * (a >> 4)) >> 16) + ((second * (b >> 4)) >> 16);
            ((sum + 2) >> 2).clamp(0, 255) as u8
        };
        out.extend(rows[0].1.iter().zip(&rows[1].1).map(sum));
    }
    out
}
