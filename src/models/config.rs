//! Model configurations: diffusers' and transformers' `config.json`.
//!
//! Absent fields take the default of the class of diffusers or transformers that reads them. A field that would change
//! the computation in a way that the graphs cannot express is refused by name.

use std::path::Path;

use serde_json::{Value, json};

use super::reader::Reader;
use crate::graph::Activation;
use crate::{Error, Result};

const MAX_CHANNELS: usize = 65_536;
const MAX_LEVELS: usize = 8;
const MAX_LAYERS: usize = 64;
/// Token ids are passed as f32, in which whole numbers are exact up to here.
const MAX_VOCABULARY: usize = 1 << 24;

/// Fields of a text configuration that its forward pass does not read.
const TEXT_NOTES: &[&str] = &[
    "add_cross_attention",
    "attention_dropout",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dropout",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tie_word_embeddings",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "use_bfloat16",
];

/// A CLIP text encoder: `CLIPTextModel` or `CLIPTextModelWithProjection`.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipConfig {
    /// Rows of the token embedding.
    pub vocab_size: usize,
    /// The transformer.
    pub layers: ClipLayers,
    /// Rows of the position embedding.
    pub max_position_embeddings: usize,
    /// Tokens of a prompt, padding included: as many as positions, unless the tokenizer makes fewer.
    pub tokens: usize,
    /// The token that ends a prompt.
    pub eos_token_id: i64,
    /// Channels of the projected pooled token, if the encoder has a projection.
    pub projection_dim: Option<usize>,
    /// Rows of a second table of tokens, `ADDED_TOKENS`, whose ids follow those of the vocabulary.
    pub added_tokens: usize,
    /// The hidden states that a UNet reads.
    pub states: ClipStates,
}

/// The hidden states of a text encoder that a UNet reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClipStates {
    /// The number of layers behind which they are taken.
    pub layers: usize,
    /// True if the final layer norm is applied to them.
    pub normed: bool,
}

/// The transformer of a text or vision encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipLayers {
    /// `hidden_size`: channels of a token.
    pub width: usize,
    /// `intermediate_size`: channels inside the feed-forward layers.
    pub inner: usize,
    /// `num_hidden_layers`.
    pub count: usize,
    /// `num_attention_heads`.
    pub heads: usize,
    /// `layer_norm_eps`: added to the variance in layer norms.
    pub eps: f32,
    /// `hidden_act`: [`Activation::Gelu`] or [`Activation::QuickGelu`].
    pub activation: Activation,
}

impl ClipLayers {
    /// Reads an encoder's fields; `width`, `inner` and `heads` are the class's defaults.
    fn read(r: &mut Reader, width: usize, inner: usize, heads: usize) -> Result<Self> {
        let activations = [("quick_gelu".into(), Activation::QuickGelu), ("gelu".into(), Activation::Gelu)];
        let layers = ClipLayers {
            width: r.size("hidden_size", width, MAX_CHANNELS)?,
            inner: r.size("intermediate_size", inner, MAX_CHANNELS)?,
            count: r.size("num_hidden_layers", 12, MAX_LAYERS)?,
            heads: r.size("num_attention_heads", heads, MAX_CHANNELS)?,
            eps: r.positive("layer_norm_eps", 1e-5)?,
            activation: r.choice("hidden_act", "quick_gelu".into(), &activations)?,
        };
        let ClipLayers { width, heads, .. } = layers;
        if width % heads != 0 {
            return Err(r.error(format!("`hidden_size` {width} is not a multiple of `num_attention_heads` {heads}")));
        }
        Ok(layers)
    }
}

