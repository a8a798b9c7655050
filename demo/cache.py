"""Encodes the data that the diffusion trains on, once: drawings to latents and captions to text states."""

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

from common import CACHE, MODEL, begin, pictures
from world import PEOPLE, all_captions

DRAWINGS = 240  # of each kind of person


@torch.no_grad()
def latents():
    """Scaled latents, [people, drawings, 4, 8, 8]. There are equally many of every person, so that the bias comes only
    from how training pairs them with captions."""
    vae = AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32).eval()
    out = []
    for person in PEOPLE:
        x = pictures([person] * DRAWINGS, range(DRAWINGS))
        with torch.autocast("cpu", torch.bfloat16):
            parts = [vae.encode(part).latent_dist.mean for part in x.split(60)]
        out.append(torch.cat(parts).float() * vae.config.scaling_factor)
    return torch.stack(out)


@torch.no_grad()
def texts():
    """Text states of every caption, [captions, 77, width], in bfloat16."""
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(MODEL / "text_encoder", torch_dtype=torch.float32).eval()
    words = [c.text for c in all_captions()]
    out = []
    for i in range(0, len(words), 256):
        tokens = tokenizer(words[i:i + 256], padding="max_length", return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            out.append(encoder(tokens.input_ids).last_hidden_state.bfloat16())
    return torch.cat(out)


def main():
    begin(3)
    torch.save(latents(), CACHE / "latents.pt")
    torch.save(texts(), CACHE / "texts.pt")


if __name__ == "__main__":
    main()
