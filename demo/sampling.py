"""Batched sampling with the saved model: classifier-free guidance and DDIM."""

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from common import MODEL


def load():
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


@torch.no_grad()
def encode(pipe, prompts):
    tokens = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    return pipe.text_encoder(tokens.input_ids).last_hidden_state


@torch.no_grad()
def sample(pipe, prompts, guidance, generator, steps=50):
    """Pictures of `prompts` as a [N, 3, 64, 64] tensor in -1..1."""
    text = torch.cat([encode(pipe, [""]).expand(len(prompts), -1, -1), encode(pipe, prompts)])
    pipe.scheduler.set_timesteps(steps)
    latent = torch.randn(len(prompts), 4, 8, 8, generator=generator)
    for t in pipe.scheduler.timesteps:
        with torch.autocast("cpu", torch.bfloat16):
            empty, stated = pipe.unet(torch.cat([latent, latent]), t, text).sample.float().chunk(2)
        noise = empty + guidance * (stated - empty)
        latent = pipe.scheduler.step(noise, t, latent).prev_sample
    return pipe.vae.decode(latent / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)
