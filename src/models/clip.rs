//! CLIP's text encoder (Radford et al., arXiv 2103.00020): a causal transformer with pre-norm blocks.

use super::ClipConfig;
use crate::graph::{ConvOptions, Graph, GraphBuilder, Shape, TensorId, View};

/// The text encoder for `batch` prompts.
///
/// Inputs: `input_ids` `[n, 1, tokens, 1]`, and where there is a projection `pooled_index` `[n, 1, 1, 1]`, which token
/// is projected ([`ClipConfig::pooled_index`]). Outputs: `last_hidden_state` `[n, 1, tokens, c]`;
/// `penultimate_hidden_state`, what the last layer reads; and where there is a projection `text_embeds` `[n, 1, 1, p]`.
pub fn text_encoder(config: &ClipConfig, batch: usize) -> Graph {
    let mut g = GraphBuilder::new();
    let tokens = config.max_position_embeddings;
    let ids = g.input("input_ids", Shape::new(batch, 1, tokens, 1));
    let mut x = g.embed(
        ("text_model.embeddings.token_embedding", config.vocab_size),
        ("text_model.embeddings.position_embedding", tokens),
        ids,
        config.hidden_size,
    ); // [n, 1, tokens, c]
    for i in 0..config.num_hidden_layers {
        if i + 1 == config.num_hidden_layers {
            g.output("penultimate_hidden_state", x);
        }
        x = layer(&mut g, config, &format!("text_model.encoder.layers.{i}"), x);
    }
    let x = g.layer_norm("text_model.final_layer_norm", x, config.layer_norm_eps); // [n, 1, tokens, c]
    g.output("last_hidden_state", x);
    if let Some(width) = config.projection_dim {
        let index = g.input("pooled_index", Shape::new(batch, 1, 1, 1));
        let pooled = g.select_token("pooled", x, index); // [n, 1, 1, c]
        let options = ConvOptions { bias: false, ..ConvOptions::default() };
        let embeds = g.linear("text_projection", pooled, width, options); // [n, 1, 1, p]
        g.output("text_embeds", embeds);
    }
    g.finish()
}

fn layer(g: &mut GraphBuilder, config: &ClipConfig, name: &str, x: TensorId) -> TensorId {
    let (width, heads) = (config.hidden_size, config.num_attention_heads);
    let layer = |suffix: &str| format!("{name}.{suffix}");
    let add = |residual| ConvOptions { residual: Some(residual), ..ConvOptions::default() };

    let y = g.layer_norm(&layer("layer_norm1"), x, config.layer_norm_eps); // [n, 1, tokens, c]
    let names = ["q_proj", "k_proj", "v_proj"].map(|p| layer(&format!("self_attn.{p}")));
    let qkv = g.fused(&layer("self_attn.qkv_proj"), &names, y, &[width; 3], ConvOptions::default()); // [n, 1, tokens, 3c]
    let view = |offset| View { tensor: qkv, offset };
    let views = (view(0), view(width), view(2 * width));
    let y = g.attention(&layer("self_attn"), views, heads, width / heads, true); // [n, 1, tokens, c]
    let x = g.linear(&layer("self_attn.out_proj"), y, width, add(x)); // [n, 1, tokens, c]

    let y = g.layer_norm(&layer("layer_norm2"), x, config.layer_norm_eps); // [n, 1, tokens, c]
    let options = ConvOptions { activation: config.hidden_act, ..ConvOptions::default() };
    let y = g.linear(&layer("mlp.fc1"), y, config.intermediate_size, options); // [n, 1, tokens, intermediate]
    g.linear(&layer("mlp.fc2"), y, width, add(x)) // [n, 1, tokens, c]
}