impl ClipConfig {
    /// Reads a text encoder's `config.json`; `path` is for messages.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] for a field that is missing, malformed or not supported.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let mut r = Reader::new(text, path)?;
        let classes = [("CLIPTextModel", false), ("CLIPTextModelWithProjection", true)];
        let classes = classes.map(|(name, projected)| (json!([name]), projected));
        let projected = r.choice("architectures", classes[0].0.clone(), &classes)?;
        r.only("model_type", &["clip_text_model".into()])?;
        let projection_dim = r.size("projection_dim", 512, MAX_CHANNELS)?;
        let positions = r.size("max_position_embeddings", 77, MAX_CHANNELS)?;
        let layers = ClipLayers::read(&mut r, 512, 2048, 8)?;
        let config = ClipConfig {
            vocab_size: r.size("vocab_size", 49_408, MAX_VOCABULARY)?,
            max_position_embeddings: positions,
            tokens: positions,
            eos_token_id: r.id("eos_token_id", 49_407)?,
            projection_dim: projected.then_some(projection_dim),
            added_tokens: 0,
            states: ClipStates { layers: layers.count, normed: true },
            layers,
        };
        r.ignore(TEXT_NOTES);
        r.finish()?;
        Ok(config)
    }

    /// The configuration with the hidden states of a clip skip as A1111 counts it: at 1 no layer is left out. SDXL's
    /// UNet reads the states before the last layer, without the final norm, and with a clip skip those of as many
    /// layers before, as in diffusers, which counts from 0. Other UNets read normed states.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for 0, and for more layers than there are.
    pub fn with_clip_skip(self, clip_skip: usize, sdxl: bool) -> Result<Self> {
        let most = self.layers.count - usize::from(sdxl);
        if clip_skip == 0 || clip_skip > most.max(1) {
            let problem = format!("{clip_skip} is not possible: the text encoder has {} layers", self.layers.count);
            return Err(Error::invalid("clip_skip", problem).advise(format!("give 1, which skips none, to {most}")));
        }
        let layers = most + 1 - clip_skip;
        Ok(ClipConfig { states: ClipStates { layers, normed: !sdxl }, ..self })
    }

    /// The position of the token that is projected: the first end of text, or, if the configuration carries the
    /// historic id 2 for it, the token with the largest id of the vocabulary.
    pub fn pooled_index(&self, ids: &[i64]) -> usize {
        let vocabulary = ids.iter().copied().filter(|&id| id < self.vocab_size as i64);
        let pooled = if self.eos_token_id == 2 { vocabulary.max() } else { Some(self.eos_token_id) };
        ids.iter().position(|&id| Some(id) == pooled).unwrap_or(0)
    }
}

/// CLIP's vision encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipVisionConfig {
    /// Rows and columns of a picture.
    pub image_size: usize,
    /// Rows and columns of a patch.
    pub patch_size: usize,
    /// The transformer.
    pub layers: ClipLayers,
    /// Channels of the projected class token.
    pub projection_dim: usize,
}

/// Reads a `CLIPModel`'s `config.json`, which configures both encoders.
///
/// # Errors
/// [`crate::ErrorKind::Damaged`] for a field that is missing, malformed or not supported.
pub fn parse_clip_model(text: &str, path: &Path) -> Result<(ClipConfig, ClipVisionConfig)> {
    let mut all: Value = crate::json::parse(text, path)?;
    if all["vision_config"].is_null() || all["text_config"].is_null() {
        return Err(crate::Error::damaged(path, "not a CLIPModel: it must have `text_config` and `vision_config`"));
    }
    let projection = if all["projection_dim"].is_null() { json!(512) } else { all["projection_dim"].clone() };
    for (tower, class) in [("text_config", json!(["CLIPTextModelWithProjection"])), ("vision_config", Value::Null)] {
        all[tower]["architectures"] = class;
        all[tower]["projection_dim"] = projection.clone();
    }
    let text_config = ClipConfig::parse(&all["text_config"].to_string(), path)?;
    let vision = all["vision_config"].to_string();
    let mut r = Reader::new(&vision, path)?;
    r.only("model_type", &["clip_vision_model".into()])?;
    r.only("num_channels", &[3.into()])?;
    let config = ClipVisionConfig {
        image_size: r.size("image_size", 224, MAX_CHANNELS)?,
        patch_size: r.size("patch_size", 32, 1024)?,
        layers: ClipLayers::read(&mut r, 768, 3072, 12)?,
        projection_dim: r.size("projection_dim", 512, MAX_CHANNELS)?,
    };
    if !config.image_size.is_multiple_of(config.patch_size) {
        return Err(r.error(format!(
            "`image_size` {} is not a multiple of `patch_size` {}",
            config.image_size, config.patch_size
        )));
    }
    r.ignore(TEXT_NOTES);
    r.finish()?;
    Ok((text_config, config))
}

