"""Tiny random checkpoints in the shapes of the Stable Diffusion releases.

Weights are rounded to fp16, stored so, and later read back into fp32.
"""

import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from common import VARIANTS, randomise
from vocabulary import tokenizer

VOCABULARY = 602
BOS, EOS = VOCABULARY - 2, VOCABULARY - 1
BETAS = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
)
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UP_CROSS, UP_PLAIN = "CrossAttnUpBlock2D", "UpBlock2D"

#: The settings that SD 1.5's own (older, shorter) configuration files contain.
SD1_UNET_KEYS = """_class_name _diffusers_version act_fn attention_head_dim block_out_channels
    center_input_sample cross_attention_dim down_block_types downsample_padding
    flip_sin_to_cos freq_shift in_channels layers_per_block mid_block_scale_factor norm_eps
    norm_num_groups out_channels sample_size up_block_types""".split()
SD1_VAE_KEYS = """_class_name _diffusers_version act_fn block_out_channels down_block_types
    in_channels latent_channels layers_per_block norm_num_groups out_channels sample_size
    up_block_types""".split()
SD1_SCHEDULER_KEYS = """_class_name _diffusers_version beta_end beta_schedule beta_start
    clip_sample num_train_timesteps set_alpha_to_one skip_prk_steps steps_offset
    trained_betas""".split()
LEGACY_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def text_encoder(label, kind=CLIPTextModel, **settings):
    settings = dict(
        vocab_size=VOCABULARY,
        max_position_embeddings=77,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    ) | settings
    settings.setdefault("projection_dim", settings["hidden_size"])
    return randomise(kind(CLIPTextConfig(**settings)), label).half()


def unet(label, **settings):
    """A UNet; norm groups hold two channels or more, or norms would hide biases."""
    settings = dict(in_channels=4, out_channels=4, layers_per_block=2) | settings
    return randomise(UNet2DConditionModel(**settings), label).half()


def vae(label, channels, groups, **settings):
    levels = len(channels)
    model = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=groups,
        **settings,
    )
    return randomise(model, label).half()


def keep_settings(path, keys, **extra):
    """Drops every setting not listed, as files of older releases lack them."""
    config = json.loads(path.read_text()) | extra
    path.write_text(json.dumps({key: config[key] for key in keys}, indent=2) + "\n")


def rename_attention(path):
    """Gives the VAE's attention the names it had before diffusers 0.18."""
    tensors = {}
    for name, tensor in load_file(path).items():
        for new, old in LEGACY_ATTENTION.items():
            if ".attentions." in name:
                name = name.replace(f".{new}.", f".{old}.")
        tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def sd1(folder):
    """SD 1.x: heads by number, convolutional projections, old names and short configs."""
    with tempfile.TemporaryDirectory() as scratch:
        tokens = tokenizer(Path(scratch))
        pipeline = StableDiffusionPipeline(
            tokenizer=tokens,
            text_encoder=text_encoder(
                "sd1/text", hidden_size=32, intermediate_size=96, hidden_act="quick_gelu"
            ),
            unet=unet(
                "sd1/unet",
                sample_size=8,
                block_out_channels=(8, 16, 24, 24),
                down_block_types=(CROSS, CROSS, CROSS, PLAIN),
                up_block_types=(UP_PLAIN, UP_CROSS, UP_CROSS, UP_CROSS),
                attention_head_dim=2,
                cross_attention_dim=32,
                norm_num_groups=4,
            ),
            vae=vae("sd1/vae", (8, 8, 16, 16), 4, sample_size=64),
            scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder)
    keep_settings(folder / "unet/config.json", SD1_UNET_KEYS)
    keep_settings(folder / "vae/config.json", SD1_VAE_KEYS)
    # `clip_sample` is no setting of PNDM, but DDIM made from this file reads it.
    path = folder / "scheduler/scheduler_config.json"
    keep_settings(path, SD1_SCHEDULER_KEYS, clip_sample=False)
    rename_attention(folder / "vae/diffusion_pytorch_model.safetensors")
    # Older exports store this constant among the weights.
    path = folder / "text_encoder/model.safetensors"
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(load_file(path) | positions, path, metadata={"format": "pt"})


