//! The Brownian motion from which k-diffusion's stochastic samplers take their noise: that of `torchsde.BrownianTree`,
//! so that a seed gives the same noise as in A1111 and ComfyUI.
//!
//! The motion over an interval is halved again and again toward a point (a Brownian bridge). Each half has normal
//! numbers of its own, seeded by its place in the tree, so a value depends neither on the other values nor on their
//! order. Places are rounded to 10^-6, which ends the halving after some 24 rounds.

use rayon::prelude::*;

use super::noise::{NormalGenerator, Rng};

/// A Brownian motion over sigma.
#[derive(Debug, Clone)]
pub struct BrownianTree {
    rng: Rng,
    seed: u64,
    /// The ends of the interval, rounded.
    start: f64,
    end: f64,
    /// The increment over the whole interval.
    whole: Vec<f64>,
    /// The values at the two latest points: steps follow each other, so that one begins where another has ended.
    latest: [(f64, Vec<f64>); 2],
}

/// One halving on the way to a point.
struct Halving {
    seed: u32,
    left: f64,
    right: f64,
    /// True if the point lies in the left half.
    to_left: bool,
}

impl BrownianTree {
    /// The motion of `len` numbers between two sigmas that a seed gives.
    pub fn new(rng: Rng, seed: u64, least: f64, greatest: f64, len: usize) -> Self {
        // k-diffusion's sigmas are fp32.
        let (least, greatest) = (least as f32 as f64, greatest as f32 as f64);
        let [first] = seeds(seed, &[]);
        let whole = normals(rng, first, len);
        let scale = (greatest - least).sqrt();
        BrownianTree {
            rng,
            seed,
            start: rounded(least),
            end: rounded(greatest),
            whole: whole.into_iter().map(|x| x as f64 * scale).collect(),
            latest: [(f64::NAN, Vec::new()), (f64::NAN, Vec::new())],
        }
    }

    /// Writes the increment on the way down from one sigma to another, over the square root of its length: numbers with
    /// a variance of 1.
    pub fn fill(&mut self, from: f64, to: f64, out: &mut [f32]) {
        let (from, to) = (from as f32 as f64, to as f32 as f64);
        let place = |sigma: f64| rounded(sigma.clamp(self.start, self.end));
        let (high, low) = (place(from), place(to));
        let (high, low) = (self.at(high), self.at(low));
        let scale = 1.0 / (from - to).sqrt();
        out.iter_mut().zip(high.iter().zip(&low)).for_each(|(out, (high, low))| *out = ((low - high) * scale) as f32);
    }

    /// The motion's value at a rounded place, with 0 at the start.
    fn at(&mut self, place: f64) -> Vec<f64> {
        if let Some((_, value)) = self.latest.iter().find(|(known, _)| *known == place) {
            return value.clone();
        }
        let value = self.bridged(place);
        self.latest.swap(0, 1);
        self.latest[1] = (place, value.clone());
        value
    }

    fn bridged(&self, place: f64) -> Vec<f64> {
        let mut before = vec![0.0; self.whole.len()];
        if place <= self.start {
            return before;
        }
        let mut increment = self.whole.clone();
        if place >= self.end {
            return increment;
        }
        let halvings = self.halvings(place);
        let noise: Vec<Vec<f32>> =
            halvings.par_iter().map(|halving| normals(self.rng, halving.seed, before.len())).collect();
        for (Halving { left, right, to_left, .. }, noise) in halvings.into_iter().zip(noise) {
            let (share, deviation) = (left / (left + right), (left * right / (left + right)).sqrt());
            for ((before, increment), noise) in before.iter_mut().zip(&mut increment).zip(noise) {
                let left = share * *increment + deviation * noise as f64;
                match to_left {
                    true => *increment = left,
                    false => (*before, *increment) = (*before + left, *increment - left),
                }
            }
        }
        before
    }

    /// The halvings on the way to a place within the interval.
    fn halvings(&self, place: f64) -> Vec<Halving> {
        let (mut start, mut end, mut key, mut depth) = (self.start, self.end, 0u64, 0u64);
        let mut halvings = Vec::new();
        // A place is reached when it is the start of what is left.
        while place > start {
            let middle = rounded(0.5 * (start + end));
            if middle <= start || middle >= end {
                break;
            }
            let [seed] = seeds(self.seed, &[key, depth]);
            let to_left = place < middle;
            halvings.push(Halving { seed, left: middle - start, right: end - middle, to_left });
            (key, depth) = (2 * key + u64::from(!to_left), depth + 1);
            match to_left {
                true => end = middle,
                false => start = middle,
            }
        }
        halvings
    }
}

/// A number rounded to six decimal places, exactly as Python's `round` does.
fn rounded(x: f64) -> f64 {
    format!("{x:.6}").parse().unwrap_or(x)
}

fn normals(rng: Rng, seed: u32, len: usize) -> Vec<f32> {
    let mut numbers = vec![0.0; len];
    NormalGenerator::new(rng, seed.into()).fill(&mut numbers);
    numbers
}

/// The first words of numpy's `SeedSequence(entropy, spawn_key=key, pool_size=24).generate_state`.
fn seeds<const N: usize>(entropy: u64, key: &[u64]) -> [u32; N] {
    const POOL: usize = 24;
    // A number is its 32-bit words, the low one first, without leading zeros.
    let words = |number: u64| {
        let high = (number >> 32) as u32;
        [number as u32].into_iter().chain((high > 0).then_some(high))
    };
    let mut assembled: Vec<u32> = words(entropy).collect();
    if !key.is_empty() {
        assembled.resize(POOL, 0);
        assembled.extend(key.iter().flat_map(|part| words(*part)));
    }
    let mut constant = 0x43b0_d7e5u32;
    let mut hash = |word: u32| {
        let word = word ^ constant;
        constant = constant.wrapping_mul(0x931e_8875);
        let word = word.wrapping_mul(constant);
        word ^ (word >> 16)
    };
    let mix = |x: u32, y: u32| {
        let mixed = x.wrapping_mul(0xca01_f9dd).wrapping_sub(y.wrapping_mul(0x4973_f715));
        mixed ^ (mixed >> 16)
    };
    let mut pool: [u32; POOL] = std::array::from_fn(|i| hash(assembled.get(i).copied().unwrap_or(0)));
    for from in 0..POOL {
        for to in (0..POOL).filter(|to| *to != from) {
            pool[to] = mix(pool[to], hash(pool[from]));
        }
    }
    for &word in assembled.iter().skip(POOL) {
        for slot in &mut pool {
            *slot = mix(*slot, hash(word));
        }
    }
    let mut constant = 0x8b51_f9ddu32;
    std::array::from_fn(|i| {
        let word = pool[i % POOL] ^ constant;
        constant = constant.wrapping_mul(0x58f3_8ded);
        let word = word.wrapping_mul(constant);
        word ^ (word >> 16)
    })
}
