//! A module of an adapter: the tensors of which one layer's difference is computed.

use super::super::tensors::Tensors;
use super::delta::{Axis, Delta, Product, Term};
use super::network::Target;
use super::peft::Peft;
use crate::{Error, Result};
use std::collections::BTreeMap;

/// The largest rank. Those in use are below a thousand.
const MAX_RANK: usize = 8192;
/// The largest rank with a kernel in the middle, where a small file stands for large products.
const MAX_TUCKER_RANK: usize = 512;

/// The kinds of differences, by their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Lora,
    Loha,
    Lokr,
    Whole,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Lora => "LoRA",
            Kind::Loha => "LoHa",
            Kind::Lokr => "LoKr",
            Kind::Whole => "full differences",
        }
    }
}

/// The parts of a module by their names in [`super::keys`], each with the name of its tensor.
pub(super) struct Module {
    /// Its name as the file spells it.
    pub name: String,
    pub kind: Kind,
    parts: BTreeMap<&'static str, String>,
    /// The product of the shapes of its parts, as far as they fit each other: outputs, and numbers of a row. `None` if
    /// the module has only a difference for a bias.
    pub shape: Option<(usize, usize)>,
    /// The inner dimension of its products; `None` without products.
    pub rank: Option<usize>,
    /// Multiplies its difference.
    pub scale: f32,
}

impl Module {
    /// Checks that parts make a whole, and that their shapes fit each other.
    ///
    /// # Errors
    /// The problem with the module, worded to follow its name in a sentence.
    pub fn new(
        name: &str,
        parts: BTreeMap<&'static str, String>,
        tensors: &Tensors,
        peft: &Peft,
    ) -> Result<Self, Problem> {
        let has = |part: &str| parts.contains_key(part);
        let mut module = Module {
            name: name.into(),
            kind: match () {
                () if has("lora_up") || has("lora_down") => Kind::Lora,
                () if parts.keys().any(|part| part.starts_with("hada_")) => Kind::Loha,
                () if parts.keys().any(|part| part.starts_with("lokr_")) => Kind::Lokr,
                () => Kind::Whole,
            },
            parts,
            shape: None,
            rank: None,
            scale: 1.0,
        };
        module.check_parts()?;
        let shapes = Shapes { module: &module, tensors };
        let (outputs, width, rank) = match module.kind {
            Kind::Lora => shapes.product("lora_up", "lora_down", "lora_mid", false)?,
            Kind::Loha => {
                let first = shapes.product("hada_w1_a", "hada_w1_b", "hada_t1", true)?;
                let second = shapes.product("hada_w2_a", "hada_w2_b", "hada_t2", true)?;
                if (first.0, first.1) != (second.0, second.1) {
                    return Err(Problem::of("has two products of different shapes"));
                }
                first
            }
            Kind::Lokr => {
                let (rows, columns, first) = shapes.factor("lokr_w1", "lokr_w1_a", "lokr_w1_b", "")?;
                let (outputs, width, second) = shapes.factor("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")?;
                let sizes = (rows.checked_mul(outputs), columns.checked_mul(width));
                let (Some(outputs), Some(width)) = sizes else { return Err(Problem::of("is too large")) };
                (outputs, width, second.or(first))
            }
            Kind::Whole => match shapes.get("diff") {
                Some([outputs, rest @ ..]) => (*outputs, rest.iter().product(), None),
                Some([]) => return Err(Problem::of("is a single number")),
                None => return Ok(module),
            },
        };
        if rank.is_some_and(|rank| rank == 0 || rank > MAX_RANK) {
            return Err(Problem::of(format!("has rank {}, not 1 to {MAX_RANK}", rank.unwrap_or(0))));
        }
        (module.shape, module.rank) = (Some((outputs, width)), rank);
        if let Some(rank) = rank {
            module.scale = match module.parts.get("alpha") {
                Some(alpha) => tensors.scalar(alpha).map_err(Problem::File)? / rank as f32,
                None => peft.scale(name, rank),
            };
        }
        Ok(module)
    }

