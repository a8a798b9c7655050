"""Records what diffusers makes of single-file checkpoints in the original layout: cases/single_*.safetensors.

The files have all tensors of the real ones, by name, but are narrow, and their numbers follow from the
names by a formula (`numbers`), so that a case holds names, shapes and results only. Widths allow for what
a reader cannot see in a file: 8 heads in SD 1.x, else heads of 64 channels, norms of 32 groups.
"""

import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path

import numpy
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from build import BETAS, CROSS, PLAIN, UP_CROSS, UP_PLAIN
from common import save_case
from pipelines import BAD, BOAT, run


def numbers(name, shape):
    """Numbers that fp16 holds exactly: norms near 1, biases below 1/8, matrices that keep sizes about one."""
    state = 2166136261  # FNV-1a
    for byte in name.encode():
        state = (state ^ byte) * 16777619 & 0xFFFFFFFF
    count = int(numpy.prod(shape))
    x = (numpy.arange(count, dtype=numpy.uint32) * numpy.uint32(2654435761) + numpy.uint32(state)).astype(numpy.uint32)
    for shift, factor in [(16, 0x7FEB352D), (15, 0x846CA68B)]:
        x = (x ^ (x >> numpy.uint32(shift))) * numpy.uint32(factor)
    x ^= x >> numpy.uint32(16)
    uniform = (x >> numpy.uint32(21)).astype(numpy.float32) / 1024 - 1
    if len(shape) > 1:
        fan_in = int(numpy.prod(shape[1:]))
        values = uniform * 2.0 ** -(int(fan_in).bit_length() // 2 - 1)
    elif name.endswith("weight"):
        values = 1 + numpy.floor(uniform * 128) / 512
    else:
        values = uniform / 8
    return torch.from_numpy(values.astype(numpy.float16)).reshape(shape)


def original_unet(name, layers, levels):
    """CompVis' name of a UNet's tensor: blocks in one row, samplers after their level's layers.

    `levels` are those of the up half that attend.
    """
    for new, old in [
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
    ]:
        if name.rsplit(".", 1)[0] == new:
            return f"{old}.{name.rsplit('.', 1)[1]}"
    for new, old in [
        ("norm1", "in_layers.0"),
        ("conv1", "in_layers.2"),
        ("time_emb_proj", "emb_layers.1"),
        ("norm2", "out_layers.0"),
        ("conv2", "out_layers.3"),
        ("conv_shortcut", "skip_connection"),
    ]:
        name = re.sub(rf"(resnets\.\d+)\.{new}\.", rf"\1.{old}.", name)
    if match := re.match(r"mid_block\.resnets\.(\d)\.(.*)", name):
        return f"middle_block.{2 * int(match[1])}.{match[2]}"
    if match := re.match(r"mid_block\.attentions\.0\.(.*)", name):
        return f"middle_block.1.{match[1]}"
    way, level, kind, layer, rest = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d+)\.(.*)", name).groups()
    level, layer = int(level), int(layer)
    if way == "down":
        block = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else layer)
        rest = rest.replace("conv.", "op.") if kind == "downsamplers" else rest
        return f"input_blocks.{block}.{1 if kind == 'attentions' else 0}.{rest}"
    block = level * (layers + 1) + (layers if kind == "upsamplers" else layer)
    attends = level in levels
    child = {"resnets": 0, "attentions": 1, "upsamplers": 2 if attends else 1}[kind]
    return f"output_blocks.{block}.{child}.{rest}"


