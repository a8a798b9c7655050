//! How strongly a concept acts on an image, and in which steps.

use serde::{Deserialize, Serialize};

/// Guidance scales between which calibrated weights follow the guidance. Beyond, weights stay as at the nearest.
const FOLLOWED_GUIDANCE: (f32, f32) = (3.0, 12.0);

/// The strength of a concept in one image.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Strength {
    /// Factor of RAM and SAM; 1 as published. A negative one moves away from the concept.
    pub weight: f32,
    /// The timestep, 0 to 1000, below which the concept acts no more; 0, as published, for a concept that acts in every
    /// step. Whom a picture shows is decided at high timesteps; details, which concepts can harm, at low ones.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub until: f32,
}

fn is_zero(until: &f32) -> bool {
    *until == 0.0
}

impl Default for Strength {
    fn default() -> Self {
        Strength { weight: 1.0, until: 0.0 }
    }
}

impl From<f32> for Strength {
    fn from(weight: f32) -> Self {
        Strength { weight, ..Strength::default() }
    }
}

impl Strength {
    /// The same down to a timestep.
    #[must_use]
    pub fn until(self, timestep: f32) -> Self {
        Strength { until: timestep, ..self }
    }

    /// True if the concept acts in the step at this timestep.
    pub(crate) fn acts_at(self, timestep: f32) -> bool {
        self.until <= 0.0 || timestep >= self.until
    }

    /// A description of the fault and advice, if the strength is not possible.
    pub(crate) fn problem(self) -> Option<(String, &'static str)> {
        if !self.weight.is_finite() {
            return Some((format!("the weight {} is not finite", self.weight), "give a number"));
        }
        let is_timestep = (0.0..=1000.0).contains(&self.until);
        (!is_timestep).then(|| (format!("{} is not a timestep", self.until), "give 0 to 1000; 500 is the middle"))
    }
}

impl std::fmt::Display for Strength {
    /// `1.2`, or `1.2 down to timestep 500`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.until > 0.0 {
            true => write!(f, "{} down to timestep {}", self.weight, self.until),
            false => write!(f, "{}", self.weight),
        }
    }
}

/// The strength that was found best for a concept by measuring pictures, and that measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Calibration {
    /// The strength at [`Calibration::guidance`].
    #[serde(flatten)]
    pub strength: Strength,
    /// The guidance scale of the measured pictures.
    pub guidance: f32,
    /// Names of the concepts that were balanced, group by group.
    pub groups: Vec<Vec<String>>,
    /// Mean deviation ratio of plain and of balanced pictures, of the groups' combinations if there are several.
    pub deviation_ratio: [f64; 2],
    /// Mean alignment with the prompt of plain and of balanced pictures, 100 times the cosine of CLIP's embeddings.
    pub alignment: [f64; 2],
    /// Number of plain pictures, and of balanced ones.
    pub pictures: usize,
}

impl Calibration {
    /// The strength at a guidance scale. Guidance multiplies what a concept changes in the prediction, but also what
    /// the prompt itself says against it, so weights fall with the square root of guidance. The exponent is an
    /// observation on the demo, from 3 to 12.
    pub fn at(&self, guidance: f32) -> Strength {
        let (least, most) = FOLLOWED_GUIDANCE;
        let ratio = self.guidance.clamp(least, most) / guidance.clamp(least, most);
        Strength { weight: self.strength.weight * ratio.sqrt(), ..self.strength }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_follow_guidance_between_3_and_12() {
        let calibration = Calibration {
            strength: Strength::from(1.2).until(500.0),
            guidance: 12.0,
            groups: Vec::new(),
            deviation_ratio: [0.8, 0.1],
            alignment: [30.0, 30.0],
            pictures: 100,
        };
        for (guidance, weight) in [(12.0, 1.2), (50.0, 1.2), (3.0, 2.4), (1.0, 2.4), (6.75, 1.6)] {
            let strength = calibration.at(guidance);
            assert!((strength.weight - weight).abs() < 1e-6, "{guidance}: {strength}");
            assert_eq!(strength.until, 500.0);
        }
        let text = serde_json::to_string(&calibration).unwrap();
        assert_eq!(serde_json::from_str::<Calibration>(&text).unwrap(), calibration);
    }
}
