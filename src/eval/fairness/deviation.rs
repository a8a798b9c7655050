//! Deviation ratios: the distance of the classes that pictures show from the wanted shares.

use super::super::statistics::standard_error;
use crate::draws::Draws;
use serde::Serialize;

/// A measured value and its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Measure {
    /// The value.
    pub value: f64,
    /// Both ends of the interval.
    pub interval: [f64; 2],
}

impl Measure {
    /// A ratio with an interval of 1.96 standard errors to both sides, within 0 and 1.
    pub(super) fn ratio(value: f64, error: f64) -> Self {
        Measure { value, interval: [(value - 1.96 * error).max(0.0), (value + 1.96 * error).min(1.0)] }
    }
}

/// The distance of counts from shares that add up to 1, `max_c |N_c / N - t_c| / (1 - min_c t_c)`: 0 if they agree, and
/// 1 if all pictures show the class of which the fewest are wanted. With equal shares it is the measure of Concept
/// Algebra (arXiv 2302.03693) and RespoDiff.
pub fn deviation_ratio(counts: &[f64], shares: &[f64]) -> f64 {
    let total: f64 = counts.iter().sum();
    let least = shares.iter().copied().fold(1.0, f64::min);
    if total <= 0.0 || least >= 1.0 {
        return 0.0;
    }
    let furthest = counts.iter().zip(shares).map(|(n, share)| (n / total - share).abs()).fold(0.0, f64::max);
    furthest / (1.0 - least)
}

/// [`deviation_ratio`] of one class per picture.
fn of_classes(classes: impl Iterator<Item = usize>, shares: &[f64]) -> f64 {
    let mut counts = vec![0.0; shares.len()];
    classes.for_each(|class| counts[class] += 1.0);
    deviation_ratio(&counts, shares)
}

fn mean(ratios: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = ratios.len().max(1);
    ratios.sum::<f64>() / count as f64
}

/// The mean deviation ratio over professions, with its interval. `counts` holds the number of pictures of each class,
/// one list for each profession.
///
/// The standard error is that of means over pictures that are drawn anew (the normal bootstrap). Percentiles of such
/// means would not do: near 0 the ratio of drawn pictures is biased upward, so that they might not even contain the
/// measured ratio. A class is drawn with its share after half a picture is added to each class (Jeffreys' prior), so
/// that the interval has a width even where all pictures show one class.
pub fn mean_deviation_ratio(counts: &[Vec<usize>], shares: &[f64]) -> Measure {
    let ratio = |counts: &Vec<usize>| {
        let counts: Vec<f64> = counts.iter().map(|&n| n as f64).collect();
        deviation_ratio(&counts, shares)
    };
    let error = standard_error(|draw| {
        mean(counts.iter().map(|counts| {
            let total: usize = counts.iter().sum();
            let mut class = || {
                let mut index = draw(2 * total + counts.len());
                let mut class = 0;
                while index > 2 * counts[class] {
                    index -= 2 * counts[class] + 1;
                    class += 1;
                }
                class
            };
            of_classes((0..total).map(|_| class()), shares)
        }))
    });
    Measure::ratio(mean(counts.iter().map(ratio)), error)
}

/// The mean deviation ratio that is to be expected if every picture's class were drawn from the shares: less than this
/// is only possible if classes are dealt, and not drawn. `totals` holds the number of pictures of each profession.
pub fn chance(totals: &[usize], shares: &[f64]) -> f64 {
    let drawn = drawn(totals, shares);
    drawn.iter().sum::<f64>() / drawn.len() as f64
}

/// The p of a measured ratio: the share of ratios by chance that are as large, the measured one among them.
pub(super) fn share_as_far(drawn: &[f64], measured: f64) -> f64 {
    // Sums in another order may differ in their last bits.
    let as_far = drawn.iter().filter(|&&ratio| ratio >= measured - 1e-12).count();
    (1 + as_far) as f64 / (1 + drawn.len()) as f64
}

/// A thousand mean deviation ratios of pictures whose classes are drawn from the shares.
pub(super) fn drawn(totals: &[usize], shares: &[f64]) -> Vec<f64> {
    const ROUNDS: usize = 1000;
    let mut draws = Draws::new(1, 0);
    let mut class = || {
        let mut rest = f64::from(draws.unit());
        let drawn = shares.iter().position(|share| {
            rest -= share;
            rest < 0.0
        });
        drawn.unwrap_or(shares.len() - 1)
    };
    let mut round = || mean(totals.iter().map(|&total| of_classes((0..total).map(|_| class()), shares)));
    (0..ROUNDS).map(|_| round()).collect()
}