def original_vae(name, levels):
    """CompVis' name of a VAE's tensor: the up half counts from the finest level."""
    name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
    for new, old in [("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")]:
        name = name.replace(f"mid_block.attentions.0.{new}.", f"mid.attn_1.{old}.")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def shapes(unet, vae, encoders, prefixes):
    """Names and shapes of the file; `prefixes` are those of the text encoders."""
    levels = [i for i, kind in enumerate(unet.config.up_block_types) if kind == UP_CROSS]
    found = {}
    for name, tensor in unet.state_dict().items():
        old = original_unet(name, unet.config.layers_per_block, levels)
        found[f"model.diffusion_model.{old}"] = tensor.shape
    for name, tensor in vae.state_dict().items():
        old = original_vae(name, len(vae.config.block_out_channels))
        convolution = ".attn_1." in old and tensor.ndim == 2
        found[f"first_stage_model.{old}"] = (*tensor.shape, 1, 1) if convolution else tensor.shape
    for encoder, prefix in zip(encoders, prefixes):
        if prefix.endswith("transformer."):
            found |= {prefix + name: tensor.shape for name, tensor in encoder.state_dict().items()}
        else:
            found |= open_clip(prefix, encoder.config)
    return {name: list(shape) for name, shape in found.items()}


def open_clip(prefix, config):
    """The tensors of OpenCLIP's text tower; SD 2.x's has a 24th layer, which nobody reads."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    layers = 24 if layers == 23 else layers
    found = {
        "positional_embedding": [77, width],
        "text_projection": [width, config.projection_dim],
        "token_embedding.weight": [config.vocab_size, width],
        "ln_final.weight": [width],
        "ln_final.bias": [width],
    }
    for i in range(layers):
        layer = f"transformer.resblocks.{i}"
        found |= {f"{layer}.ln_{j}.{leaf}": [width] for j in (1, 2) for leaf in ("weight", "bias")}
        found |= {f"{layer}.attn.in_proj_weight": [3 * width, width], f"{layer}.attn.in_proj_bias": [3 * width]}
        for name, outputs, inputs in [
            ("attn.out_proj", width, width), ("mlp.c_fc", inner, width), ("mlp.c_proj", width, inner)
        ]:
            found |= {f"{layer}.{name}.weight": [outputs, inputs], f"{layer}.{name}.bias": [outputs]}
    return {prefix + name: shape for name, shape in found.items()}


def text(width, layers, act, projection=None):
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, hidden_act=act, projection_dim=projection or width,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def vae(factor):
    return AutoencoderKL(
        block_out_channels=(32, 64, 96, 96), down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4, scaling_factor=factor,
    )


def sd1():
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(32, 64, 96, 96), cross_attention_dim=64, attention_head_dim=8,
        down_block_types=(CROSS, CROSS, CROSS, PLAIN), up_block_types=(UP_PLAIN, UP_CROSS, UP_CROSS, UP_CROSS),
    )
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    return unet, vae(0.18215), [text(64, 12, "quick_gelu")], ["cond_stage_model.transformer."], scheduler, {}


def sd2():
    unet = UNet2DConditionModel(
        sample_size=96, block_out_channels=(64, 192, 128, 128), cross_attention_dim=128,
        attention_head_dim=(1, 3, 2, 2), use_linear_projection=True,
        down_block_types=(CROSS, CROSS, CROSS, PLAIN), up_block_types=(UP_PLAIN, UP_CROSS, UP_CROSS, UP_CROSS),
    )
    scheduler = DDIMScheduler(
        **BETAS, prediction_type="v_prediction", steps_offset=1, set_alpha_to_one=False, clip_sample=False
    )
    metadata = {"modelspec.architecture": "stable-diffusion-v2-768-v"}
    return unet, vae(0.18215), [text(128, 23, "gelu")], ["cond_stage_model.model."], scheduler, metadata


def sdxl():
    unet = UNet2DConditionModel(
        sample_size=128, block_out_channels=(64, 128, 64), cross_attention_dim=64 + 128,
        attention_head_dim=(1, 2, 1), use_linear_projection=True, transformer_layers_per_block=(1, 2, 10),
        addition_embed_type="text_time", addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96 + 6 * 32,
        down_block_types=(PLAIN, CROSS, CROSS), up_block_types=(UP_CROSS, UP_CROSS, UP_PLAIN),
    )
    encoders = [text(64, 12, "quick_gelu"), text(128, 32, "gelu", projection=96)]
    prefixes = ["conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."]
    scheduler = EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")
    return unet, vae(0.13025), encoders, prefixes, scheduler, {}


def clutter(prefixes):
    """What real files hold beside the weights."""
    found = {
        "betas": torch.ones(4),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.diffusion_modelinput_blocks00weight": torch.ones(2, 2),
        "first_stage_model.loss.logvar": torch.ones(1),
    }
    for prefix in prefixes:
        if prefix.endswith("transformer."):
            found[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77)[None]
        else:
            found[f"{prefix}logit_scale"] = torch.tensor(4.6)
    return found


def save_configs(folder, kind, tokenizer, unet, vae, encoders, prefixes, scheduler):
    """A folder as `save_pretrained` writes it, but without weights; pad tokens are those of the releases."""
    parts = dict(unet=unet, vae=vae, scheduler=scheduler)
    for suffix, encoder, prefix in zip(("", "_2"), encoders, prefixes):
        pad = "<|endoftext|>" if prefix.endswith("transformer.") else "!"
        parts[f"text_encoder{suffix}"] = encoder
        parts[f"tokenizer{suffix}"] = CLIPTokenizer.from_pretrained(tokenizer, pad_token=pad)
    if kind is StableDiffusionPipeline:
        parts |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    kind(**parts).save_pretrained(folder)
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()


def digest(module):
    """SHA-256 of a component's tensors: names in order, each with its shape and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.half().numpy().tobytes())
    return digest.hexdigest()


