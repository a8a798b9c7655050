"""Batched sampling with a saved model and classifier-free guidance, by DDIM for the demo, and for demo XL by its own
scheduler."""

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

import xl
from common import MODEL


def load(folder=MODEL):
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    if folder == MODEL:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


@torch.no_grad()
def conditions(pipe, prompts):
    """The UNet's inputs in addition to the latents, with the unconditional half first."""
    if hasattr(pipe, "text_encoder_2"):
        states, empty, pooled, empty_pooled = pipe.encode_prompt(prompts, do_classifier_free_guidance=True)
        sizes = torch.tensor([xl.SIZE] * 2 * len(prompts), dtype=torch.float32)
        return {"encoder_hidden_states": torch.cat([empty, states]),
                "added_cond_kwargs": {"text_embeds": torch.cat([empty_pooled, pooled]), "time_ids": sizes}}
    states, empty = pipe.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=True)
    return {"encoder_hidden_states": torch.cat([empty, states])}


@torch.no_grad()
def sample(pipe, prompts, guidance, generator, steps=50):
    """Pictures of `prompts` as a tensor [N, 3, 64, 64] in -1..1."""
    condition = conditions(pipe, prompts)
    pipe.scheduler.set_timesteps(steps)
    latent = torch.randn(len(prompts), 4, 8, 8, generator=generator) * pipe.scheduler.init_noise_sigma
    for t in pipe.scheduler.timesteps:
        scaled = pipe.scheduler.scale_model_input(latent, t)
        with torch.autocast("cpu", torch.bfloat16):
            empty, stated = pipe.unet(torch.cat([scaled, scaled]), t, **condition).sample.float().chunk(2)
        noise = empty + guidance * (stated - empty)
        latent = pipe.scheduler.step(noise, t, latent).prev_sample
    return pipe.vae.decode(latent / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)
