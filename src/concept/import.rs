//! Concepts from the checkpoints of other programs: RespoDiff's official code and SDisc.

use super::{Concept, Form, Kind, Metadata, Module};
use crate::graph::Shape;
use crate::layout::nchw_to_nhwc;
use crate::weights::pickle::{Tensor, tensors};
use crate::{Error, Result};
use std::path::Path;

/// Columns of the official checkpoint (VSSILPA/respodiff). The dictionary in the official code assigns column 3 to two
/// concepts.
const OFFICIAL: [(&str, usize); 9] = [
    ("a woman", 0),
    ("a man", 1),
    ("young", 2),
    ("old", 3),
    ("a white-race person", 3),
    ("a black-race person", 4),
    ("a asian-race person", 5),
    ("sexual", 6),
    ("violence", 7),
];
/// Columns of SDisc's matrix (Li et al., arXiv 2311.17216).
const SDISC: [(&str, usize); 8] = [
    ("female", 0),
    ("male", 1),
    ("young", 2),
    ("old", 3),
    ("whiterace", 4),
    ("blackrace", 5),
    ("asianrace", 6),
    ("antisexual", 7),
];

/// Reads one concept from a file, by its name or by its column, for a model whose bottleneck has `channels`.
///
/// Each column of a matrix `[c * r * r, concepts]` is a module `[c, r, r]`. The official checkpoint holds RAM in
/// `controlnet.fc1.weight` and SAM in `controlnet_residual.fc2.weight`. SDisc's checkpoint holds one matrix, which
/// becomes RAM.
///
/// # Errors
/// [`crate::ErrorKind::Invalid`] for a name or column that the file does not have, [`crate::ErrorKind::Mismatch`] for
/// another model's bottleneck, [`crate::ErrorKind::Unsupported`] for other tensors, and those of reading the file.
pub fn import(path: &Path, concept: &str, column: Option<usize>, channels: usize) -> Result<Concept> {
    let all = tensors(path)?;
    let named = |name: &str| all.iter().find(|t| t.name.ends_with(name));
    let matrices: Vec<&Tensor> = all.iter().filter(|t| t.shape.len() == 2).collect();
    let (ram, sam, known) = match (named("controlnet.fc1.weight"), &matrices[..]) {
        (Some(ram), _) => (ram, named("controlnet_residual.fc2.weight"), &OFFICIAL[..]),
        (None, &[only]) => (only, None, &SDISC[..]),
        _ => {
            let names: Vec<&str> = all.iter().map(|t| t.name.as_str()).take(8).collect();
            return Err(Error::unsupported(
                path,
                format!("neither the official checkpoint nor SDisc's matrix: its tensors are [{}]", names.join(", ")),
            ));
        }
    };
    let column = match column.or_else(|| known.iter().find(|(name, _)| *name == concept).map(|(_, c)| *c)) {
        Some(column) => column,
        None => {
            let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
            return Err(Error::invalid(
                "concept",
                format!("`{concept}` is none of the file's concepts [{}]", names.join(", ")),
            )
            .advise("give one of these, or the number of its column"));
        }
    };
    let module = |matrix: &Tensor| -> Result<Module> {
        let bad = |problem: String| Error::damaged(path, format!("tensor `{}` {problem}", matrix.name));
        let [rows, columns] = matrix.shape[..] else { return Err(bad(format!("has shape {:?}", matrix.shape))) };
        if column >= columns {
            let problem = format!("{column} is beyond the {columns} columns of tensor `{}`", matrix.name);
            return Err(Error::invalid("column", problem).advise(format!("give 0 to {}", columns.saturating_sub(1))));
        }
        let side = rows.checked_div(channels).unwrap_or(0).isqrt();
        if rows == 0 || side * side * channels != rows {
            let problem = format!("tensor `{}` has {rows} rows, which do not form [{channels}, r, r]", matrix.name);
            return Err(Error::mismatch(path, problem).advise("give the model that it was trained on"));
        }
        let values: Vec<f32> = matrix.values.iter().skip(column).step_by(columns).copied().collect();
        if let Some(value) = values.iter().find(|x| !x.is_finite()) {
            return Err(bad(format!("holds {value} in column {column}")));
        }
        let mut parameters = vec![0.0; rows];
        nchw_to_nhwc(&values, channels, side * side, &mut parameters);
        Module::with_parameters(Form::Constant, Shape::new(1, side, side, channels), parameters)
            .ok_or_else(|| bad("holds another number of values than its shape says".into()))
    };
    let kind = if ["sexual", "violence", "antisexual"].contains(&concept) { Kind::Safe } else { Kind::Fair };
    let metadata = Metadata { concept: concept.into(), kind, ..Default::default() };
    Ok(Concept { metadata, ram: module(ram)?, sam: sam.map(module).transpose()? })
}
