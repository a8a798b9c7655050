//! Captions: COCO's annotations, tables, and lines.

use crate::{Error, Result};
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// A caption.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Caption {
    /// The words.
    pub text: String,
    /// File name of the picture that it describes, with or without the extension.
    pub image: Option<String>,
    /// Seed to make a picture of it from.
    pub seed: Option<u64>,
}

/// Names of the columns of a table.
const TEXT: [&str; 3] = ["caption", "prompt", "text"];
const IMAGE: [&str; 3] = ["file_name", "image", "name"];
const SEED: [&str; 2] = ["seed", "evaluation_seed"];

/// Reads captions from one of these files:
///
/// * `.json`: COCO's annotations, such as `captions_val2014.json`. Each image gets the caption with the smallest id;
///   images are in the order of their ids.
/// * a table with tabs: a first line names the columns `caption` (or `prompt`, `text`) and, if there are any,
///   `file_name` (or `image`, `name`) and `seed` (or `evaluation_seed`); others are not read. Without such a line, the
///   columns are a file name and a caption.
/// * lines of captions.
///
/// # Errors
/// [`crate::ErrorKind::Damaged`] with the number of a line that does not fit, [`crate::ErrorKind::Io`].
pub fn read(path: &Path) -> Result<Vec<Caption>> {
    let text = std::fs::read_to_string(path).map_err(|problem| match problem.kind() {
        std::io::ErrorKind::InvalidData => Error::damaged(path, "not UTF-8 text"),
        _ => Error::io("read", path)(problem),
    })?;
    let captions = match path.extension().is_some_and(|extension| extension == "json") {
        true => coco(&text, path)?,
        false => table(text.strip_prefix('\u{feff}').unwrap_or(&text), path)?,
    };
    match captions.is_empty() {
        true => Err(Error::damaged(path, "holds no captions").advise("write one per line")),
        false => Ok(captions),
    }
}

fn table(text: &str, path: &Path) -> Result<Vec<Caption>> {
    let mut lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).peekable();
    let cells = |line: &str| line.split('\t').map(|cell| cell.trim().to_string()).collect::<Vec<_>>();
    let Some(first) = lines.peek().map(|(_, line)| cells(line)) else { return Ok(Vec::new()) };
    let find = |names: &[&str]| first.iter().position(|cell| names.contains(&cell.to_lowercase().as_str()));
    let (caption, image, seed) = match (find(&TEXT), first.len()) {
        (_, 1) => (0, None, None),
        (Some(caption), _) => {
            lines.next();
            (caption, find(&IMAGE), find(&SEED))
        }
        (None, 2) => (1, Some(0), None),
        (None, columns) => {
            return Err(Error::damaged(path, format!("has {columns} columns, and no line that names them"))
                .advise("write a first line such as file_name, caption and seed, with tabs between"));
        }
    };
    let row = |(i, line): (usize, &str)| {
        let bad = |problem: String| Error::damaged(path, format!("line {}: {problem}", i + 1));
        let row = cells(line);
        if row.len() != first.len() {
            return Err(bad(format!("{} columns, where the first line has {}", row.len(), first.len())));
        }
        if row[caption].is_empty() {
            return Err(bad("an empty caption".into()));
        }
        let parse = |at: usize| row[at].parse::<u64>().map_err(|_| bad(format!("`{}` is not a seed", row[at])));
        Ok(Caption {
            text: row[caption].clone(),
            image: image.map(|at| row[at].clone()),
            seed: seed.map(parse).transpose()?,
        })
    };
    lines.map(row).collect()
}

/// The parts of COCO's annotations that are read.
#[derive(Deserialize)]
struct Coco {
    images: Vec<CocoImage>,
    annotations: Vec<CocoCaption>,
}

#[derive(Deserialize)]
struct CocoImage {
    id: u64,
    file_name: String,
}

#[derive(Deserialize)]
struct CocoCaption {
    id: u64,
    image_id: u64,
    caption: String,
}

fn coco(text: &str, path: &Path) -> Result<Vec<Caption>> {
    let parsed: Coco = crate::json::parse(text, path)
        .map_err(|error| error.advise("give COCO's annotations, with images and annotations, or a table with tabs"))?;
    let mut first: BTreeMap<u64, &CocoCaption> = BTreeMap::new();
    for caption in &parsed.annotations {
        if caption.caption.trim().is_empty() {
            return Err(Error::damaged(path, format!("the caption with id {} is empty", caption.id)));
        }
        let known = first.entry(caption.image_id).or_insert(caption);
        if caption.id < known.id {
            *known = caption;
        }
    }
    let names: HashMap<u64, &String> = parsed.images.iter().map(|image| (image.id, &image.file_name)).collect();
    let caption = |(image, caption): (u64, &CocoCaption)| {
        let Some(name) = names.get(&image) else {
            let problem = format!("the caption with id {} is of image {image}, which is not listed", caption.id);
            return Err(Error::damaged(path, problem));
        };
        Ok(Caption { text: caption.caption.trim().into(), image: Some((*name).clone()), seed: None })
    };
    first.into_iter().map(caption).collect()
}

/// The caption of each of these pictures: by their file names if the captions have them, else in their order.
///
/// # Errors
/// [`crate::ErrorKind::Mismatch`] if a picture has no caption, or there is another number of captions than pictures.
pub fn assign(captions: &[Caption], pictures: &[impl AsRef<Path>], path: &Path) -> Result<Vec<String>> {
    if captions.iter().any(|caption| caption.image.is_none()) {
        if captions.len() != pictures.len() {
            let problem = format!("holds {} captions for {} pictures", captions.len(), pictures.len());
            return Err(Error::mismatch(path, problem)
                .advise("give a line for each picture in the order of names, or a table of file names and captions"));
        }
        return Ok(captions.iter().map(|caption| caption.text.clone()).collect());
    }
    let mut named: HashMap<&str, &str> = HashMap::new();
    for caption in captions {
        let name = Path::new(caption.image.as_deref().unwrap_or_default());
        for key in [name.file_name(), name.file_stem()].into_iter().flatten().filter_map(|key| key.to_str()) {
            named.entry(key).or_insert(&caption.text);
        }
    }
    // A picture that was made for COCO's `x.jpg` may be called `x.png`.
    let of = |picture: &Path| {
        let keys = [picture.file_name(), picture.file_stem()].into_iter().flatten();
        let found = keys.filter_map(|key| key.to_str()).find_map(|key| named.get(key));
        found.map(|text| (*text).to_string()).ok_or_else(|| {
            Error::mismatch(path, format!("has no caption for the picture {}", picture.display()))
                .advise("name every picture, or remove the others from the folder")
        })
    };
    pictures.iter().map(|picture| of(picture.as_ref())).collect()
}
