//! The choice of concepts in words: `NAME` or `NAME:WEIGHT` for one that every picture gets, `A,B` or `A,B=0.6,0.4` for
//! a group of which each picture gets one. Flags and requests to the server have this grammar in common.

use super::Until;
use crate::concept::{Concept, Group, Strength, assign};
use crate::image::UsedConcept;
use crate::{Error, Result};
use std::sync::Arc;

/// A place where concepts are found by their names.
pub(in super::super) trait Shelf {
    /// True if the place has something of this name, damaged or not.
    fn has(&self, name: &str) -> bool;

    /// The concept of this name.
    ///
    /// # Errors
    /// If there is none, or if its file cannot be read.
    fn find(&self, name: &str) -> Result<Arc<Concept>>;
}

/// A concept that an image gets.
#[derive(Clone)]
pub(in super::super) struct Used {
    pub(in super::super) concept: Arc<Concept>,
    pub(in super::super) strength: Strength,
    /// Its file as the user named it, or its name if it is one of the demo's concepts or of a server.
    pub(in super::super) file: String,
}

impl Used {
    /// The record in a picture's file.
    pub(in super::super) fn record(&self) -> UsedConcept {
        UsedConcept {
            name: self.concept.metadata.concept.clone(),
            weight: self.strength.weight,
            until: Some(self.strength.until).filter(|&until| until != 0.0),
            fingerprint: self.concept.fingerprint(),
            file: self.file.clone(),
        }
    }
}

/// The concepts of each image.
pub(in super::super) type Assignment = Vec<Vec<Used>>;

/// A group, and the names of its members.
pub(in super::super) type NamedGroup = (Group, Vec<String>);

/// The concepts of `NAME` and `NAME:WEIGHT`, for pictures at a guidance scale.
pub(in super::super) fn used(texts: &[String], until: &Until, guidance: f32, shelf: &impl Shelf) -> Result<Vec<Used>> {
    let read = |text: &String| {
        let (name, weight) = name_and_weight(text, |name| shelf.has(name))?;
        let concept = shelf.find(name)?;
        let strength = until.strength(&concept, weight, guidance);
        Ok(Used { concept, strength, file: name.to_string() })
    };
    texts.iter().map(read).collect()
}

/// The group of `A,B` or `A,B=0.6,0.4`.
pub(in super::super) fn group(text: &str, shelf: &impl Shelf) -> Result<NamedGroup> {
    let shares = match text.rsplit_once('=') {
        Some((_, shares)) => {
            let parse = |s: &str| {
                s.trim().parse::<f64>().map_err(|_| Error::invalid("balance", format!("{text}: `{s}` is not a share")))
            };
            Some(shares.split(',').map(parse).collect::<Result<Vec<f64>>>()?)
        }
        None => None,
    };
    let names = members(text);
    if names.iter().any(String::is_empty) {
        return Err(Error::invalid("balance", format!("`{text}` names no concept between two commas"))
            .advise("write A,B or A,B=0.6,0.4"));
    }
    let concepts = names.iter().map(|name| shelf.find(name)).collect::<Result<_>>()?;
    Ok((Group::new(concepts, shares).map_err(|error| error.of_field("balance"))?, names))
}

/// The names of `A,B` or `A,B=0.6,0.4`.
pub(in super::super) fn members(text: &str) -> Vec<String> {
    let names = text.rsplit_once('=').map_or(text, |(names, _)| names);
    names.split(',').map(|name| name.trim().to_string()).collect()
}

/// Parses `NAME` or `NAME:WEIGHT`. If the whole text is a name, it is that name.
pub(super) fn name_and_weight(text: &str, is_name: impl Fn(&str) -> bool) -> Result<(&str, Option<f32>)> {
    match text.rsplit_once(':').filter(|_| !is_name(text)) {
        None => Ok((text, None)),
        Some((name, weight)) => match weight.parse::<f32>() {
            Ok(weight) if weight.is_finite() => Ok((name, Some(weight))),
            _ => Err(Error::invalid("concepts", format!("{text}: `{weight}` is not a finite weight"))
                .advise("write a number after the colon, such as 0.8")),
        },
    }
}

/// What each of `images` images gets: `all`, and one member of each group, by exact quotas or at random.
pub(in super::super) fn shared_out(
    all: &[Used],
    groups: &[NamedGroup],
    (images, seed, random): (usize, u64, bool),
    strength: impl Fn(&Concept) -> Strength,
) -> Assignment {
    let plain: Vec<Group> = groups.iter().map(|(group, _)| group.clone()).collect();
    let image = |row: &Vec<usize>| {
        let of_groups = row.iter().zip(groups).map(|(&member, (group, names))| Used {
            concept: group.members[member].clone(),
            strength: strength(&group.members[member]),
            file: names[member].clone(),
        });
        all.iter().cloned().chain(of_groups).collect()
    };
    assign(&plain, images, seed, random).iter().map(image).collect()
}
