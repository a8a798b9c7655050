//! A network that runs as a whole, or in parts over strips of an image's rows, to take less memory.
//!
//! A part with attention runs as a whole: of the VAE that is the part of low resolution, which takes little memory. The
//! other part runs strip by strip, once for the moments of each of its group norms and once for its result. See
//! [`Graph::strip`].

use super::Executor;
use crate::graph::{Divisible, Graph, GraphBuilder, GroupNorm, Op, Shape, TensorId};
use crate::plan::Plan;
use crate::{Error, Result};
use std::ops::Range;

/// A network in parts. `T` is a [`Plan`] or an executor of one.
pub struct Parts<T> {
    parts: Vec<Part<T>>,
    output: &'static str,
    shape: Shape,
}

struct Part<T> {
    /// For a strip, or for the whole image.
    network: T,
    input: &'static str,
    output: &'static str,
    strips: Option<Strips>,
    /// The input of the whole image, if strips are cut from it and no part before holds it.
    source: Option<T>,
}

/// The division of an image into strips. Sizes are in units of rows.
#[derive(Clone)]
struct Strips {
    /// The whole image.
    image: usize,
    /// The results of a strip that are used.
    strip: usize,
    /// The strip with its halo.
    read: usize,
    halo: usize,
    /// Numbers of a unit of the input, and of the result.
    input: usize,
    result: usize,
    norms: Vec<Norm>,
}

/// A group norm in a part.
#[derive(Clone)]
struct Norm {
    groups: usize,
    /// Rows of a unit, and the numbers of a group in one row.
    rows: usize,
    row: usize,
}

/// A part of an executor's output, and its place in the result of the whole network.
pub struct Piece {
    /// The numbers in the executor's output.
    pub numbers: Range<usize>,
    /// The place of the first in the whole result.
    pub place: usize,
}

/// The name of activations between parts.
const BETWEEN: &str = "x";

impl Parts<Plan> {
    /// Plans a network for an image of `units` units, in strips of `strip` units if the image has more, by the function
    /// `plan`.
    pub fn new(
        network: &Divisible<impl Fn(usize) -> Graph>,
        units: usize,
        strip: usize,
        plan: impl Fn(Graph) -> Plan,
    ) -> Self {
        let Divisible { graph, cut, input, output } = network;
        let whole = graph(units);
        let shape = whole.shape(whole.output(output));
        let cut = cut.filter(|_| strip < units);
        let ranges = match cut {
            None => vec![(None, None)],
            cut => vec![(None, cut), (cut, None)],
        };
        let mut parts: Vec<Part<Plan>> = Vec::new();
        for (from, to) in ranges {
            let (input, output) = (from.map_or(*input, |_| BETWEEN), to.map_or(*output, |_| BETWEEN));
            let part = |graph: &Graph| {
                let result = to.unwrap_or_else(|| graph.output(output));
                graph.part(from.map(|from| (input, from)), (output, result), to.is_some())
            };
            let in_whole = part(&whole);
            if in_whole.nodes().iter().any(|node| matches!(node.op, Op::Attention(_))) || cut.is_none() {
                parts.push(Part { network: plan(in_whole), input, output, strips: None, source: None });
                continue;
            }
            let shape = in_whole.shape(in_whole.input(input));
            let halo = in_whole.halo(input, output).div_ceil(shape.h / units);
            let read = (strip + 2 * halo).min(units);
            let graph = part(&graph(read)).strip();
            let numbers = |id: TensorId| graph.shape(id).len() / read;
            let norm = |norm: &GroupNorm| {
                let Shape { h, w, .. } = graph.shape(norm.sources.x);
                let channels: usize = norm.sources.iter().map(|id| graph.shape(id).c).sum();
                Norm { groups: norm.groups, rows: h / read, row: w * channels / norm.groups }
            };
            let strips = Strips {
                image: units,
                strip,
                read,
                halo,
                input: numbers(graph.input(input)),
                result: numbers(graph.output(output)),
                norms: graph.group_norms().map(norm).collect(),
            };
            let held = parts.last().is_some_and(|before| before.strips.is_none());
            let source = (!held).then(|| plan(store(&whole, input, shape)));
            parts.push(Part { network: plan(graph), input, output, strips: Some(strips), source });
        }
        Parts { parts, output, shape }
    }

    /// Bytes of all arenas.
    pub fn arena_bytes(&self) -> usize {
        self.parts
            .iter()
            .flat_map(|part| [Some(&part.network), part.source.as_ref()])
            .flatten()
            .map(Plan::arena_bytes)
            .sum()
    }
}

/// A graph that holds an activation. Its weights are those of `network`, so that it runs with them.
fn store(network: &Graph, name: &str, shape: Shape) -> Graph {
    let mut g = GraphBuilder::new();
    let x = g.input(name, shape);
    g.output(name, x);
    let mut graph = g.finish();
    graph.weights = network.weights.clone();
    graph
}

impl<T> Parts<T> {
    /// Shape of the result.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The same with executors in place of plans.
    ///
    /// # Errors
    /// Those of `executor`.
    pub fn ready<E>(self, executor: impl Fn(T) -> Result<E>) -> Result<Parts<E>> {
        let part = |Part { network, input, output, strips, source }| {
            let (network, source) = (executor(network)?, source.map(&executor).transpose()?);
            Ok(Part { network, input, output, strips, source })
        };
        let parts = self.parts.into_iter().map(part).collect::<Result<_>>()?;
        Ok(Parts { parts, output: self.output, shape: self.shape })
    }

