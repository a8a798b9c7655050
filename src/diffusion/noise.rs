//! Standard normal noise, the same numbers as in the tools with which people share seeds.
//!
//! A seed determines a picture only together with its generator. Two are in common use: torch's CPU generator
//! (diffusers with a CPU `torch.Generator`, A1111 with "RNG: CPU") and torch's CUDA generator (A1111's default). Both
//! are reproduced here, and need neither torch nor a GPU.

use std::f64::consts::TAU;
use std::str::FromStr;

use crate::{Error, Result};

/// The generator that turns a seed into noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Rng {
    /// torch's CPU generator: MT19937, as `torch.randn` on the CPU in fp32.
    #[default]
    TorchCpu,
    /// torch's CUDA generator: Philox4x32-10, as A1111's "RNG: GPU" and "RNG: NV".
    TorchCuda,
}

impl Rng {
    /// Every generator, in the order in which they are offered.
    pub const ALL: [Rng; 2] = [Rng::TorchCpu, Rng::TorchCuda];

    /// The name that [`Rng::from_str`] reads.
    pub fn name(self) -> &'static str {
        match self {
            Rng::TorchCpu => "torch-cpu",
            Rng::TorchCuda => "torch-cuda",
        }
    }
}

impl FromStr for Rng {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let known = Rng::ALL.into_iter().find(|rng| rng.name().eq_ignore_ascii_case(name.trim()));
        known.ok_or_else(|| {
            Error::invalid("rng", format!("unknown noise generator {name:?}")).advise("choose torch-cpu or torch-cuda")
        })
    }
}

/// A stream of standard normal numbers.
///
/// Each image has its own, seeded with its own seed, so that image `i` of a batch seeded `s` is the image that seed
/// `s + i` gives alone.
#[derive(Debug, Clone)]
pub struct NormalGenerator(Stream);

#[derive(Debug, Clone)]
enum Stream {
    TorchCpu(Box<TorchCpu>),
    TorchCuda(TorchCuda),
}

impl NormalGenerator {
    /// A generator at the start of the stream that `seed` names.
    pub fn new(rng: Rng, seed: u64) -> Self {
        Self(match rng {
            // torch seeds its Mersenne Twister with the low half only.
            Rng::TorchCpu => Stream::TorchCpu(Box::new(TorchCpu { engine: Mt19937::new(seed as u32), spare: None })),
            Rng::TorchCuda => Stream::TorchCuda(TorchCuda { seed, offset: 0 }),
        })
    }

    /// Fills `out` with the next draw of the stream: the numbers of one `randn` of `out.len()` elements.
    ///
    /// The numbers depend on the division of the stream into draws: two draws of 16 are not one draw of 32.
    pub fn fill(&mut self, out: &mut [f32]) {
        match &mut self.0 {
            Stream::TorchCpu(stream) => stream.fill(out),
            Stream::TorchCuda(stream) => stream.fill(out),
        }
    }
}

/// Elements that torch's CPU `normal_` transforms at a time: 8 cosines, then their 8 sines.
const BLOCK: usize = 16;

#[derive(Debug, Clone)]
struct TorchCpu {
    engine: Mt19937,
    /// The sine of the last pair of a short draw, kept by torch for the next short draw.
    spare: Option<f64>,
}

impl TorchCpu {
    fn fill(&mut self, out: &mut [f32]) {
        if out.len() < BLOCK {
            return out.iter_mut().for_each(|value| *value = self.next_double() as f32);
        }
        out.iter_mut().for_each(|value| *value = self.engine.next_f32());
        let mut blocks = out.chunks_exact_mut(BLOCK);
        blocks.by_ref().for_each(box_muller);
        if !blocks.into_remainder().is_empty() {
            // torch has no short block: it draws the last 16 elements anew, over some that it has already made.
            let tail = out.len() - BLOCK;
            out[tail..].iter_mut().for_each(|value| *value = self.engine.next_f32());
            box_muller(&mut out[tail..]);
        }
    }

    /// torch's scalar path, taken for draws of fewer than 16 elements.
    fn next_double(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let (u1, u2) = (self.engine.next_f64(), self.engine.next_f64());
        let (radius, theta) = ((-2.0 * (-u2).ln_1p()).sqrt(), TAU * u1);
        self.spare = Some(radius * theta.sin());
        radius * theta.cos()
    }
}

/// Turns 16 uniforms into 16 normals (Box and Muller, 1958), in fp32 as torch does.
fn box_muller(block: &mut [f32]) {
    let (first, second) = block.split_at_mut(BLOCK / 2);
    for (u1, u2) in first.iter_mut().zip(second) {
        // 1 - u is in (0, 1], so that the logarithm is finite.
        let radius = (-2.0 * (1.0 - *u1).ln()).sqrt();
        let (sin, cos) = (TAU as f32 * *u2).sin_cos();
        (*u1, *u2) = (radius * cos, radius * sin);
    }
}

/// The Mersenne Twister (Matsumoto and Nishimura, 1998).
#[derive(Debug, Clone)]
struct Mt19937 {
    state: [u32; Self::N],
    next: usize,
}

impl Mt19937 {
    const N: usize = 624;
    const M: usize = 397;

    fn new(seed: u32) -> Self {
        let mut state = [seed; Self::N];
        for i in 1..Self::N {
            let previous = state[i - 1];
            state[i] = 1812433253u32.wrapping_mul(previous ^ (previous >> 30)).wrapping_add(i as u32);
        }
        Self { state, next: Self::N }
    }

    fn next_u32(&mut self) -> u32 {
        if self.next == Self::N {
            for i in 0..Self::N {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % Self::N] & 0x7fff_ffff);
                let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + Self::M) % Self::N] ^ (y >> 1) ^ odd;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// A uniform of 24 bits in [0, 1).
    fn next_f32(&mut self) -> f32 {
        (self.next_u32() & 0x00ff_ffff) as f32 / (1 << 24) as f32
    }

    /// A uniform of 53 bits in [0, 1), its high word drawn first.
    fn next_f64(&mut self) -> f64 {
        let (high, low) = (self.next_u32() as u64, self.next_u32() as u64);
        ((high << 32 | low) & ((1 << 53) - 1)) as f64 / (1u64 << 53) as f64
    }
}

/// Philox4x32-10 (Salmon et al., 2011), used as torch's CUDA `randn` uses it: element `i` of draw `offset` is the
/// sine half of the Box-Muller pair at the counter `[offset, 0, i, 0]`.
#[derive(Debug, Clone)]
struct TorchCuda {
    seed: u64,
    /// Draws made so far.
    offset: u32,
}

impl TorchCuda {
    fn fill(&mut self, out: &mut [f32]) {
        for (i, value) in out.iter_mut().enumerate() {
            let [x, y, ..] = philox([self.offset, 0, i as u32, 0], [self.seed as u32, (self.seed >> 32) as u32]);
            // Half a step is added to the integer, so that the number is never zero and its logarithm is finite.
            let unit = |word: u32| (word as f64 + 0.5) / (1u64 << 32) as f64;
            *value = ((-2.0 * unit(x).ln()).sqrt() * (TAU * unit(y)).sin()) as f32;
        }
        self.offset = self.offset.wrapping_add(1);
    }
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let first = counter[0] as u64 * 0xd251_1f53;
        let second = counter[2] as u64 * 0xcd9e_8d57;
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}
