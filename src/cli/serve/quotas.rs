//! Exact quotas over streams of pictures.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The names of a group's concepts, and their shares, which add up to 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Shares {
    pub(super) concepts: Vec<String>,
    pub(super) shares: Vec<f64>,
}

/// A stream of pictures over which quotas are exact: those of a tenant or of everybody, for the groups that were free,
/// which are those of which the prompt names no attribute. A change of shares begins another stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Stream {
    pub(super) tenant: Option<String>,
    pub(super) groups: Vec<Shares>,
}

impl Stream {
    /// The groups in words.
    pub(super) fn key(&self) -> String {
        let groups = self.groups.iter().map(|group| format!("{}={:?}", group.concepts.join(","), group.shares));
        groups.collect::<Vec<_>>().join(" x ")
    }

    /// The shares of all combinations of the groups' concepts, the last group's changing first.
    pub(super) fn shares(&self) -> Vec<f64> {
        self.groups.iter().fold(vec![1.0], |all, group| {
            let total: f64 = group.shares.iter().sum();
            all.iter().flat_map(|a| group.shares.iter().map(move |share| a * share / total)).collect()
        })
    }
}

/// A picture's place in a stream, and the combination of concepts that it got.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Turn {
    #[serde(flatten)]
    pub(super) stream: Stream,
    pub(super) combination: usize,
    /// 1 for the first picture of the stream.
    pub(super) count: u64,
}

impl Turn {
    /// The member of each group.
    pub(super) fn members(&self) -> Vec<usize> {
        let mut rest = self.combination;
        let mut members: Vec<usize> = Vec::new();
        for group in self.stream.groups.iter().rev() {
            members.push(rest % group.concepts.len());
            rest /= group.concepts.len();
        }
        members.reverse();
        members
    }
}

/// The pictures that each combination has had in each stream.
type Streams = BTreeMap<String, Vec<u64>>;

/// The counts of all streams.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Counts {
    #[serde(default)]
    all: Streams,
    #[serde(default)]
    tenants: BTreeMap<String, Streams>,
}

impl Counts {
    fn of(&self, stream: &Stream) -> Vec<u64> {
        let streams = match &stream.tenant {
            None => Some(&self.all),
            Some(tenant) => self.tenants.get(tenant),
        };
        let mut counts = streams.and_then(|streams| streams.get(&stream.key())).cloned().unwrap_or_default();
        counts.resize(stream.shares().len(), 0);
        counts
    }

    /// The next picture's turn.
    pub(super) fn next(&self, stream: Stream) -> Turn {
        let counts = self.of(&stream);
        Turn { combination: owed(&counts, &stream.shares()), count: counts.iter().sum::<u64>() + 1, stream }
    }

    /// True if all pictures of the stream before this one are counted, and this one is not.
    pub(super) fn lacks(&self, turn: &Turn) -> bool {
        self.of(&turn.stream).iter().sum::<u64>() + 1 == turn.count
    }

    /// Counts a picture.
    pub(super) fn add(&mut self, turn: &Turn) {
        let mut counts = self.of(&turn.stream);
        if let Some(count) = counts.get_mut(turn.combination) {
            *count += 1;
        }
        let streams = match &turn.stream.tenant {
            None => &mut self.all,
            Some(tenant) => self.tenants.entry(tenant.clone()).or_default(),
        };
        streams.insert(turn.stream.key(), counts);
    }
}

/// The combination to which the stream owes most: the one furthest behind its share once this picture is counted. For
/// shares that are multiples of 1/N, the choice has a period of N, so any N pictures in a row have exactly these
/// shares.
pub(super) fn owed(counts: &[u64], shares: &[f64]) -> usize {
    let total = counts.iter().sum::<u64>() + 1;
    let behind = |i: usize| shares[i] * total as f64 - counts[i] as f64;
    // Of equals, the first: a difference of rounding is none.
    (1..shares.len()).fold(0, |best, i| if behind(i) > behind(best) + 1e-9 { i } else { best })
}

/// The least N up to 1000 of whose multiples the shares are, if there is one: the length of windows in which quotas are
/// exact.
pub(super) fn period(shares: &[f64]) -> Option<usize> {
    let is_whole = |x: f64| (x - x.round()).abs() < 1e-9;
    (1..=1000).find(|&n| shares.iter().all(|share| is_whole(share * n as f64)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_window_has_the_shares() {
        for groups in [
            vec![vec![1.0, 1.0]],
            vec![vec![0.6, 0.4]],
            vec![vec![1.0, 1.0], vec![1.0, 1.0, 1.0]],
            vec![vec![1.0, 1.0], vec![0.5, 0.5]],
            vec![vec![0.7, 0.2, 0.1], vec![0.75, 0.25]],
            vec![vec![1.0, 0.0]],
        ] {
            let name = |i: usize| i.to_string();
            let group =
                |shares: &Vec<f64>| Shares { concepts: (0..shares.len()).map(name).collect(), shares: shares.clone() };
            let stream = Stream { tenant: Some("t".into()), groups: groups.iter().map(group).collect() };
            let shares = stream.shares();
            let period = period(&shares).unwrap();
            let mut counts = Counts::default();
            let mut turns = Vec::new();
            for _ in 0..5 * period {
                let next = counts.next(stream.clone());
                assert!(counts.lacks(&next));
                counts.add(&next);
                assert!(!counts.lacks(&next));
                turns.push(next);
            }
            for window in turns.windows(period) {
                for (combination, share) in shares.iter().enumerate() {
                    let found = window.iter().filter(|turn| turn.combination == combination).count() as f64;
                    assert!((found - share * period as f64).abs() < 1e-6, "{groups:?}: {window:?}");
                }
                // The members of each group have their own shares as well.
                for (g, group) in stream.groups.iter().enumerate() {
                    let total: f64 = group.shares.iter().sum();
                    for (member, share) in group.shares.iter().enumerate() {
                        let found = window.iter().filter(|turn| turn.members()[g] == member).count() as f64;
                        assert!((found - share / total * period as f64).abs() < 1e-6, "{groups:?}: {window:?}");
                    }
                }
            }
            // Another tenant's pictures are another stream.
            let other = counts.next(Stream { tenant: Some("u".into()), ..stream.clone() });
            assert_eq!(other.count, 1);
        }
    }
}
