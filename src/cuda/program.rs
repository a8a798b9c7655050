//! Lowers a plan to lists of kernel launches.

use super::device::{Launch, Limits, TensorTiles};
use super::site::{Bindings, Site};
use super::{attention, attention_gradient, attention_hopper, conv, elementwise, epilogue, folded};
use super::{group_norm, layer_norm};
use crate::graph::{Graph, Node, Op};
use crate::plan::Plan;
use crate::{Error, Result, Subject};

/// The launches of a plan's phases.
pub(super) struct Program {
    pub prologue: Vec<Launch>,
    pub step: Vec<Launch>,
    /// The number of launches of a step up to each of its nodes.
    pub step_ends: Vec<usize>,
    /// Those of a step that reuses kept activations; empty if the graph keeps none.
    pub reusing: Vec<Launch>,
    pub backward: Vec<Launch>,
}

impl Program {
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] for an operation that has no kernel.
    pub fn new(plan: &Plan, bindings: &Bindings) -> Result<Self> {
        let lower = Self::lowering(plan, bindings);
        let each = |nodes: &mut dyn Iterator<Item = (&Node, (usize, usize))>| {
            nodes.map(|(node, workspace)| lower(node, workspace)).collect::<Result<Vec<Vec<Launch>>>>()
        };
        let all = |nodes: &mut dyn Iterator<Item = (&Node, (usize, usize))>| Ok::<_, Error>(each(nodes)?.concat());
        let step = each(&mut plan.step())?;
        let ends = step.iter().scan(0, |end, launches| {
            *end += launches.len();
            Some(*end)
        });
        Ok(Program {
            prologue: all(&mut plan.prologue())?,
            step_ends: ends.collect(),
            step: step.concat(),
            reusing: if plan.graph().keeps() { all(&mut plan.reusing_step())? } else { Vec::new() },
            backward: all(&mut plan.backward())?,
        })
    }

    /// A function that lowers a node, given its workspace, to launches.
    pub fn lowering(plan: &Plan, bindings: &Bindings) -> impl Fn(&Node, (usize, usize)) -> Result<Vec<Launch>> {
        move |node, workspace| {
            let mut launches = Vec::new();
            lower(node, &Site { limits: bindings.limits, bindings, plan, workspace }, &mut launches)?;
            Ok(launches)
        }
    }
}

/// A node's launches on a card.
pub struct Lowered {
    /// The node.
    pub node: Node,
    /// Its launches; their addresses mean nothing.
    pub launches: Vec<Launch>,
    /// True if it runs only after a constant input has changed.
    pub in_prologue: bool,
    /// On a card of 9.0, the reason why a convolution or an attention gets none of the kernels of 9.0, or why a layer
    /// norm gets no launch.
    pub reason: Option<&'static str>,
}

/// The launches of each node of a network, with these constant inputs, on a card of these limits. No card is needed:
/// addresses are 0, and tensor maps are empty.
///
/// # Errors
/// [`crate::ErrorKind::Unsupported`] for an operation that has no kernel.
pub fn lowered(graph: &Graph, constants: &[&str], limits: Limits) -> Result<Vec<Lowered>> {
    let plan = Plan::new(graph.clone(), constants, &limits);
    let weights = vec![0; graph.weights().len()];
    let tensor_map = |_: &TensorTiles| Ok([0; 16]);
    let bindings = Bindings { limits, weights: &weights, arena: 0, tensor_map: &tensor_map };
    let lower = Program::lowering(&plan, &bindings);
    let prologue = plan.prologue().count();
    let of_node = |(place, (node, workspace)): (usize, (&Node, (usize, usize)))| {
        let reason = match &node.op {
            Op::Conv(op) => conv::reason(graph, op, node.output, limits),
            Op::Attention(op) => attention_hopper::reason(op, |t| graph.shape(t), limits),
            Op::LayerNorm { .. } if folded::has_no_launch(graph, node.output, limits) => {
                Some("the products that read it normalise their sums")
            }
            _ => None,
        };
        let launches = lower(node, workspace)?;
        Ok(Lowered { node: node.clone(), launches, in_prologue: place < prologue, reason })
    };
    plan.all().enumerate().map(of_node).collect()
}

