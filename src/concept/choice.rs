//! The choice of concepts in words: `NAME` or `NAME:WEIGHT` for one that every picture gets, `A,B` or `A,B=0.6,0.4` for
//! a group of which each picture gets one. Flags and the fields of requests have this grammar in common.

use super::{Concept, Group, Strength, assign};
use crate::image::UsedConcept;
use crate::{Error, Result};
use std::path::Path;
use std::sync::Arc;

/// A place where concepts are found by their names.
pub trait Shelf {
    /// True if the place has something of this name, damaged or not.
    fn has(&self, name: &str) -> bool;

    /// The concept of this name.
    ///
    /// # Errors
    /// If there is none, or if its file cannot be read.
    fn find(&self, name: &str) -> Result<Arc<Concept>>;
}

/// Files, and the demo's concepts by their names.
pub struct Files;

impl Shelf for Files {
    fn has(&self, name: &str) -> bool {
        Path::new(name).exists()
    }

    fn find(&self, name: &str) -> Result<Arc<Concept>> {
        Concept::open(name).map(Arc::new)
    }
}

impl Concept {
    /// Reads a concept file, or the demo's concept of that name if there is no such file.
    ///
    /// # Errors
    /// Those of [`Concept::load`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        #[cfg(feature = "demo")]
        if !path.exists() {
            if let Some((_, bytes)) = respodiff_demo::CONCEPTS.iter().find(|(name, _)| path.as_os_str() == *name) {
                return Concept::parse(bytes, path);
            }
            if path.components().count() == 1 && path.extension().is_none() {
                let known: Vec<&str> = respodiff_demo::CONCEPTS.iter().map(|(name, _)| *name).collect();
                return Err(Error::not_found(path, "neither a concept file nor one of the demo's concepts")
                    .advise(format!("give a file, or one of {}", known.join(", "))));
            }
        }
        Concept::load(path)
    }
}

/// A concept that an image gets.
#[derive(Clone)]
pub(crate) struct Used {
    pub(crate) concept: Arc<Concept>,
    pub(crate) strength: Strength,
    /// Its file as the user named it, or its name if it is one of the demo's concepts or of a server.
    pub(crate) file: String,
}

impl Used {
    /// The record in a picture's file.
    pub(crate) fn record(&self) -> UsedConcept {
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
pub(crate) type Assignment = Vec<Vec<Used>>;

/// A group, and the names of its members.
pub(crate) type NamedGroup = (Group, Vec<String>);

/// The concepts of `NAME` and `NAME:WEIGHT`. `strength` is that of a concept with a weight or without.
pub(crate) fn used(
    texts: &[String],
    shelf: &dyn Shelf,
    strength: impl Fn(&Concept, Option<f32>) -> Strength,
) -> Result<Vec<Used>> {
    let read = |text: &String| {
        let (name, weight) = name_and_weight(text, |name| shelf.has(name))?;
        let concept = shelf.find(name)?;
        Ok(Used { strength: strength(&concept, weight), concept, file: name.to_string() })
    };
    texts.iter().map(read).collect()
}

/// The group of `A,B` or `A,B=0.6,0.4`.
pub(crate) fn group(text: &str, shelf: &dyn Shelf) -> Result<NamedGroup> {
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
    Ok((Group::new(concepts, shares)?, names))
}

/// The names of `A,B` or `A,B=0.6,0.4`.
pub(crate) fn members(text: &str) -> Vec<String> {
    let names = text.rsplit_once('=').map_or(text, |(names, _)| names);
    names.split(',').map(|name| name.trim().to_string()).collect()
}

/// Parses `NAME` or `NAME:WEIGHT`. If the whole text is a name, it is that name.
pub(crate) fn name_and_weight(text: &str, is_name: impl Fn(&str) -> bool) -> Result<(&str, Option<f32>)> {
    match text.rsplit_once(':').filter(|_| !is_name(text)) {
        None => Ok((text, None)),
        Some((name, weight)) => match weight.parse::<f32>() {
            Ok(weight) if weight.is_finite() => Ok((name, Some(weight))),
            _ => Err(Error::invalid("concepts", format!("{text}: `{weight}` is not a finite weight"))
                .advise("write a number after the colon, such as 0.8")),
        },
    }
}

/// The concepts of each of `images` images: `all`, and one member of each group, by exact quotas or at random.
pub(crate) fn shared_out(
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