/// One resolution of a UNet.
#[derive(Clone, Debug, PartialEq)]
pub struct UNetLevel {
    /// `block_out_channels`.
    pub channels: usize,
    /// `layers_per_block`: resnets of the down half; the up half has one more.
    pub layers: usize,
    /// Blocks of the transformer after each resnet of the down half; empty if there are no transformers.
    pub down: Vec<usize>,
    /// The same for the up half.
    pub up: Vec<usize>,
    /// Attention heads.
    pub heads: usize,
    /// True if the first attention of a block reads the prompt instead of the image.
    pub only_cross_attention: bool,
}

/// The block between a UNet's halves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MidBlock {
    /// There is none, as in BK-SDM.
    None,
    /// One resnet, as in SSD-1B.
    Resnet,
    /// Two resnets, and between them a transformer of so many blocks.
    Attention(usize),
}

/// SDXL's `addition_embed_type: text_time`: a pooled prompt and six numbers about the picture's size.
#[derive(Clone, Debug, PartialEq)]
pub struct TextTime {
    /// Channels of the pooled prompt.
    pub text_embed_dim: usize,
    /// Channels that each number is embedded into.
    pub time_embed_dim: usize,
}

/// `UNet2DConditionModel` as Stable Diffusion 1.x, 2.x and SDXL use it.
#[derive(Clone, Debug, PartialEq)]
pub struct UNetConfig {
    /// Rows and columns of the latents it was trained on, if the configuration gives them.
    pub sample_size: Option<(usize, usize)>,
    /// Channels that it reads: those of the latents, and in an inpainting model those of [`super::MASK_AND_IMAGE`].
    pub in_channels: usize,
    /// Channels of the latents and of the prediction.
    pub out_channels: usize,
    /// From the finest to the coarsest.
    pub levels: Vec<UNetLevel>,
    /// The block between the halves.
    pub mid: MidBlock,
    /// Channels of a prompt's token.
    pub cross_attention_dim: usize,
    /// Groups of the group norms.
    pub norm_num_groups: usize,
    /// Added to the variance in the resnets' norms.
    pub norm_eps: f32,
    /// True if the cosines come before the sines in the timestep's embedding.
    pub flip_sin_to_cos: bool,
    /// Subtracted from the number of frequencies; 0 or 1.
    pub freq_shift: f32,
    /// Channels of the projected timestep.
    pub time_embedding_dim: usize,
    /// Channels of the guidance scale's embedding, if the UNet reads one in place of being guided (Meng et al., arXiv
    /// 2210.03142; Luo et al., arXiv 2310.04378).
    pub time_cond_proj_dim: Option<usize>,
    /// Divides the output of the mid block's resnets.
    pub mid_block_scale_factor: f32,
    /// True if the timestep scales and shifts inside a resnet (`resnet_time_scale_shift`), false if it is only added.
    pub time_scale_shift: bool,
    /// SDXL's size conditioning.
    pub text_time: Option<TextTime>,
}