fn lower(node: &Node, site: &Site, launches: &mut Vec<Launch>) -> Result<()> {
    let out = node.output;
    match node.op {
        // The convolution that adds the result computes it as more depth.
        Op::Conv(_) if conv::is_added(site.graph(), out, site.limits) => {}
        Op::Conv(ref op) => launches.push(conv::conv(op, out, site)?),
        // The products that read the result compute it.
        Op::LayerNorm { .. } if folded::has_no_launch(site.graph(), out, site.limits) => {}
        // The kernel that writes the unshifted activation also writes the shifted one.
        Op::Shift { x, .. } if epilogue::makes(site.graph(), x) => {}
        Op::GroupNorm(ref norm) => group_norm::group_norm(norm, out, site, launches),
        Op::GroupNormMoments { ref of } => launches.push(group_norm::row_moments(of, out, site)),
        Op::LayerNorm { x, weight, bias, eps } => {
            launches.push(layer_norm::layer_norm(x, (weight, bias), eps, out, site));
        }
        Op::GroupNormGradient { ref of, d } => group_norm::group_norm_gradient(of, d, out, site, launches),
        Op::LayerNormGradient { x, weight, eps, d } => {
            launches.push(layer_norm::layer_norm_gradient(x, weight, eps, d, out, site));
        }
        Op::Embed { ids, tokens, positions } => {
            launches.push(elementwise::embed(ids, tokens, positions, out, site));
        }
        Op::ClassToken { x, class, positions } => {
            launches.push(elementwise::class_token(x, class, positions, out, site));
        }
        Op::SelectToken { x, index } => launches.push(elementwise::select_token(x, index, out, site)),
        Op::Sinusoid { x, dim, flip_sin_to_cos, freq_shift } => {
            launches.push(elementwise::sinusoid(x, dim, flip_sin_to_cos, freq_shift, out, site));
        }
        Op::Activate { x, activation } => launches.push(elementwise::activate(x, activation, out, site)),
        Op::ActivateGradient { x, activation, d } => {
            launches.push(elementwise::activate_gradient(x, activation, d, out, site));
        }
        Op::Add { a, b } => launches.push(elementwise::add(a, b, out, site)),
        Op::MeanOfHalves { x } => launches.push(elementwise::mean_of_halves(x, out, site)),
        Op::ResizeGradient { d } => launches.push(elementwise::resize_gradient(d, out, site)),
        Op::Attention(ref of) => launches.push(attention::attention(of, out, site)?),
        Op::AttentionGradient { ref of, fused, d } => {
            attention_gradient::attention_gradient(of, fused, d, out, site, launches)?;
        }
        _ => {
            return Err(Error::unsupported(Subject::Device, format!("{}: this operation has no kernel", node.name))
                .advise("choose the CPU"));
        }
    }
    Ok(())
}

/// Bytes of scratch memory that a node's kernels need.
pub(super) fn workspace(graph: &Graph, node: &Node, limits: Limits) -> usize {
    match node.op {
        Op::Conv(ref op) => conv::workspace(graph, op, node.output, limits),
        Op::GroupNorm(ref norm) if norm.moments.is_none() => group_norm::workspace(graph, norm),
        Op::AttentionGradient { ref of, fused, .. } => attention_gradient::workspace(graph, of, fused),
        Op::GroupNormGradient { ref of, .. } => 2 * group_norm::workspace(graph, of),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::super::compiled::{FAMILIES, RESOURCES, Resources};
    use super::super::tiles::tests::{networks, trainings};
    use super::*;
    #[cfg(feature = "emulated")]
    use std::collections::HashSet;

    /// Registers per multiprocessor, the same on every GPU since 8.0.
    const REGISTERS: u32 = 65536;

    /// Every node of every network, forward and gradient, has a kernel on every kind of card. That kernel was compiled,
    /// by nvcc or for the emulator, and a block of it fits into the card's shared memory and registers.
    #[test]
    fn every_network_runs_on_every_card() {
        // Without nvcc, only the kernels for the emulator exist.
        #[cfg(feature = "emulated")]
        let emulated: HashSet<_> =
            respodiff_emulated_kernels::kernels().into_iter().map(|kernel| kernel.name).collect();
        let compiled = |name| FAMILIES.is_empty() || FAMILIES.iter().any(|family| family.kernels.contains(&name));
        #[cfg(feature = "emulated")]
        let compiled = |name| compiled(name) && emulated.contains(name);
        let graphs: Vec<_> = networks().into_iter().map(|(name, graph, _)| (name, graph)).chain(trainings()).collect();
        for limits in Limits::CARDS {
            let registers = |kernel| {
                let of = |resources: &&Resources| {
                    let architecture = resources.architecture.trim_end_matches('a');
                    resources.kernel == kernel && architecture.parse() == Ok(limits.capability)
                };
                RESOURCES.iter().find(of).map_or(0, |resources| resources.registers)
            };
            for (name, graph) in &graphs {
                let nodes = lowered(graph, &[], limits);
                let nodes = nodes.unwrap_or_else(|problem| panic!("{name} on {limits:?}: {problem}"));
                for launch in nodes.iter().flat_map(|node| &node.launches) {
                    let Launch { kernel, block, shared, .. } = *launch;
                    assert!(compiled(kernel), "{name}: {kernel} was not compiled");
                    assert!(shared <= limits.shared, "{name} on {limits:?}: {kernel} wants {shared} bytes");
                    assert!(registers(kernel) * block <= REGISTERS, "{name}: {kernel} with {block} threads");
                }
            }
        }
    }
}