    /// The executor of whose inputs the network's own is one.
    pub fn input(&mut self) -> &mut T {
        let Part { source, network, .. } = &mut self.parts[0];
        source.as_mut().unwrap_or(network)
    }
}

impl<E: AsRef<dyn Executor> + AsMut<dyn Executor>> Parts<E> {
    /// Runs the network on what was written to its input. `take` is given the pieces of the result one after another,
    /// each with the executor that holds it in its output until it returns.
    ///
    /// # Errors
    /// As for [`Executor::step`], and those of `take`.
    pub fn run(&mut self, take: &mut dyn FnMut(&E, Piece) -> Result<()>) -> Result<()> {
        for i in 0..self.parts.len() {
            let (before, after) = self.parts.split_at_mut(i);
            let Some((part, after)) = after.split_first_mut() else { break };
            let output = part.output;
            let mut give = |network: &E, piece: Piece| match after.first_mut() {
                None => take(network, piece),
                Some(next) => {
                    let into = match &next.strips {
                        None => &mut next.network,
                        Some(_) => match &mut next.source {
                            Some(source) => source,
                            // Strips are cut from what this network holds.
                            None => return Ok(()),
                        },
                    };
                    into.as_mut().copy_part((next.input, piece.place), network.as_ref(), (output, piece.numbers))
                }
            };
            part.run(before.last(), &mut give)?;
        }
        Ok(())
    }
}

impl<E: AsRef<dyn Executor> + AsMut<dyn Executor>> Part<E> {
    fn run(&mut self, before: Option<&Part<E>>, give: &mut dyn FnMut(&E, Piece) -> Result<()>) -> Result<()> {
        let Part { network, input, output, strips, source } = self;
        let Some(strips) = strips else {
            network.as_mut().step()?;
            let graph = network.as_ref().plan().graph();
            let numbers = 0..graph.shape(graph.output(output)).len();
            return give(network, Piece { numbers, place: 0 });
        };
        let (source, name) = match (&source, before) {
            (Some(source), _) => (source.as_ref(), *input),
            (None, Some(before)) => (before.network.as_ref(), before.output),
            (None, None) => return Err(Error::internal("strips of nothing")),
        };
        for (number, norm) in strips.norms.iter().enumerate() {
            let (given, moments) = (format!("norm.{number}"), format!("moments.{number}"));
            let mut merged = vec![Moments::default(); norm.groups];
            for strip in strips.all() {
                let network = network.as_mut();
                network.copy_part((input, 0), source, (name, strip.read(strips.input)))?;
                network.step_to(&moments)?;
                let rows = strips.read * norm.rows;
                let own = (strip.own.start - strip.first) * norm.rows..(strip.own.end - strip.first) * norm.rows;
                let all = network.read(&moments)?;
                for (merged, group) in merged.iter_mut().zip(all.chunks_exact(2 * rows)) {
                    group.chunks_exact(2).take(own.end).skip(own.start).for_each(|row| merged.add(norm.row, row));
                }
            }
            // The sum of squares of as many numbers as a strip has.
            let numbers = (strips.read * norm.rows * norm.row) as f64;
            let values: Vec<f32> =
                merged.iter().flat_map(|m| [m.mean as f32, (m.squares / m.count * numbers) as f32]).collect();
            network.as_mut().write(&given, &values)?;
        }
        for strip in strips.all() {
            network.as_mut().copy_part((input, 0), source, (name, strip.read(strips.input)))?;
            network.as_mut().step()?;
            let numbers =
                strips.result * (strip.own.start - strip.first)..strips.result * (strip.own.end - strip.first);
            give(network, Piece { numbers, place: strips.result * strip.own.start })?;
        }
        Ok(())
    }
}

/// Units of a strip.
struct Strip {
    /// The first that is read, and the number of those.
    first: usize,
    units: usize,
    /// Those whose results are used.
    own: Range<usize>,
}

impl Strip {
    /// The numbers that are read, if a unit has so many.
    fn read(&self, unit: usize) -> Range<usize> {
        self.first * unit..(self.first + self.units) * unit
    }
}

impl Strips {
    /// All strips read equally many units, so that one plan serves them: those at the image's ends have more on the
    /// other side.
    fn all(&self) -> impl Iterator<Item = Strip> {
        let Strips { image, strip, read, halo, .. } = *self;
        (0..image).step_by(strip).map(move |start| Strip {
            first: start.saturating_sub(halo).min(image - read),
            units: read,
            own: start..(start + strip).min(image),
        })
    }
}

/// Moments of numbers, merged by the rule of Chan, Golub and LeVeque (1979).
#[derive(Clone, Default)]
struct Moments {
    count: f64,
    mean: f64,
    squares: f64,
}

impl Moments {
    /// Adds `count` numbers of a mean and a sum of squared deviations.
    fn add(&mut self, count: usize, of: &[f32]) {
        let (count, off) = (count as f64, f64::from(of[0]) - self.mean);
        let total = self.count + count;
        self.mean += off * count / total;
        self.squares += f64::from(of[1]) + off * off * self.count * count / total;
        self.count = total;
    }
}