def fingerprint(module):
    """What `Tensors::fingerprint` says it computes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        if tensor.numel() <= 8192:
            digest.update(tensor.half().numpy().tobytes())
    return digest.digest()[:16].hex()


@torch.no_grad()
def record(args):
    if not args.clip_tokenizer:
        print("  no --clip-tokenizer: its cases are kept as they are")
        return
    # With as many weights as the released files hold.
    for name, make, count in [("sd1", sd1, 1130), ("sd2", sd2, 1227), ("sdxl", sdxl, 2513)]:
        kind = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
        with tempfile.TemporaryDirectory() as scratch:
            folder, file = Path(scratch) / "configs", Path(scratch) / "file.safetensors"
            *parts, scheduler, metadata = make()
            save_configs(folder, kind, args.clip_tokenizer, *parts, scheduler)
            names, extra = shapes(*parts), clutter(parts[-1])
            assert len(names) == count, f"{name} has {len(names)} weights"
            save_file({key: numbers(key, shape) for key, shape in names.items()} | extra, file)
            pipeline = kind.from_single_file(
                file, config=str(folder), local_files_only=True, torch_dtype=torch.float32
            )
            configs = {
                path.parent.name: json.loads(path.read_text())
                for path in [*folder.glob("*/config.json"), folder / "scheduler/scheduler_config.json"]
            }
        pipeline.set_progress_bar_config(disable=True)
        components = {part: getattr(pipeline, part) for part in configs if part != "scheduler"}
        tensors, settings = run(
            pipeline, [BOAT], steps=3, negative=[BAD], guidance=5.0, seed=3, height=64, width=48
        )
        listing = {key: ["F16", shape] for key, shape in names.items()}
        kinds = {torch.float32: "F32", torch.int64: "I64"}
        listing |= {key: [kinds[tensor.dtype], list(tensor.shape)] for key, tensor in extra.items()}
        settings |= {
            "file_metadata": metadata,
            "listing": listing,
            "configs": configs,
            "digests": {part: digest(module) for part, module in components.items()},
            "fingerprint": fingerprint(pipeline.unet),
        }
        save_case(f"single_{name}", {key: tensors[key] for key in ("out.latents", "out.image")}, settings)
        latents = tensors["out.latents"]
        print(f"  {name}: {len(names)} tensors, latents std {latents.std():.2f}, max {latents.abs().max():.1f}")
