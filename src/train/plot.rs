//! Pictures about a training: its losses over time, and sheets of samples.

use super::Losses;
use crate::image::Picture;
use embedded_graphics::mono_font::MonoTextStyle;
use embedded_graphics::mono_font::ascii::FONT_7X13;
use embedded_graphics::pixelcolor::Rgb888;
use embedded_graphics::prelude::*;
use embedded_graphics::primitives::{Line, PrimitiveStyle};
use embedded_graphics::text::{Alignment, Text};

const WIDTH: i32 = 640;
const HEIGHT: i32 = 400;
const LEFT: i32 = 70;
const RIGHT: i32 = 20;
const TOP: i32 = 40;
const BOTTOM: i32 = 40;
const INK: Rgb888 = Rgb888::new(40, 40, 48);
const FAINT: Rgb888 = Rgb888::new(224, 224, 230);
const RESP: Rgb888 = Rgb888::new(200, 60, 50);
const SEM: Rgb888 = Rgb888::new(40, 100, 190);

struct Canvas {
    rgb: Vec<u8>,
}

impl OriginDimensions for Canvas {
    fn size(&self) -> Size {
        Size::new(WIDTH as u32, HEIGHT as u32)
    }
}

impl DrawTarget for Canvas {
    type Color = Rgb888;
    type Error = std::convert::Infallible;
    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(&mut self, pixels: I) -> Result<(), Self::Error> {
        for Pixel(at, colour) in pixels {
            if (0..WIDTH).contains(&at.x) && (0..HEIGHT).contains(&at.y) {
                let at = (at.y * WIDTH + at.x) as usize * 3;
                self.rgb[at..at + 3].copy_from_slice(&[colour.r(), colour.g(), colour.b()]);
            }
        }
        Ok(())
    }
}

/// Plots both losses over the iterations, on a logarithmic axis. It shows means over stretches of equal length, since
/// single losses differ by orders of magnitude with their noise level.
pub fn loss_plot(history: &[Losses], title: &str) -> Picture {
    let mut canvas = Canvas { rgb: vec![255; (WIDTH * HEIGHT * 3) as usize] };
    let Ok(()) = draw(&mut canvas, history, title);
    Picture { width: WIDTH as u32, height: HEIGHT as u32, rgb: canvas.rgb }
}

fn draw(canvas: &mut Canvas, history: &[Losses], title: &str) -> Result<(), std::convert::Infallible> {
    let stretch = history.len().div_ceil(100).max(1);
    let curve = |loss: fn(&Losses) -> f64| -> Vec<f64> {
        history.chunks(stretch).map(|part| part.iter().map(loss).sum::<f64>() / part.len() as f64).collect()
    };
    let curves = [("L_resp", RESP, curve(|l| l.resp)), ("L_sem", SEM, curve(|l| l.sem))];
    let positive = || curves.iter().flat_map(|(_, _, values)| values).copied().filter(|&v| v > 0.0);
    let low = positive().fold(f64::INFINITY, f64::min).log10().floor();
    let high = positive().fold(0.0, f64::max).log10().ceil();
    let (low, high) = if low < high { (low, high) } else { (low.min(0.0), low.min(0.0) + 1.0) };
    let (low, high) = if low.is_finite() { (low, high) } else { (-1.0, 0.0) };

    let text = |colour| MonoTextStyle::new(&FONT_7X13, colour);
    let y_of = |value: f64| {
        let share = (value.log10().clamp(low, high) - low) / (high - low);
        HEIGHT - BOTTOM - (share * f64::from(HEIGHT - TOP - BOTTOM)).round() as i32
    };
    for decade in low as i32..=high as i32 {
        let y = y_of(10f64.powi(decade));
        let line = Line::new(Point::new(LEFT, y), Point::new(WIDTH - RIGHT, y));
        line.into_styled(PrimitiveStyle::with_stroke(FAINT, 1)).draw(canvas)?;
        let at = Point::new(LEFT - 8, y + 4);
        Text::with_alignment(&format!("1e{decade}"), at, text(INK), Alignment::Right).draw(canvas)?;
    }
    for (i, (name, colour, values)) in curves.iter().enumerate() {
        let x_of = |i: usize| {
            LEFT + (i as f64 / (values.len().max(2) - 1) as f64 * f64::from(WIDTH - LEFT - RIGHT)).round() as i32
        };
        let points: Vec<Point> =
            values.iter().enumerate().filter(|(_, v)| **v > 0.0).map(|(i, &v)| Point::new(x_of(i), y_of(v))).collect();
        for pair in points.windows(2) {
            Line::new(pair[0], pair[1]).into_styled(PrimitiveStyle::with_stroke(*colour, 2)).draw(canvas)?;
        }
        let at = Point::new(WIDTH - RIGHT - 60 * (2 - i as i32) + 10, TOP - 14);
        Text::new(name, at, text(*colour)).draw(canvas)?;
    }
    // The font has ASCII characters only.
    let title: String = title.chars().map(|c| if c.is_ascii() { c } else { '?' }).take(50).collect();
    Text::new(&title, Point::new(LEFT, TOP - 14), text(INK)).draw(canvas)?;
    let below = HEIGHT - BOTTOM + 20;
    Text::new("0", Point::new(LEFT, below), text(INK)).draw(canvas)?;
    let end = format!("{} iterations", history.len());
    Text::with_alignment(&end, Point::new(WIDTH - RIGHT, below), text(INK), Alignment::Right).draw(canvas)?;
    Ok(())
}

/// One picture of several rows of pictures, which have one size. Shorter rows end in white.
pub fn sheet(rows: &[Vec<Picture>]) -> Picture {
    let Some(first) = rows.iter().flatten().next() else { return Picture { width: 0, height: 0, rgb: vec![] } };
    let (w, h) = (first.width as usize, first.height as usize);
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let mut rgb = vec![255; columns * w * rows.len() * h * 3];
    for (i, row) in rows.iter().enumerate() {
        for (j, image) in row.iter().enumerate() {
            for (y, line) in image.rgb.chunks_exact(w * 3).enumerate() {
                rgb[((i * h + y) * columns + j) * w * 3..][..w * 3].copy_from_slice(line);
            }
        }
    }
    Picture { width: (columns * w) as u32, height: (rows.len() * h) as u32, rgb }
}