impl UNetConfig {
    /// Reads a UNet's `config.json`; `path` is for messages.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] for a field that is missing, malformed or not supported.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let mut r = Reader::new(text, path)?;
        r.only("_class_name", &["UNet2DConditionModel".into()])?;
        for key in [
            "class_embed_type",
            "cross_attention_norm",
            "encoder_hid_dim",
            "encoder_hid_dim_type",
            "num_class_embeds",
            "time_embedding_act_fn",
            "timestep_post_act",
        ] {
            r.only(key, &[Value::Null])?;
        }
        for key in ["center_input_sample", "class_embeddings_concat", "dual_cross_attention"] {
            r.only(key, &[false.into()])?;
        }
        r.only("act_fn", &["silu".into(), "swish".into()])?;
        r.only("attention_type", &["default".into()])?;
        r.only("conv_in_kernel", &[3.into()])?;
        r.only("conv_out_kernel", &[3.into()])?;
        r.only("downsample_padding", &[1.into()])?;
        r.only("time_embedding_type", &["positional".into()])?;
        r.ignore(&[
            "addition_embed_type_num_heads",
            "dropout",
            // Notes of diffusers' `EMAModel`, whose averages the file holds.
            "decay",
            "inv_gamma",
            "min_decay",
            "optimization_step",
            "power",
            "update_after_step",
            "use_ema_warmup",
            // Read by other kinds of blocks only.
            "mid_block_only_cross_attention",
            "resnet_out_scale_factor",
            "resnet_skip_time_act",
            // Everything is computed in f32, or accumulated in it.
            "upcast_attention",
            // The matrix is the same in both cases.
            "use_linear_projection",
        ]);

        let norm_num_groups = r.size("norm_num_groups", 32, MAX_CHANNELS)?;
        let (levels, mid, cross_attention_dim) = levels(&mut r, norm_num_groups)?;
        let text_time = text_time(&mut r)?;
        let first = levels[0].channels;
        let config = UNetConfig {
            sample_size: sample_size(&mut r)?,
            in_channels: r.size("in_channels", 4, MAX_CHANNELS)?,
            out_channels: r.size("out_channels", 4, MAX_CHANNELS)?,
            cross_attention_dim,
            norm_num_groups,
            norm_eps: r.positive("norm_eps", 1e-5)?,
            flip_sin_to_cos: r.flag("flip_sin_to_cos", true)?,
            freq_shift: r.choice("freq_shift", 0.into(), &[(0.into(), 0.0), (1.into(), 1.0)])?,
            time_embedding_dim: match r.has("time_embedding_dim") {
                true => r.size("time_embedding_dim", 0, MAX_CHANNELS)?,
                false => 4 * first,
            },
            mid_block_scale_factor: r.positive("mid_block_scale_factor", 1.0)?,
            time_scale_shift: r.choice(
                "resnet_time_scale_shift",
                "default".into(),
                &[("default".into(), false), ("scale_shift".into(), true)],
            )?,
            time_cond_proj_dim: match r.has("time_cond_proj_dim") {
                true => Some(r.size("time_cond_proj_dim", 0, MAX_CHANNELS)?),
                false => None,
            },
            text_time,
            levels,
            mid,
        };
        if config.in_channels < config.out_channels {
            let UNetConfig { in_channels, out_channels, .. } = config;
            return Err(r.error(format!("`in_channels` {in_channels} is less than `out_channels` {out_channels}")));
        }
        if first % 2 != 0 || first < 4 {
            return Err(r.error(format!("`block_out_channels` begins with {first}; supported: an even number from 4")));
        }
        if let Some(width) = config.time_cond_proj_dim
            && (width % 2 != 0 || width < 4)
        {
            return Err(r.error(format!("`time_cond_proj_dim` is {width}; supported: an even number from 4")));
        }
        r.finish()?;
        Ok(config)
    }

    /// True if it reads a mask and the latents of the masked picture beside the latents, as inpainting models do.
    pub fn reads_masks(&self) -> bool {
        self.in_channels == 2 * self.out_channels + 1
    }
}

