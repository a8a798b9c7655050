//! Shares, their confidence intervals, and tests.

/// The standard error of a statistic, as that of 1000 values of it, each from another sample. The statistic is given a
/// function that draws an index below a number.
pub(super) fn standard_error(mut statistic: impl FnMut(&mut dyn FnMut(usize) -> usize) -> f64) -> f64 {
    const ROUNDS: usize = 1000;
    let mut state = 1u64;
    let mut draw = |below: usize| {
        // Knuth's MMIX generator: enough for drawing indices, and the same on every machine.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let rounds: Vec<f64> = (0..ROUNDS).map(|_| statistic(&mut draw)).collect();
    let centre = rounds.iter().sum::<f64>() / ROUNDS as f64;
    (rounds.iter().map(|r| (r - centre).powi(2)).sum::<f64>() / (ROUNDS - 1) as f64).sqrt()
}

/// A number of things in words: "1 picture", "2 pictures".
pub(super) fn counted(count: usize, thing: &str) -> String {
    format!("{count} {thing}{}", if count == 1 { "" } else { "s" })
}

/// Wilson's 95 % interval of a share (Wilson, 1927), for independent trials.
pub(super) fn wilson(hits: usize, total: usize) -> [f64; 2] {
    if total == 0 {
        return [0.0, 1.0];
    }
    const Z: f64 = 1.96;
    let (n, p) = (total as f64, hits as f64 / total as f64);
    let centre = p + Z * Z / (2.0 * n);
    let half = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + Z * Z / n;
    [((centre - half) / scale).max(0.0), ((centre + half) / scale).min(1.0)]
}

/// The two-sided p of McNemar's exact test (McNemar, 1947): of pairs that differ, `a` differ in one direction and `b`
/// in the other. Without an effect, either direction has probability 1/2.
pub(super) fn mcnemar(a: usize, b: usize) -> f64 {
    let n = a + b;
    let mut log = -(n as f64) * std::f64::consts::LN_2;
    let mut tail = log.exp();
    for k in 1..=a.min(b) {
        log += ((n - k + 1) as f64 / k as f64).ln();
        tail += log.exp();
    }
    (2.0 * tail).min(1.0)
}

/// The expected maximum of `count` values that are drawn from `values` without replacement; `None` if there are fewer.
pub(super) fn expected_maximum(values: &[f64], count: usize) -> Option<f64> {
    if values.len() < count || count == 0 {
        return None;
    }
    let mut sorted = values.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    // The probability that none of the values so far was drawn, times that the next one is.
    let (mut none, mut sum) = (1.0, 0.0);
    for (k, value) in sorted.iter().enumerate() {
        let drawn = count as f64 / (sorted.len() - k) as f64;
        sum += none * drawn.min(1.0) * value;
        none *= (1.0 - drawn).max(0.0);
    }
    Some(sum)
}

/// The mean of values and its 95 % interval, 1.96 standard errors to both sides. The standard error is that of 1000
/// means of as many values that are drawn with replacement.
pub(super) fn mean_interval(values: &[f64]) -> (f64, [f64; 2]) {
    let count = values.len().max(1);
    let measured = values.iter().sum::<f64>() / count as f64;
    let error = standard_error(|draw| values.iter().map(|_| values[draw(count)]).sum::<f64>() / count as f64);
    (measured, [measured - 1.96 * error, measured + 1.96 * error])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_intervals_and_tests() {
        // The score equation (p - h)^2 = 1.96^2 p (1 - p) / n, solved by hand.
        for (hits, total, truth) in [(0, 10, [0.0, 0.2775]), (5, 50, [0.0435, 0.2136]), (20, 20, [0.8389, 1.0])] {
            let interval = wilson(hits, total);
            assert!((0..2).all(|i| (interval[i] - truth[i]).abs() < 1e-4), "{hits} of {total}: {interval:?}");
        }
        // 2 * sum of binomial(n, k) / 2^n.
        for (a, b, truth) in [(0, 0, 1.0), (0, 5, 2.0 / 32.0), (3, 10, 2.0 * 378.0 / 8192.0), (4, 4, 1.0)] {
            assert!((mcnemar(a, b) - truth).abs() < 1e-12, "{a} {b}: {}", mcnemar(a, b));
            assert_eq!(mcnemar(a, b), mcnemar(b, a));
        }
        assert!(mcnemar(10_000, 200) < 1e-300);
    }

    #[test]
    fn expected_maxima_are_those_of_all_samples() {
        let values: [f64; 5] = [0.1, 0.9, 0.4, 0.4, 0.0];
        let mut sum = 0.0;
        for (i, a) in values.iter().enumerate() {
            for (j, b) in values.iter().enumerate().skip(i + 1) {
                sum += values.iter().skip(j + 1).map(|c| a.max(*b).max(*c)).sum::<f64>();
            }
        }
        assert!((expected_maximum(&values, 3).unwrap() - sum / 10.0).abs() < 1e-12);
        assert_eq!(expected_maximum(&values, 5), Some(0.9));
        assert_eq!(expected_maximum(&values, 6), None);
    }
}
