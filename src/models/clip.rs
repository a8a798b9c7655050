//! CLIP (Radford et al., arXiv 2103.00020): transformers with pre-norm blocks, causal over text and not causal over
//! images.

use super::{ClipConfig, ClipLayers, ClipVisionConfig};
use crate::graph::{ConvOptions, Graph, GraphBuilder, Shape, TensorId, View};

/// The name of a text encoder's table of added tokens: vectors of textual inversion (arXiv 2208.01618), which do not
/// belong to the checkpoint.
pub const ADDED_TOKENS: &str = "text_model.embeddings.added_token_embedding";

/// The text encoder for `batch` prompts.
///
/// Inputs: `input_ids` `[n, 1, tokens, 1]`, and with a projection `pooled_index` `[n, 1, 1, 1]`, the position of the
/// token that is projected ([`ClipConfig::pooled_index`]). Outputs: `last_hidden_state` `[n, 1, tokens, c]`;
/// `penultimate_hidden_state`, the input of the last layer; `states`, those of [`ClipConfig::states`]; and with a
/// projection `text_embeds` `[n, 1, 1, p]`.
pub fn text_encoder(config: &ClipConfig, batch: usize) -> Graph {
    let mut g = GraphBuilder::new();
    let ids = g.input("input_ids", Shape::new(batch, 1, config.tokens, 1));
    let mut tables = vec![("text_model.embeddings.token_embedding", config.vocab_size)];
    if config.added_tokens > 0 {
        tables.push((ADDED_TOKENS, config.added_tokens));
    }
    let mut x = g.embed(
        &tables,
        ("text_model.embeddings.position_embedding", config.max_position_embeddings),
        ids,
        config.layers.width,
    ); // [n, 1, tokens, c]
    let mut states = x;
    for i in 0..config.layers.count {
        if i + 1 == config.layers.count {
            g.output("penultimate_hidden_state", x);
        }
        x = config.layers.layer(&mut g, &format!("text_model.encoder.layers.{i}"), x, true);
        if i + 1 == config.states.layers {
            states = x;
        }
    }
    let (norm, eps, last) = ("text_model.final_layer_norm", config.layers.eps, x);
    let x; // [n, 1, tokens, c]
    if config.states.normed && states != last {
        [x, states] = g.layer_norms(norm, [last, states], eps);
    } else {
        x = g.layer_norm(norm, last, eps);
        states = if config.states.normed { x } else { states };
    }
    g.output("last_hidden_state", x);
    g.output("states", states);
    if let Some(width) = config.projection_dim {
        let index = g.input("pooled_index", Shape::new(batch, 1, 1, 1));
        let pooled = g.select_token("pooled", x, index); // [n, 1, 1, c]
        let options = ConvOptions { bias: false, ..ConvOptions::default() };
        let embeds = g.linear("text_projection", pooled, width, options); // [n, 1, 1, p]
        g.output("text_embeds", embeds);
    }
    g.finish()
}

/// CLIP's vision tower (a ViT, Dosovitskiy et al., arXiv 2010.11929) for `batch` images.
///
/// Input: `patches` `[n, 1, patches, 3 * p * p]`, each patch's numbers in the order channel, row, column. Output:
/// `image_embeds` `[n, 1, 1, projection_dim]`, not normalised.
pub fn vision_encoder(config: &ClipVisionConfig, batch: usize) -> Graph {
    let mut g = GraphBuilder::new();
    let side = config.image_size / config.patch_size;
    let width = config.layers.width;
    let patches = Shape::new(batch, 1, side * side, 3 * config.patch_size * config.patch_size);
    let patches = g.input("patches", patches);
    let options = ConvOptions { bias: false, ..ConvOptions::default() };
    let x = g.linear("vision_model.embeddings.patch_embedding", patches, width, options.clone()); // [n, 1, patches, c]
    let (class, positions) = ("vision_model.embeddings.class_embedding", "vision_model.embeddings.position_embedding");
    let mut x = g.class_token(class, positions, x); // [n, 1, 1 + patches, c]
    // The spelling is that of the checkpoints.
    x = g.layer_norm("vision_model.pre_layrnorm", x, config.layers.eps); // [n, 1, 1 + patches, c]
    for i in 0..config.layers.count {
        x = config.layers.layer(&mut g, &format!("vision_model.encoder.layers.{i}"), x, false);
    }
    // Nothing writes this input, so it keeps its initial zero: the position of the class token.
    let index = g.input("class_index", Shape::new(batch, 1, 1, 1));
    x = g.select_token("class", x, index); // [n, 1, 1, c]
    x = g.layer_norm("vision_model.post_layernorm", x, config.layers.eps); // [n, 1, 1, c]
    x = g.linear("visual_projection", x, config.projection_dim, options); // [n, 1, 1, p]
    g.output("image_embeds", x);
    g.finish()
}

impl ClipLayers {
    fn layer(&self, g: &mut GraphBuilder, name: &str, x: TensorId, causal: bool) -> TensorId {
        let (width, heads) = (self.width, self.heads);
        let layer = |suffix: &str| format!("{name}.{suffix}");
        let add = |residual| ConvOptions { residual: Some(residual), ..ConvOptions::default() };

        let y = g.layer_norm(&layer("layer_norm1"), x, self.eps); // [n, 1, tokens, c]
        let names = ["q_proj", "k_proj", "v_proj"].map(|p| layer(&format!("self_attn.{p}")));
        let options = ConvOptions::default();
        let qkv = g.fused(&layer("self_attn.qkv_proj"), &names, y, &[width; 3], options); // [n, 1, tokens, 3c]
        let view = |offset| View { tensor: qkv, offset };
        let views = (view(0), view(width), view(2 * width));
        let y = g.attention(&layer("self_attn"), views, heads, width / heads, causal); // [n, 1, tokens, c]
        let x = g.linear(&layer("self_attn.out_proj"), y, width, add(x)); // [n, 1, tokens, c]

        let y = g.layer_norm(&layer("layer_norm2"), x, self.eps); // [n, 1, tokens, c]
        let options = ConvOptions { activation: self.activation, ..ConvOptions::default() };
        let y = g.linear(&layer("mlp.fc1"), y, self.inner, options); // [n, 1, tokens, inner]
        g.linear(&layer("mlp.fc2"), y, width, add(x)) // [n, 1, tokens, c]
    }
}