def sd2(folder):
    """SD 2.x: heads per level, linear projections, v-prediction, shards, fp16 names."""
    with tempfile.TemporaryDirectory() as scratch:
        tokens = tokenizer(Path(scratch), pad_token="!")
        pipeline = StableDiffusionPipeline(
            tokenizer=tokens,
            text_encoder=text_encoder(
                "sd2/text", hidden_size=64, intermediate_size=128, hidden_act="gelu"
            ),
            unet=unet(
                "sd2/unet",
                sample_size=8,
                block_out_channels=(8, 16, 24, 24),
                down_block_types=(CROSS, CROSS, CROSS, PLAIN),
                up_block_types=(UP_PLAIN, UP_CROSS, UP_CROSS, UP_CROSS),
                attention_head_dim=[1, 2, 3, 3],
                cross_attention_dim=64,
                norm_num_groups=4,
                use_linear_projection=True,
                upcast_attention=True,
            ),
            vae=vae("sd2/vae", (8, 8, 8, 12), 4, sample_size=64),
            scheduler=DDIMScheduler(
                **BETAS,
                prediction_type="v_prediction",
                steps_offset=1,
                set_alpha_to_one=False,
                clip_sample=False,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder, variant=VARIANTS["sd2"], max_shard_size="300KB")


def sdxl(folder):
    """SDXL base: two text encoders, size conditioning, one to three transformer layers."""
    with tempfile.TemporaryDirectory() as scratch:
        pipeline = StableDiffusionXLPipeline(
            tokenizer=tokenizer(Path(scratch) / "1"),
            tokenizer_2=tokenizer(Path(scratch) / "2", pad_token="!"),
            text_encoder=text_encoder(
                "sdxl/text", hidden_size=32, intermediate_size=64, hidden_act="quick_gelu"
            ),
            text_encoder_2=text_encoder(
                "sdxl/text_2",
                CLIPTextModelWithProjection,
                hidden_size=32,
                intermediate_size=96,
                hidden_act="gelu",
                projection_dim=40,
            ),
            unet=unet(
                "sdxl/unet",
                sample_size=16,
                block_out_channels=(8, 16, 24),
                down_block_types=(PLAIN, CROSS, CROSS),
                up_block_types=(UP_CROSS, UP_CROSS, UP_PLAIN),
                attention_head_dim=[1, 2, 3],
                transformer_layers_per_block=[1, 2, 3],
                cross_attention_dim=64,
                norm_num_groups=4,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=40 + 6 * 8,
            ),
            vae=vae(
                "sdxl/vae",
                (8, 8, 8, 16),
                4,
                sample_size=128,
                scaling_factor=0.13025,
                force_upcast=True,
            ),
            scheduler=EulerDiscreteScheduler(
                **BETAS, steps_offset=1, timestep_spacing="leading"
            ),
            add_watermarker=False,
        )
        pipeline.save_pretrained(folder)


def turbo(folder):
    """An SDXL for few steps without guidance: everything of another width, and an empty prompt is no zeros."""
    with tempfile.TemporaryDirectory() as scratch:
        pipeline = StableDiffusionXLPipeline(
            tokenizer=tokenizer(Path(scratch) / "1"),
            tokenizer_2=tokenizer(Path(scratch) / "2", pad_token="!"),
            text_encoder=text_encoder(
                "turbo/text", hidden_size=24, intermediate_size=64, num_hidden_layers=2, hidden_act="quick_gelu"
            ),
            text_encoder_2=text_encoder(
                "turbo/text_2",
                CLIPTextModelWithProjection,
                hidden_size=40,
                intermediate_size=72,
                num_hidden_layers=2,
                hidden_act="gelu",
                projection_dim=56,
            ),
            unet=unet(
                "turbo/unet",
                sample_size=12,
                layers_per_block=1,
                block_out_channels=(8, 12, 16),
                down_block_types=(PLAIN, CROSS, CROSS),
                up_block_types=(UP_CROSS, UP_CROSS, UP_PLAIN),
                attention_head_dim=[1, 2, 4],
                transformer_layers_per_block=[1, 1, 2],
                cross_attention_dim=24 + 40,
                norm_num_groups=4,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=12,
                projection_class_embeddings_input_dim=56 + 6 * 12,
            ),
            vae=vae("turbo/vae", (8, 8, 8, 8), 4, sample_size=96, scaling_factor=0.13025, force_upcast=True),
            scheduler=EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
        pipeline.save_pretrained(folder)


def odd(folder):
    """Settings seldom varied; a UNet, and a text encoder with the real end-of-text id."""
    unet(
        "odd/unet",
        sample_size=8,
        block_out_channels=(8, 16, 24),
        down_block_types=(CROSS, CROSS, PLAIN),
        up_block_types=(UP_PLAIN, UP_CROSS, UP_CROSS),
        layers_per_block=[1, 2, 1],
        attention_head_dim=[1, 2, 3],
        cross_attention_dim=[48, 48, 48],
        only_cross_attention=[False, True, False],
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=2,
        norm_eps=1e-3,
        mid_block_scale_factor=1.4142,
        flip_sin_to_cos=False,
        freq_shift=1,
    ).save_pretrained(folder / "unet")
    # Six ids above the end-of-text id: the largest id is no longer the end.
    text_encoder(
        "odd/text",
        CLIPTextModelWithProjection,
        vocab_size=VOCABULARY + 6,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-4,
        projection_dim=32,
        bos_token_id=BOS,
        eos_token_id=EOS,
    ).save_pretrained(folder / "text_encoder")


def small(folder):
    """A UNet without a mid block, as those of BK-SDM, and with nine channels, as those for inpainting."""
    unet(
        "small/unet",
        sample_size=8,
        in_channels=9,
        block_out_channels=(8, 16),
        down_block_types=(CROSS, CROSS),
        mid_block_type=None,
        up_block_types=(UP_CROSS, UP_CROSS),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=24,
        norm_num_groups=4,
    ).save_pretrained(folder / "unet")


def ssd(folder):
    """A UNet distilled from SDXL's as SSD-1B is: transformers of a depth of their own, no attention in the middle."""
    unet(
        "ssd/unet",
        sample_size=16,
        block_out_channels=(8, 8, 16),
        down_block_types=(PLAIN, CROSS, CROSS),
        mid_block_type="UNetMidBlock2D",
        up_block_types=(UP_CROSS, UP_CROSS, UP_PLAIN),
        attention_head_dim=[1, 2, 4],
        transformer_layers_per_block=[0, [1, 2], [2, 1]],
        reverse_transformer_layers_per_block=[[1, 2, 3], [2, 1, 1], 1],
        cross_attention_dim=24,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
    ).save_pretrained(folder / "unet")


def lcm(folder):
    """A latent consistency model: sd1 with a UNet that reads the guidance scale, and is distilled, too."""
    unet(
        "lcm/unet",
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=(CROSS, PLAIN),
        mid_block_type=None,
        up_block_types=(UP_PLAIN, UP_CROSS),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=32,
        norm_num_groups=4,
        time_cond_proj_dim=12,
    ).save_pretrained(folder / "unet")


def taesd(folder):
    """TAESD, a VAE for any of these, with other blocks and widths than its releases."""
    model = AutoencoderTiny(
        encoder_block_out_channels=(12,) * 4,
        decoder_block_out_channels=(16,) * 4,
        num_encoder_blocks=(1, 2, 1, 2),
        num_decoder_blocks=(2, 1, 2, 1),
    )
    randomise(model, "taesd/vae").half().save_pretrained(folder / "vae")


BUILDERS = {
    "sd1": sd1,
    "sd2": sd2,
    "sdxl": sdxl,
    "turbo": turbo,
    "odd": odd,
    "small": small,
    "ssd": ssd,
    "lcm": lcm,
    "taesd": taesd,
}
