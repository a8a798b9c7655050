//! The choice of the timesteps, or of the sigmas, at which steps are taken.

use super::Spacing;
use super::table::Table;

/// The timesteps of a spacing, from the noisiest down (table 2 of arXiv 2305.08891).
pub(super) struct Timesteps {
    pub spacing: Spacing,
    pub num_train_timesteps: usize,
    /// The timesteps below this one are used: `num_train_timesteps` unless clipped.
    pub end: usize,
    pub steps: usize,
    /// True if one timestep more is spaced and timestep 0 is left out, as for multistep solvers.
    pub skip_zero: bool,
    pub steps_offset: u32,
}

impl Timesteps {
    /// The timesteps, which are whole except for `Linspace`.
    pub fn list(&self) -> Vec<f64> {
        let points = self.steps + self.skip_zero as usize;
        let rising = (self.skip_zero as usize..points).rev();
        match self.spacing {
            Spacing::Trailing => {
                // The stride is rounded as in numpy's `arange`, so that ties between timesteps are rounded alike.
                let end = self.end as f64;
                let stride = end - (end - self.num_train_timesteps as f64 / self.steps as f64);
                let at = |i: usize| (end - i as f64 * stride).round_ties_even() - 1.0;
                (0..self.steps).map(at).take_while(|timestep| *timestep >= 0.0).collect()
            }
            Spacing::Leading => {
                let stride = self.end / points;
                rising.map(|i| (i * stride + self.steps_offset as usize) as f64).collect()
            }
            _ => {
                let stride = (self.end.saturating_sub(1)) as f64 / (points - 1).max(1) as f64;
                rising.map(|i| i as f64 * stride).collect()
            }
        }
    }
}

/// The sigmas of Align Your Steps (arXiv 2404.14507) for ten steps, as its authors published them.
const AYS_SD: [f64; 11] = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029];
const AYS_SDXL: [f64; 11] = [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029];

/// `steps` sigmas of a spacing of sigmas, falling. Spacings between two sigmas go from `max` down to `min`; the others
/// span all of `table`, or are published for SDXL (`xl`) and for the older models.
pub(super) fn spaced_sigmas(
    spacing: Spacing,
    (max, min): (f64, f64),
    steps: usize,
    table: &Table,
    xl: bool,
) -> Vec<f64> {
    let last = (steps - 1).max(1) as f64;
    let between = |at: fn(f64) -> f64, back: fn(f64) -> f64| -> Vec<f64> {
        let (max, min) = (at(max), at(min));
        (0..steps).map(|i| back(max + i as f64 / last * (min - max))).collect()
    };
    match spacing {
        Spacing::Karras => between(|sigma| sigma.powf(1.0 / 7.0), |root| root.powf(7.0)),
        Spacing::KlOptimal => between(f64::atan, f64::tan),
        Spacing::Beta => (0..steps).map(|i| min + beta_quantile(1.0 - i as f64 / last) * (max - min)).collect(),
        Spacing::AlignYourSteps => {
            let published = if xl { AYS_SDXL } else { AYS_SD };
            let at = |i: usize| {
                // The last of steps + 1 points is left out: steps end at 0.
                let place = i as f64 * 10.0 / steps as f64;
                let low = place as usize;
                let (a, b) = (published[low].ln(), published[low + 1].ln());
                (a + (b - a) * (place - low as f64)).exp()
            };
            (0..steps).map(at).collect()
        }
        Spacing::SgmUniform => {
            let last = (table.len() - 1) as f64;
            (0..steps).map(|i| table.sigma_by_logarithm(last - i as f64 * last / steps as f64)).collect()
        }
        Spacing::Simple => {
            let stride = table.len() as f64 / steps as f64;
            (0..steps).map(|i| table.sigma((table.len() - 1 - (i as f64 * stride) as usize) as f64)).collect()
        }
        _ => between(f64::ln, f64::exp),
    }
}

/// The quantile of the beta distribution with alpha = beta = 0.6.
///
/// Its density is symmetric, so that one half suffices. There the distribution function is a power series, which is
/// normalised by its value of 1/2 at 1/2, and rises, so that it is inverted by bisection.
fn beta_quantile(p: f64) -> f64 {
    const A: f64 = 0.6;
    if p > 0.5 {
        return 1.0 - beta_quantile(1.0 - p);
    }
    let integral = |x: f64| {
        let (mut power, mut sum) = (1.0, 0.0);
        for n in 0..60 {
            sum += power / (n as f64 + A);
            power *= x * (n as f64 + 1.0 - A) / (n as f64 + 1.0);
        }
        x.powf(A) * sum
    };
    let wanted = 2.0 * p * integral(0.5);
    let (mut low, mut high) = (0.0, 0.5);
    // Floating-point numbers between two others run out in the end.
    loop {
        let middle = 0.5 * (low + high);
        match middle {
            _ if middle <= low || middle >= high => return low,
            _ if integral(middle) < wanted => low = middle,
            _ => high = middle,
        }
    }
}

#[cfg(test)]
mod tests {
    /// `scipy.stats.beta.ppf(p, 0.6, 0.6)` of scipy 1.17.1.
    #[test]
    fn beta_quantiles_are_scipys() {
        for (p, quantile) in [
            (0.0, 0.0),
            (1e-06, 1.8558824624053043e-10),
            (0.013, 0.0013334534982845446),
            (0.25, 0.17568037865269498),
            (0.4999, 0.49986127490549975),
            (0.5, 0.5000000000000001),
            (0.61, 0.6506988426928272),
            (0.9, 0.9604155944112192),
            (0.999, 0.9999814412614826),
            (1.0, 1.0),
        ] {
            let ours = super::beta_quantile(p);
            assert!((ours - quantile).abs() <= 1e-13 * quantile, "{p}: {ours} is not {quantile}");
        }
    }
}
