//! Assigns concepts to the images of a run: by exact quotas over all images, or by independent draws.

use super::Concept;
use crate::draws::Draws;
use crate::{Error, Result};
use std::sync::Arc;

/// A group of concepts, such as "a woman" and "a man", of which each image gets one.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Group {
    /// The concepts.
    pub members: Vec<Arc<Concept>>,
    /// The share of the images that each concept is to have. Shares add up to 1.
    pub shares: Vec<f64>,
}

impl Group {
    /// A group with the given shares, which are scaled to add up to 1, or with equal ones.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for fewer than two members, another number of shares, or shares that are not
    /// proportions.
    pub fn new(members: Vec<Arc<Concept>>, shares: Option<Vec<f64>>) -> Result<Self> {
        if members.len() < 2 {
            return Err(Error::invalid(
                "balance",
                format!("a group needs two concepts, and this one has {}", members.len()),
            )
            .advise("give two concepts or more"));
        }
        let shares = shares.unwrap_or_else(|| vec![1.0; members.len()]);
        if shares.len() != members.len() {
            return Err(Error::invalid("balance", format!("{} shares for {} concepts", shares.len(), members.len()))
                .advise("give one share per concept"));
        }
        let total: f64 = shares.iter().sum();
        if shares.iter().any(|s| !s.is_finite() || *s < 0.0) || total <= 0.0 {
            return Err(Error::invalid("balance", "a share is negative or not a number, or all are zero")
                .advise("give positive numbers, such as 0.6,0.4"));
        }
        Ok(Group { members, shares: shares.into_iter().map(|s| s / total).collect() })
    }

    /// The word by which a prompt names an attribute of the group, if there is one. The prompt's author has then
    /// already decided on the attribute.
    ///
    /// It compares whole words in lower case: those of the concepts' own prompts, except articles, "person" and the
    /// like, and for genders also the usual synonyms. The colour of a thing ("a white coat") counts too, since a list
    /// of words cannot distinguish it from an attribute.
    pub fn named_in(&self, prompt: &str) -> Option<String> {
        const PLAIN: [&str; 8] = ["a", "an", "the", "person", "people", "of", "race", "photo"];
        const GENDERS: [&str; 24] = [
            "woman",
            "women",
            "female",
            "females",
            "girl",
            "girls",
            "lady",
            "ladies",
            "she",
            "her",
            "mother",
            "wife",
            "man",
            "men",
            "male",
            "males",
            "boy",
            "boys",
            "gentleman",
            "gentlemen",
            "he",
            "his",
            "father",
            "husband",
        ];
        let words = |text: &str| -> Vec<String> {
            let lower = text.to_lowercase();
            lower.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).map(str::to_string).collect()
        };
        let mut names: Vec<String> = self.members.iter().flat_map(|m| words(&m.metadata.concept)).collect();
        names.retain(|w| !PLAIN.contains(&w.as_str()));
        if names.iter().any(|n| GENDERS.contains(&n.as_str())) {
            names.extend(GENDERS.map(str::to_string));
        }
        words(prompt).into_iter().find(|word| names.contains(word))
    }
}

/// For each image, the index of the member that it gets from each group: `[image][group]`.
///
/// With `random`, every image draws independently. Otherwise the counts of a group are its shares of `images`, rounded
/// by largest remainders, groups are crossed as evenly as these counts allow, and `seed` shuffles the order.
pub fn assign(groups: &[Group], images: usize, seed: u64, random: bool) -> Vec<Vec<usize>> {
    let mut draws = Draws::new(seed, 0xba1a_9ce0);
    if random {
        let mut draw = |group: &Group| {
            let at = f64::from(draws.unit());
            let mut sum = 0.0;
            let found = group.shares.iter().position(|share| {
                sum += share;
                at < sum
            });
            found.unwrap_or(group.shares.len() - 1)
        };
        return (0..images).map(|_| groups.iter().map(&mut draw).collect()).collect();
    }
    let mut rows: Vec<Vec<usize>> = vec![Vec::new(); images];
    for group in groups {
        // Sorting puts images with the same members so far next to each other. Giving each image the member that is
        // furthest behind its share spreads this group evenly over every such stretch.
        rows.sort();
        let quotas = quotas(&group.shares, images);
        let mut given = vec![0usize; quotas.len()];
        for (i, row) in rows.iter_mut().enumerate() {
            let behind = |&member: &usize| group.shares[member] * (i + 1) as f64 - given[member] as f64;
            let open = (0..quotas.len()).filter(|&m| given[m] < quotas[m]);
            let member = open.max_by(|a, b| behind(a).total_cmp(&behind(b)).then(b.cmp(a))).unwrap_or(0);
            given[member] += 1;
            row.push(member);
        }
    }
    // The shuffle of Fisher and Yates.
    for i in (1..rows.len()).rev() {
        rows.swap(i, (draws.next() % (i as u64 + 1)) as usize);
    }
    rows
}

