//! The random numbers of trainings and quotas.

/// A seed from the clock. It only has to differ from run to run, and it is recorded.
#[cfg(feature = "pipeline")]
pub(crate) fn random_seed() -> u64 {
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::from(time.subsec_nanos()) ^ time.as_secs() & 0xffff_ffff
}

/// A generator whose numbers depend on a seed and a position alone, so that a resumed training draws the same numbers
/// as an uninterrupted one (SplitMix64, Steele et al. 2014).
pub(crate) struct Draws(u64);

impl Draws {
    /// The generator of one position, such as the number of a rollout.
    pub(crate) fn new(seed: u64, position: u64) -> Self {
        let mut start = Draws(seed);
        Draws(start.next() ^ position.wrapping_mul(0xd134_2543_de82_ef95))
    }

    /// The next 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The next number in 0..1, in steps of 2^-24.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32
    }
}
