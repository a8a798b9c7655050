"""Records single calls of the text encoders, UNets and VAEs."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from build import BOS, EOS
from common import CHECKPOINTS, VARIANTS, generator, randn, save_case

#: Latent shape and timesteps of the UNet cases. The third and fourth are odd at some
#: level, so that upsampling must go to explicit sizes.
UNET_CASES = [
    ((1, 8, 8), [500.0]),
    ((2, 16, 8), [0.0, 999.0]),
    ((3, 12, 28), [1.0]),
    ((2, 5, 7), [499.3, 13.75]),
    ((1, 20, 13), [999.0]),
]
#: UNets of unusual shapes, and their cases of those above.
UNUSUAL = {"small": (1, 3), "ssd": (1, 3), "lcm": (1, 3)}
#: Batch and latent size of the VAE cases; the image is eight times as large.
VAE_CASES = [(1, 4, 4), (2, 3, 5), (1, 5, 7)]
TEXT_ENCODERS = [
    ("sd1", "text_encoder", CLIPTextModel),
    ("sd2", "text_encoder", CLIPTextModel),
    ("sdxl", "text_encoder", CLIPTextModel),
    ("sdxl", "text_encoder_2", CLIPTextModelWithProjection),
    ("turbo", "text_encoder", CLIPTextModel),
    ("turbo", "text_encoder_2", CLIPTextModelWithProjection),
    ("odd", "text_encoder", CLIPTextModelWithProjection),
]


def load(kind, checkpoint, part):
    """One part of a checkpoint, its fp16 weights widened to fp32."""
    return kind.from_pretrained(
        CHECKPOINTS / checkpoint,
        subfolder=part,
        torch_dtype=torch.float32,
        variant=VARIANTS.get(checkpoint),
    ).eval()


def prompts(label, above):
    """Token ids: a short text, one that fills all 77, one with a second end.

    With `above`, the short text also has an id above the end-of-text id, and the second
    end comes with one; only reading the end's own id finds the right place then.
    """
    ids = torch.randint(0, 512, (3, 77), generator=generator(label))
    ids[:, 0] = BOS
    ids[0, 9:] = EOS
    ids[1, 76] = EOS
    ids[2, 5], ids[2, 20], ids[2, 21:] = EOS, EOS, 0
    if above:
        ids[0, 4], ids[2, 12] = EOS + 2, EOS + 5
    return ids


def record_text(checkpoint, part, kind):
    model = load(kind, checkpoint, part)
    ids = prompts(f"{checkpoint}/{part}", above=model.config.vocab_size > EOS + 1)
    out = model(ids, output_hidden_states=True)
    tensors = {
        "input_ids": ids,
        "out.last_hidden_state": out.last_hidden_state,
        "out.penultimate_hidden_state": out.hidden_states[-2],
    }
    if kind is CLIPTextModelWithProjection:
        tensors["out.text_embeds"] = out.text_embeds
    save_case(f"text_{checkpoint}_{part}", tensors, {"checkpoint": checkpoint, "part": part})


def watch_middle(model, seen):
    """Puts what the middle block gives into `seen` at every call; without one, what the down half gives."""
    if model.mid_block:
        return model.mid_block.register_forward_hook(lambda module, inputs, out: seen.append(out))
    return model.down_blocks[-1].register_forward_hook(lambda module, inputs, out: seen.append(out[0]))


def record_unet(checkpoint, cases=range(len(UNET_CASES))):
    model = load(UNet2DConditionModel, checkpoint, "unet")
    width = model.config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    middle = []
    watch_middle(model, middle)
    for index in cases:
        (batch, height, columns), timestep = UNET_CASES[index]
        label = f"unet_{checkpoint}_{index}"
        inputs = {
            "sample": randn(f"{label}/sample", batch, model.config.in_channels, height, columns),
            "timestep": torch.tensor(timestep),
            "encoder_hidden_states": randn(f"{label}/states", batch, 77, width),
        }
        added = {}
        if model.config.addition_embed_type == "text_time":
            sizes = [float(8 * height), 8.0 * columns, 4.0 * index, 16.0, 64.0, 96.0 + index]
            embeds = model.config.projection_class_embeddings_input_dim - 6 * model.config.addition_time_embed_dim
            added["text_embeds"] = randn(f"{label}/embeds", batch, embeds)
            added["time_ids"] = torch.tensor([sizes] * batch) + torch.arange(batch)[:, None]
        if model.config.time_cond_proj_dim:
            inputs["timestep_cond"] = randn(f"{label}/cond", batch, model.config.time_cond_proj_dim)
        out = model(**inputs, added_cond_kwargs=added or None).sample
        outputs = {"out.sample": out, "out.mid": middle.pop()}
        save_case(label, inputs | added | outputs, {"checkpoint": checkpoint})


def vae_class(checkpoint):
    return AutoencoderTiny if checkpoint == "taesd" else AutoencoderKL


def vae_outputs(model, latents, image):
    """What a VAE makes of latents and of an image. TAESD's latents have no distribution."""
    encoded = model.encode(image)
    outputs = {"image": model.decode(latents).sample}
    if isinstance(model, AutoencoderTiny):
        return outputs | {"latents": encoded.latents}
    return outputs | {"mean": encoded.latent_dist.mean, "logvar": encoded.latent_dist.logvar}


def record_vae(checkpoint):
    model = load(vae_class(checkpoint), checkpoint, "vae")
    for index, (batch, height, columns) in enumerate(VAE_CASES):
        label = f"vae_{checkpoint}_{index}"
        latents = randn(f"{label}/latents", batch, 4, height, columns) * 4
        image = torch.rand(batch, 3, 8 * height, 8 * columns, generator=generator(label)) * 2 - 1
        outputs = {f"out.{name}": out for name, out in vae_outputs(model, latents, image).items()}
        save_case(label, {"latents": latents, "image": image} | outputs, {"checkpoint": checkpoint})


@torch.no_grad()
def record():
    for checkpoint, part, kind in TEXT_ENCODERS:
        record_text(checkpoint, part, kind)
    for checkpoint in ("sd1", "sd2", "sdxl", "turbo", "odd"):
        record_unet(checkpoint)
    for checkpoint, cases in UNUSUAL.items():
        record_unet(checkpoint, cases)
    for checkpoint in ("sd1", "sd2", "sdxl", "taesd"):
        record_vae(checkpoint)