/// Whole counts that add up to `images`, by largest remainders. Of equal remainders, the first is rounded up first.
pub fn quotas(shares: &[f64], images: usize) -> Vec<usize> {
    let exact: Vec<f64> = shares.iter().map(|s| s * images as f64).collect();
    let mut counts: Vec<usize> = exact.iter().map(|e| (e + 1e-9).floor() as usize).collect();
    let mut order: Vec<usize> = (0..shares.len()).collect();
    let remainder = |i: usize| exact[i] - counts[i] as f64;
    let remainders: Vec<f64> = (0..shares.len()).map(remainder).collect();
    order.sort_by(|&a, &b| remainders[b].total_cmp(&remainders[a]));
    let left = images.saturating_sub(counts.iter().sum());
    order.iter().cycle().take(left).for_each(|&i| counts[i] += 1);
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::concept::{Form, Metadata, Module};
    use crate::graph::Shape;

    fn group(names: &[&str], shares: Option<Vec<f64>>) -> Group {
        let concept = |name: &&str| {
            let ram = Module::with_parameters(Form::Constant, Shape::new(1, 1, 1, 1), vec![0.0]).unwrap();
            let metadata = Metadata { concept: name.to_string(), ..Default::default() };
            Arc::new(Concept { metadata, ram, sam: None })
        };
        Group::new(names.iter().map(concept).collect(), shares).unwrap()
    }

    #[test]
    fn quotas_are_exact() {
        let genders = group(&["a woman", "a man"], Some(vec![3.0, 2.0]));
        let races = group(&["an asian-race person", "a black-race person", "a white-race person"], None);
        for images in [1, 2, 5, 7, 30, 150] {
            let rows = assign(&[genders.clone(), races.clone()], images, 3, false);
            for (g, group) in [&genders, &races].into_iter().enumerate() {
                let counts: Vec<usize> =
                    (0..group.shares.len()).map(|m| rows.iter().filter(|row| row[g] == m).count()).collect();
                assert_eq!(counts, quotas(&group.shares, images), "{images}");
                assert!(counts.iter().zip(&group.shares).all(|(&c, s)| (c as f64 - s * images as f64).abs() < 1.0));
            }
            // Groups are crossed: every pair is within two images of independence.
            for (a, b) in (0..2).flat_map(|a| (0..3).map(move |b| (a, b))) {
                let joint = rows.iter().filter(|row| row[0] == a && row[1] == b).count() as f64;
                let even = genders.shares[a] * races.shares[b] * images as f64;
                assert!((joint - even).abs() <= 2.0, "{images}: {a} {b} {joint} {even}");
            }
        }
        let rows = assign(std::slice::from_ref(&genders), 150, 3, false);
        assert_eq!(rows, assign(std::slice::from_ref(&genders), 150, 3, false));
        assert_ne!(rows, assign(std::slice::from_ref(&genders), 150, 4, false));
        let random = assign(&[genders], 20_000, 3, true);
        let women = random.iter().filter(|row| row[0] == 0).count() as f64 / 20_000.0;
        assert!((women - 0.6).abs() < 0.02, "{women}");
    }

    #[test]
    fn prompts_that_name_an_attribute() {
        let genders = group(&["a woman", "a man"], None);
        let races = group(&["a black-race person", "a white-race person"], None);
        for (prompt, gender, race) in [
            ("a photo of a doctor", None, None),
            ("a female doctor", Some("female"), None),
            ("portrait of a Black chef, a man", Some("man"), Some("black")),
            ("a woman's work, a person of any race", Some("woman"), None),
            ("a human manager", None, None),
        ] {
            assert_eq!(genders.named_in(prompt).as_deref(), gender, "{prompt}");
            assert_eq!(races.named_in(prompt).as_deref(), race, "{prompt}");
        }
    }
}