    fn check_parts(&self) -> Result<(), Problem> {
        let has = |part: &str| self.parts.contains_key(part);
        let tucker = has("hada_t1") || has("hada_t2");
        let needed: Vec<&str> = match self.kind {
            Kind::Lora => vec!["lora_up", "lora_down"],
            Kind::Loha if tucker => {
                vec!["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"]
            }
            Kind::Loha => vec!["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"],
            Kind::Lokr => {
                let first = if has("lokr_w1") { &["lokr_w1"][..] } else { &["lokr_w1_a", "lokr_w1_b"] };
                let second = if has("lokr_w2") { &["lokr_w2"][..] } else { &["lokr_w2_a", "lokr_w2_b"] };
                [first, second].concat()
            }
            Kind::Whole => vec![],
        };
        if let Some(missing) = needed.iter().find(|part| !has(part)) {
            return Err(Problem::of(format!("has no {missing}, only {}", self.listed())));
        }
        if self.kind == Kind::Whole && !has("diff") && !has("diff_b") {
            return Err(Problem::of(format!("has only {}", self.listed())));
        }
        let optional: &[&str] = match self.kind {
            Kind::Lora => &["lora_mid"],
            Kind::Loha => &[],
            Kind::Lokr if has("lokr_w2") => &[],
            Kind::Lokr => &["lokr_t2"],
            Kind::Whole => &["diff"],
        };
        let more = ["alpha", "dora_scale", "magnitude", "diff_b"];
        let known = |part: &&&str| needed.iter().chain(optional).chain(&more).any(|known| known == *part);
        match self.parts.keys().find(|part| !known(part)) {
            Some(other) => {
                Err(Problem::of(format!("has {other}, which does not go with the rest of {}", self.listed())))
            }
            None => Ok(()),
        }
    }

    fn listed(&self) -> String {
        self.parts.keys().copied().collect::<Vec<_>>().join(", ")
    }

    /// True if it changes its layer's weight, and not the bias alone.
    pub fn changes_weight(&self) -> bool {
        self.shape.is_some()
    }

    /// True if it changes its layer's bias.
    pub fn changes_bias(&self) -> bool {
        self.parts.contains_key("diff_b")
    }

    /// True with DoRA's norms.
    pub fn is_dora(&self) -> bool {
        self.parts.contains_key("dora_scale") || self.parts.contains_key("magnitude")
    }

    /// The difference of a weight of shape `target`, which has been compared with [`Module::shape`]. `base` reads the
    /// weight.
    ///
    /// # Errors
    /// Those of reading the tensors; [`crate::ErrorKind::Mismatch`] for norms that do not fit.
    pub fn term(
        &self,
        tensors: &Tensors,
        weight: f32,
        target: Target,
        base: impl FnOnce() -> Result<Vec<f32>>,
    ) -> Result<Term> {
        let read = |part: &str| self.read(tensors, part);
        let product = |up: &str, down: &str, mid: &str, tucker: bool| {
            let rank = self.dimension(tensors, down, 0);
            match self.parts.contains_key(mid) {
                false => Ok::<_, Error>(Product::new(rank, read(up)?, read(down)?)),
                true => {
                    // `mid` is [first, second, taps], `down` is [second, inputs]: their product is [first, inputs,
                    // taps].
                    let (first, middle, down) = (self.dimension(tensors, mid, 0), read(mid)?, read(down)?);
                    let inputs = down.len() / rank;
                    let up = if tucker { transposed(&read(up)?, first) } else { read(up)? };
                    Ok(Product::new(first, up, contracted(&middle, &down, first, rank, inputs)))
                }
            }
        };
        let delta = match self.kind {
            Kind::Lora => Delta::Product(product("lora_up", "lora_down", "lora_mid", false)?),
            Kind::Loha => Delta::Hadamard(
                product("hada_w1_a", "hada_w1_b", "hada_t1", true)?,
                product("hada_w2_a", "hada_w2_b", "hada_t2", true)?,
            ),
            Kind::Lokr => {
                let factor = |whole: &str, up: &str, down: &str, mid: &str| match self.parts.contains_key(whole) {
                    true => Ok((read(whole)?, self.dimension(tensors, whole, 0))),
                    false => {
                        let rows = self.dimension(tensors, up, usize::from(self.parts.contains_key(mid)));
                        Ok::<_, Error>((product(up, down, mid, true)?.whole(), rows))
                    }
                };
                let (first, rows) = factor("lokr_w1", "lokr_w1_a", "lokr_w1_b", "")?;
                let (second, outputs) = factor("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")?;
                let (columns, width) = (first.len() / rows, second.len() / outputs);
                Delta::Kronecker { columns, first, second, outputs, width }
            }
            Kind::Whole => Delta::Whole(read("diff")?),
        };
        let term = Term::new(weight, self.scale, delta);
        let Some((part, tensor)) = self.parts.get_key_value("dora_scale").or(self.parts.get_key_value("magnitude"))
        else {
            return Ok(term);
        };
        let (norms, inputs) = (read(part)?, target.width / target.taps);
        // PEFT's norms are those of outputs. LyCORIS' may be either, and only their shape tells.
        let of_outputs = *part == "magnitude" || tensors.shape(tensor)?.first() == Some(&target.outputs);
        let (axis, count) = match of_outputs {
            true => (Axis::Output, target.outputs),
            false => (Axis::Input { taps: target.taps }, inputs),
        };
        if norms.len() != count {
            let problem = format!(
                "tensor `{tensor}` holds {} norms for a layer of {} outputs and {inputs} inputs",
                norms.len(),
                target.outputs
            );
            return Err(Error::mismatch(tensors.path(), problem));
        }
        Ok(term.normed(&base()?, target.width, axis, norms))
    }