/// The settings that are given for each level, the middle block, and the width of the prompt's tokens.
fn levels(r: &mut Reader, groups: usize) -> Result<(Vec<UNetLevel>, MidBlock, usize)> {
    let channels = r.list("block_out_channels", &[320, 640, 1280, 1280], MAX_LEVELS, MAX_CHANNELS)?;
    let count = channels.len();
    let layers = r.sizes("layers_per_block", 2, count, 16)?;
    let up_layers: Vec<usize> = layers.iter().rev().map(|resnets| resnets + 1).collect();
    let down_depths = r.depths("transformer_layers_per_block", &layers, MAX_LAYERS)?;
    let up_depths = match r.has("reverse_transformer_layers_per_block") {
        true => r.depths("reverse_transformer_layers_per_block", &up_layers, MAX_LAYERS)?,
        false if down_depths.iter().any(|depths| depths.iter().any(|&depth| depth != depths[0])) => {
            let problem = "`transformer_layers_per_block` differs within a block, so that the up half needs \
                           `reverse_transformer_layers_per_block`";
            return Err(r.error(problem));
        }
        false => down_depths.iter().rev().zip(&up_layers).map(|(depths, &resnets)| vec![depths[0]; resnets]).collect(),
    };
    // `attention_head_dim` has always held the number of heads; its name is a mistake too widespread to undo.
    let default_heads = r.sizes("attention_head_dim", 8, count, MAX_CHANNELS)?;
    let heads = match r.has("num_attention_heads") {
        true => r.sizes("num_attention_heads", 8, count, MAX_CHANNELS)?,
        false => default_heads,
    };
    let only_cross_attention = r.flags("only_cross_attention", false, count)?;
    let blocks = ["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"];
    let [cross_down, down, cross_up, up] = blocks.map(Value::from);
    let default = json!([cross_down, cross_down, cross_down, down]);
    let down_attention = r.names("down_block_types", default, count, &[(cross_down, true), (down, false)])?;
    let default = json!([up, cross_up, cross_up, cross_up]);
    let up_attention = r.names("up_block_types", default, count, &[(cross_up, true), (up, false)])?;
    let only = |depths: &[usize], attends: bool| if attends { depths.to_vec() } else { Vec::new() };
    let cross_mid = MidBlock::Attention(down_depths.last().map_or(1, |depths| depths[0]));
    let mids = [("UNetMidBlock2DCrossAttn".into(), cross_mid), ("UNetMidBlock2D".into(), MidBlock::Resnet)];
    let mids = [&mids[..], &[(Value::Null, MidBlock::None)]].concat();
    let mid = r.choice("mid_block_type", "UNetMidBlock2DCrossAttn".into(), &mids)?;

    let widths = r.sizes("cross_attention_dim", 1280, count, MAX_CHANNELS)?;
    if widths.iter().any(|w| *w != widths[0]) {
        return Err(r.error(format!("`cross_attention_dim` is {widths:?}; supported: the same at every level")));
    }
    let levels: Vec<_> = (0..count)
        .map(|i| UNetLevel {
            channels: channels[i],
            layers: layers[i],
            down: only(&down_depths[i], down_attention[i]),
            up: only(&up_depths[count - 1 - i], up_attention[count - 1 - i]),
            heads: heads[i],
            only_cross_attention: only_cross_attention[i],
        })
        .collect();
    check_groups(r, &channels, groups)?;
    for (i, level) in levels.iter().enumerate() {
        let in_middle = i + 1 == count && matches!(mid, MidBlock::Attention(_));
        let attends = !level.down.is_empty() || !level.up.is_empty() || in_middle;
        if attends && level.channels % level.heads != 0 {
            let UNetLevel { channels, heads, .. } = level;
            return Err(r.error(format!(
                "`block_out_channels` {channels} is not a multiple of `attention_head_dim` {heads}, its number of heads"
            )));
        }
    }
    Ok((levels, mid, widths[0]))
}

fn check_groups(r: &Reader, channels: &[usize], groups: usize) -> Result<()> {
    match channels.iter().find(|c| *c % groups != 0) {
        Some(c) => Err(r.error(format!("`block_out_channels` {c} is not a multiple of `norm_num_groups` {groups}"))),
        None => Ok(()),
    }
}

