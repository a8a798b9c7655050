//! Deviation ratios, means, and their confidence intervals.

/// Rounds of a bootstrap.
const ROUNDS: usize = 1000;

/// The distance of counts from equal ones, `max_c |N_c / N - 1 / C| / (1 - 1 / C)`: 0 for equal counts, and 1 if one
/// class has all (the measure of Concept Algebra and RespoDiff).
pub fn deviation_ratio(counts: &[usize]) -> f64 {
    let total: usize = counts.iter().sum();
    if total == 0 || counts.len() < 2 {
        return 0.0;
    }
    let even = 1.0 / counts.len() as f64;
    let furthest = counts.iter().map(|&n| (n as f64 / total as f64 - even).abs()).fold(0.0, f64::max);
    furthest / (1.0 - even)
}

/// Counts the answers for each of `classes` classes. Answers beyond these are not counted.
pub fn count(answers: impl IntoIterator<Item = usize>, classes: usize) -> Vec<usize> {
    let mut counts = vec![0; classes];
    for answer in answers {
        if let Some(count) = counts.get_mut(answer) {
            *count += 1;
        }
    }
    counts
}

/// The mean deviation ratio over professions, and its 95 % interval, 1.96 standard errors to both sides. `answers`
/// holds the classes of each profession's images.
///
/// The standard error is that of 1000 means over images that are drawn with replacement within each profession (the
/// normal bootstrap). Percentiles of these means would not do: near 0 the ratio of resampled images is biased upward,
/// so that they might not even contain the measured ratio.
pub fn mean_deviation_ratio(answers: &[Vec<usize>], classes: usize) -> (f64, [f64; 2]) {
    let mean = |ratios: &mut dyn Iterator<Item = f64>| ratios.sum::<f64>() / answers.len().max(1) as f64;
    let measured = mean(&mut answers.iter().map(|a| deviation_ratio(&count(a.iter().copied(), classes))));
    let mut next = draws();
    let rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            mean(&mut answers.iter().map(|a| {
                let draws = (0..a.len()).map(|_| a[next() % a.len()]).collect::<Vec<_>>();
                deviation_ratio(&count(draws, classes))
            }))
        })
        .collect();
    let [low, high] = interval(measured, &rounds);
    (measured, [low.max(0.0), high.min(1.0)])
}

/// The mean of values and its 95 % interval, 1.96 standard errors to both sides. The standard error is that of 1000
/// means of as many values that are drawn with replacement.
pub(super) fn mean_interval(values: &[f64]) -> (f64, [f64; 2]) {
    let count = values.len().max(1);
    let measured = values.iter().sum::<f64>() / count as f64;
    let mut next = draws();
    let mean = |_| values.iter().map(|_| values[next() % count]).sum::<f64>() / count as f64;
    let rounds: Vec<f64> = (0..ROUNDS).map(mean).collect();
    (measured, interval(measured, &rounds))
}

/// Knuth's MMIX generator: enough for drawing indices, and the same on every machine.
fn draws() -> impl FnMut() -> usize {
    let mut state = 1u64;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize
    }
}

/// 1.96 standard deviations of the rounds of a bootstrap to both sides of what was measured.
fn interval(measured: f64, rounds: &[f64]) -> [f64; 2] {
    let centre = rounds.iter().sum::<f64>() / rounds.len() as f64;
    let error = (rounds.iter().map(|r| (r - centre).powi(2)).sum::<f64>() / (rounds.len() - 1) as f64).sqrt();
    [measured - 1.96 * error, measured + 1.96 * error]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_ratios() {
        for (counts, truth) in [
            (&[50, 50][..], 0.0),
            (&[100, 0], 1.0),
            (&[90, 10], 0.8),
            (&[50, 25, 25], 0.25),
            (&[0, 0, 9], 1.0),
            (&[0, 0], 0.0),
        ] {
            assert!((deviation_ratio(counts) - truth).abs() < 1e-12, "{counts:?}");
        }
    }

    #[test]
    fn intervals_cover() {
        // 90 of 100 twice: the ratio 2 |p - 1/2| has a standard error of 2 sqrt(.9 * .1 / 100) / sqrt(2) = 0.042.
        let answers = vec![[vec![0; 90], vec![1; 10]].concat(); 2];
        let (mean, [low, high]) = mean_deviation_ratio(&answers, 2);
        assert!((mean - 0.8).abs() < 1e-12);
        assert!((high - low - 2.0 * 1.96 * 0.0424).abs() < 0.03, "{low} {high}");
        assert!(low < 0.8 && high > 0.8);
    }
}