    /// The difference of the bias of a layer of `outputs` outputs.
    ///
    /// # Errors
    /// Those of reading the tensor; [`crate::ErrorKind::Mismatch`] for another length.
    pub fn bias_term(&self, tensors: &Tensors, weight: f32, outputs: usize) -> Result<Term> {
        let numbers = self.read(tensors, "diff_b")?;
        if numbers.len() != outputs {
            let problem = format!("`{}` changes {} numbers of a bias that has {outputs}", self.name, numbers.len());
            return Err(Error::mismatch(tensors.path(), problem));
        }
        Ok(Term::new(weight, 1.0, Delta::Whole(numbers)))
    }

    fn read(&self, tensors: &Tensors, part: &str) -> Result<Vec<f32>> {
        let tensor = &self.parts[part];
        tensors.read(tensor, &[tensors.shape(tensor)?])
    }

    fn dimension(&self, tensors: &Tensors, part: &str, i: usize) -> usize {
        self.parts.get(part).and_then(|tensor| tensors.shape(tensor).ok()?.get(i).copied()).unwrap_or(1)
    }
}

/// The problem of a module.
pub(super) enum Problem {
    /// A problem of the module, as the second half of a sentence that its name begins.
    Module(String),
    /// A problem of the file.
    File(Error),
}

impl Problem {
    fn of(text: impl Into<String>) -> Self {
        Problem::Module(text.into())
    }
}

/// The shapes of a module's parts.
struct Shapes<'a> {
    module: &'a Module,
    tensors: &'a Tensors,
}

impl Shapes<'_> {
    fn get(&self, part: &str) -> Option<&[usize]> {
        self.tensors.shape(self.module.parts.get(part)?).ok()
    }

    /// The shape of a product: outputs, numbers of a row, and rank. Without `mid`, it is `[outputs, rank]` times
    /// `[rank, inputs * taps]`. With it, `mid` is `[first, second, taps]`, and the factors are `[outputs, first]` and
    /// `[second, inputs]`; where `tucker` is true, the first of these is transposed.
    fn product(&self, up: &str, down: &str, mid: &str, tucker: bool) -> Result<(usize, usize, Option<usize>), Problem> {
        let shape = |part: &str| self.get(part).unwrap_or_default();
        let count = |shape: &[usize]| shape.iter().product::<usize>();
        let (u, d) = (shape(up), shape(down));
        let fail = || {
            let shapes = [up, down, mid].into_iter().filter_map(|part| Some(format!("{part} {:?}", self.get(part)?)));
            Problem::of(format!("has parts that do not fit each other: {}", shapes.collect::<Vec<_>>().join(", ")))
        };
        let (&[rows, columns, ..], &[rank, ..]) = (u, d) else { return Err(fail()) };
        if count(u) != rows * columns {
            return Err(fail());
        }
        let Some(m) = self.get(mid) else {
            return if columns == rank { Ok((rows, count(&d[1..]), Some(rank))) } else { Err(fail()) };
        };
        let (outputs, inner) = if tucker { (columns, rows) } else { (rows, columns) };
        match *m {
            [first, ..] if first > MAX_TUCKER_RANK => {
                Err(Problem::of(format!("has a {mid} of rank {first}, which is more than {MAX_TUCKER_RANK}")))
            }
            [first, second, ref taps @ ..] if first == inner && second == rank => {
                Ok((outputs, count(&d[1..]) * count(taps), Some(rank)))
            }
            _ => Err(fail()),
        }
    }

    /// The shape of a factor of a Kronecker product, which is whole or a product.
    fn factor(&self, whole: &str, up: &str, down: &str, mid: &str) -> Result<(usize, usize, Option<usize>), Problem> {
        match self.get(whole) {
            Some([rows, rest @ ..]) if !rest.is_empty() => Ok((*rows, rest.iter().product(), None)),
            Some(_) => Err(Problem::of(format!("has a {whole} that is no matrix"))),
            None => self.product(up, down, mid, true),
        }
    }
}

/// `[rows, columns]` to `[columns, rows]`.
fn transposed(x: &[f32], rows: usize) -> Vec<f32> {
    let columns = x.len() / rows.max(1);
    (0..x.len()).map(|i| x[i % rows * columns + i / rows]).collect()
}

/// `[first, second, taps]` times `[second, inputs]`: `[first, inputs, taps]`.
fn contracted(middle: &[f32], down: &[f32], first: usize, second: usize, inputs: usize) -> Vec<f32> {
    let taps = middle.len() / (first * second);
    let mut out = vec![0.0f32; first * inputs * taps];
    for (i, out) in out.chunks_mut(inputs * taps).enumerate() {
        for k in 0..second {
            let middle = &middle[(i * second + k) * taps..][..taps];
            for (out, x) in out.chunks_mut(taps).zip(&down[k * inputs..]) {
                out.iter_mut().zip(middle).for_each(|(out, m)| *out += m * x);
            }
        }
    }
    out
}