fn sample_size(r: &mut Reader) -> Result<Option<(usize, usize)>> {
    if !r.has("sample_size") {
        return Ok(None);
    }
    let size = r.sizes("sample_size", 0, 2, MAX_CHANNELS)?;
    Ok(Some((size[0], size[1])))
}

fn text_time(r: &mut Reader) -> Result<Option<TextTime>> {
    if !r.choice("addition_embed_type", Value::Null, &[(Value::Null, false), ("text_time".into(), true)])? {
        r.ignore(&["addition_time_embed_dim", "projection_class_embeddings_input_dim"]);
        return Ok(None);
    }
    let time_embed_dim = r.size("addition_time_embed_dim", 256, MAX_CHANNELS)?;
    let width = r.size("projection_class_embeddings_input_dim", 2816, 16 * MAX_CHANNELS)?;
    if time_embed_dim % 2 != 0 || time_embed_dim < 4 {
        let problem = format!("`addition_time_embed_dim` is {time_embed_dim}; supported: an even number from 4");
        return Err(r.error(problem));
    }
    match width.checked_sub(6 * time_embed_dim) {
        Some(text_embed_dim @ 1..) => Ok(Some(TextTime { text_embed_dim, time_embed_dim })),
        _ => Err(r.error(format!(
            "`projection_class_embeddings_input_dim` is {width}, which leaves nothing for the prompt beside six \
             embeddings of `addition_time_embed_dim` {time_embed_dim}"
        ))),
    }
}

/// A VAE: `AutoencoderKL`, or TAESD's `AutoencoderTiny`.
#[derive(Clone, Debug, PartialEq)]
pub struct VaeConfig {
    /// Channels of an image that the encoder reads.
    pub in_channels: usize,
    /// Channels of an image that the decoder makes.
    pub out_channels: usize,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Multiplies latents after encoding, divides them before decoding.
    pub scaling_factor: f32,
    /// The layers between images and latents.
    pub kind: VaeKind,
}

/// The kind of a VAE.
#[derive(Clone, Debug, PartialEq)]
pub enum VaeKind {
    /// `AutoencoderKL` (Rombach et al., arXiv 2112.10752).
    Kl(KlConfig),
    /// `AutoencoderTiny`, which is TAESD (github.com/madebyollin/taesd).
    Tiny(TinyConfig),
}

/// The layers of `AutoencoderKL`.
#[derive(Clone, Debug, PartialEq)]
pub struct KlConfig {
    /// From the finest level to the coarsest.
    pub block_out_channels: Vec<usize>,
    /// Resnets of a level in the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// Groups of the group norms.
    pub norm_num_groups: usize,
    /// True if a 1x1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// True if a 1x1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
    /// True if the mid blocks have attention.
    pub mid_block_add_attention: bool,
}

/// The layers of `AutoencoderTiny`. The encoder and the decoder have the same number of levels.
#[derive(Clone, Debug, PartialEq)]
pub struct TinyConfig {
    /// Channels between the encoder's layers.
    pub encoder_channels: usize,
    /// Residual blocks of the encoder's levels, from the finest to the coarsest.
    pub encoder_blocks: Vec<usize>,
    /// Channels between the decoder's layers.
    pub decoder_channels: usize,
    /// Residual blocks of the decoder's levels, from the coarsest to the finest.
    pub decoder_blocks: Vec<usize>,
}