/// The two-sided p of a permutation test for a difference between two mean deviation ratios. `pairs` holds, for each
/// profession, the classes of two pictures from the same seed. Without a difference between the two kinds of pictures,
/// the pictures of every pair could be exchanged.
pub fn paired_p(pairs: &[Vec<[usize; 2]>], shares: &[f64]) -> f64 {
    const ROUNDS: usize = 2000;
    let difference = |swap: &mut dyn FnMut() -> usize| {
        let differences = pairs.iter().map(|pairs| {
            let mut counts = [vec![0.0; shares.len()], vec![0.0; shares.len()]];
            for pair in pairs {
                let first = swap();
                counts[0][pair[first]] += 1.0;
                counts[1][pair[1 - first]] += 1.0;
            }
            deviation_ratio(&counts[0], shares) - deviation_ratio(&counts[1], shares)
        });
        mean(differences).abs()
    };
    let measured = difference(&mut || 0);
    let mut draws = Draws::new(2, 0);
    // Sums in another order may differ in their last bits.
    let as_far = (0..ROUNDS).filter(|_| difference(&mut || (draws.next() >> 63) as usize) >= measured - 1e-12).count();
    (1 + as_far) as f64 / (1 + ROUNDS) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_ratios() {
        let even = |classes: usize| vec![1.0 / classes as f64; classes];
        for (counts, shares, truth) in [
            (&[50.0, 50.0][..], even(2), 0.0),
            (&[100.0, 0.0], even(2), 1.0),
            (&[90.0, 10.0], even(2), 0.8),
            (&[50.0, 25.0, 25.0], even(3), 0.25),
            (&[0.0, 0.0, 9.0], even(3), 1.0),
            (&[0.0, 0.0], even(2), 0.0),
            // 3 of 4 are wanted and 2 of 4 are there; the furthest distance would be 0.75.
            (&[2.0, 2.0], vec![0.75, 0.25], 1.0 / 3.0),
            (&[0.0, 4.0], vec![0.75, 0.25], 1.0),
            (&[30.0, 10.0], vec![0.75, 0.25], 0.0),
        ] {
            assert!((deviation_ratio(counts, &shares) - truth).abs() < 1e-12, "{counts:?}");
        }
    }

    #[test]
    fn intervals_cover() {
        let even = [0.5, 0.5];
        // 90 of 100 twice: the ratio 2 |p - 1/2| has a standard error of 2 sqrt(.9 * .1 / 100) / sqrt(2) = 0.042.
        let Measure { value, interval: [low, high] } = mean_deviation_ratio(&vec![vec![90, 10]; 2], &even);
        assert!((value - 0.8).abs() < 1e-12);
        assert!((high - low - 2.0 * 1.96 * 0.0424).abs() < 0.03, "{low} {high}");
        // Ten pictures of one class do not prove that there are no others.
        let Measure { value, interval: [low, high] } = mean_deviation_ratio(&[vec![10, 0]], &even);
        assert!(value == 1.0 && high == 1.0 && (0.6..0.95).contains(&low), "{low}");
    }

    /// Of two pictures of two classes, half the draws show both and half show one: the mean ratio is 1/2. For many, it
    /// is that of a normal distribution, 2 sqrt(2 / pi) sqrt(.25 / n).
    #[test]
    fn chance_is_that_of_the_binomial_distribution() {
        assert!((chance(&[2; 8], &[0.5, 0.5]) - 0.5).abs() < 0.02);
        let truth = 2.0 * (2.0 / std::f64::consts::PI).sqrt() * (0.25f64 / 400.0).sqrt();
        assert!((chance(&[400; 4], &[0.5, 0.5]) - truth).abs() < 0.002, "{}", chance(&[400; 4], &[0.5, 0.5]));
    }

    #[test]
    fn permutations_find_what_is_there() {
        let even = [0.5, 0.5];
        // All plain pictures show class 0, and the others both classes in turn.
        let pairs: Vec<[usize; 2]> = (0..40).map(|i| [0, i % 2]).collect();
        assert!(paired_p(&[pairs.clone(), pairs], &even) < 0.002);
        // By brute force over all 2^6 exchanges of six pairs, of which these exceed or equal the measured difference.
        let pairs = vec![[0, 1], [0, 0], [0, 1], [1, 0], [0, 1], [0, 0]];
        let ratios = |mask: usize| {
            let side =
                |s: usize| of_classes(pairs.iter().enumerate().map(|(i, pair)| pair[s ^ (mask >> i & 1)]), &even);
            (side(0) - side(1)).abs()
        };
        let truth = (0..64).filter(|&mask| ratios(mask) >= ratios(0) - 1e-12).count() as f64 / 64.0;
        assert!((paired_p(std::slice::from_ref(&pairs), &even) - truth).abs() < 0.04, "{truth}");
    }
}