impl VaeConfig {
    /// Reads a VAE's `config.json`; `path` is for messages.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] for a field that is missing, malformed or not supported.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let mut r = Reader::new(text, path)?;
        let classes = [("AutoencoderKL".into(), false), ("AutoencoderTiny".into(), true)];
        let is_tiny = r.choice("_class_name", "AutoencoderKL".into(), &classes)?;
        r.only("shift_factor", &[Value::Null, 0.into(), 0.0.into()])?;
        // The networks here keep activations within fp16 (models/vae.rs), so that none need fp32 arithmetic.
        r.ignore(&["sample_size", "force_upcast"]);
        let config = VaeConfig {
            in_channels: r.size("in_channels", 3, MAX_CHANNELS)?,
            out_channels: r.size("out_channels", 3, MAX_CHANNELS)?,
            latent_channels: r.size("latent_channels", 4, MAX_CHANNELS)?,
            scaling_factor: r.positive("scaling_factor", if is_tiny { 1.0 } else { 0.18215 })?,
            kind: match is_tiny {
                true => VaeKind::Tiny(TinyConfig::read(&mut r)?),
                false => VaeKind::Kl(KlConfig::read(&mut r)?),
            },
        };
        r.finish()?;
        Ok(config)
    }

    /// The width of one latent in pixels.
    pub fn scale(&self) -> usize {
        let levels = match &self.kind {
            VaeKind::Kl(kl) => kl.block_out_channels.len(),
            VaeKind::Tiny(tiny) => tiny.decoder_blocks.len(),
        };
        1 << (levels - 1)
    }
}

impl VaeKind {
    /// The class in diffusers.
    pub fn class(&self) -> &'static str {
        match self {
            VaeKind::Kl(_) => "AutoencoderKL",
            VaeKind::Tiny(_) => "AutoencoderTiny",
        }
    }
}

impl KlConfig {
    fn read(r: &mut Reader) -> Result<Self> {
        r.only("act_fn", &["silu".into(), "swish".into()])?;
        r.only("latents_mean", &[Value::Null])?;
        r.only("latents_std", &[Value::Null])?;
        let channels = r.list("block_out_channels", &[64], MAX_LEVELS, MAX_CHANNELS)?;
        for (key, block) in [("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")] {
            r.names(key, json!([block]), channels.len(), &[(block.into(), ())])?;
        }
        let norm_num_groups = r.size("norm_num_groups", 32, MAX_CHANNELS)?;
        check_groups(r, &channels, norm_num_groups)?;
        Ok(KlConfig {
            block_out_channels: channels,
            layers_per_block: r.size("layers_per_block", 1, 16)?,
            norm_num_groups,
            use_quant_conv: r.flag("use_quant_conv", true)?,
            use_post_quant_conv: r.flag("use_post_quant_conv", true)?,
            mid_block_add_attention: r.flag("mid_block_add_attention", true)?,
        })
    }
}

impl TinyConfig {
    fn read(r: &mut Reader) -> Result<Self> {
        r.only("act_fn", &["relu".into()])?;
        r.only("upsample_fn", &["nearest".into()])?;
        r.only("upsampling_scaling_factor", &[2.into()])?;
        r.ignore(&[
            // A copy of the decoder's that diffusers adds.
            "block_out_channels",
            // Of the bytes as which latents may be stored.
            "latent_magnitude",
            "latent_shift",
        ]);
        let mut part = |name: &str, default: &[usize]| {
            let blocks = r.list(&format!("num_{name}_blocks"), default, MAX_LEVELS, 16)?;
            let key = format!("{name}_block_out_channels");
            let channels = r.list(&key, &[64; 4], MAX_LEVELS, MAX_CHANNELS)?;
            if channels.len() != blocks.len() || channels.iter().any(|c| *c != channels[0]) {
                let count = blocks.len();
                return Err(r.error(format!("`{key}` is {channels:?}; supported: the same number {count} times")));
            }
            Ok((channels[0], blocks))
        };
        let (encoder_channels, encoder_blocks) = part("encoder", &[1, 3, 3, 3])?;
        let (decoder_channels, decoder_blocks) = part("decoder", &[3, 3, 3, 1])?;
        if encoder_blocks.len() != decoder_blocks.len() {
            let (down, up) = (encoder_blocks.len(), decoder_blocks.len());
            let problem = format!("`num_encoder_blocks` has {down} levels, and `num_decoder_blocks` {up}");
            return Err(r.error(problem));
        }
        Ok(TinyConfig { encoder_channels, encoder_blocks, decoder_channels, decoder_blocks })
    }
}
