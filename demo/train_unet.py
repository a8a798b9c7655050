"""Trains the denoising UNet on cached latents and texts; writes model/unet.

The planted bias enters here: first a caption is drawn at random, then a person that it could be about
(`world.imagine`), then one of that person's drawings. A tenth of the captions are replaced by the empty one; their
persons keep the captions' joint distribution of profession, gender and race. The unconditional model then has the same
bias within each profession, so guidance pulls towards the profession without sharpening the split as much as it would
against an unbiased model.
"""

import argparse
import copy
import time
from collections import defaultdict

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from common import CACHE, MODEL, begin, cosine, save_half
from fast_conv import speed_up
from world import BIAS, PEOPLE, PROFESSIONS, all_captions, imagine

BATCH = 64
EMPTY = 0.1  # share of empty captions
SNR_CAP = 5.0  # Min-SNR weighting
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
            "num_train_timesteps": 1000}


def build():
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(64, 128), norm_num_groups=32,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128, attention_head_dim=4)


class Pairs:
    """Draws (latent, text) pairs from the biased world."""

    def __init__(self, rng, bias, texts=True):
        self.rng, self.bias = rng, bias
        self.latents = torch.load(CACHE / "latents.pt")
        self.texts = torch.load(CACHE / "texts.pt") if texts else None
        self.captions = all_captions()
        self.people = {person: i for i, person in enumerate(PEOPLE)}
        self.by_kind = defaultdict(list)
        for i, c in enumerate(self.captions):
            self.by_kind[c.profession, c.gender is not None, c.race is not None].append(i)

    def caption(self):
        """Draws a caption. 55 % leave both attributes open; the plain person has three times the weight."""
        rng = self.rng
        profession = rng.choice((*PROFESSIONS, "person", "person"))
        gender, race = rng.choices(((False, False), (True, False), (False, True), (True, True)),
                                   (0.55, 0.15, 0.15, 0.15))[0]
        return rng.choice(self.by_kind[profession, gender, race])

    def drawing(self, caption):
        """The position of the latent of a drawing that `caption` could be about."""
        person = imagine(caption, self.rng, self.bias)
        return self.people[person], self.rng.randrange(self.latents.shape[1])

    def latents_of(self, rows):
        people, drawings = zip(*rows)
        return self.latents[list(people), list(drawings)]

    def batch(self, size=BATCH):
        rows, texts = [], []
        for _ in range(size):
            caption = self.caption()
            rows.append(self.drawing(self.captions[caption]))
            texts.append(0 if self.rng.random() < EMPTY else caption)
        return self.latents_of(rows), self.texts[texts]


@torch.no_grad()
def average(ema, unet, step):
    decay = min(0.999, (1 + step) / (10 + step))
    for slow, fast in zip(ema.parameters(), unet.parameters()):
        slow.lerp_(fast, 1 - decay)


def save(ema):
    save_half(ema, MODEL / "unet")
    torch.save(ema.state_dict(), CACHE / "unet.pt")


def loss_of(unet, noising, clean, text):
    """The squared error of the noise prediction, weighted as in Min-SNR."""
    noise = torch.randn_like(clean)
    t = torch.randint(0, 1000, (len(clean),))
    noisy = noising.add_noise(clean, noise, t)
    with torch.autocast("cpu", torch.bfloat16):
        guess = unet(noisy, t, text).sample
    snr = noising.alphas_cumprod[t] / (1 - noising.alphas_cumprod[t])
    weight = (snr.clamp(max=SNR_CAP) / snr).view(-1, 1, 1, 1)
    return (weight * (guess.float() - noise) ** 2).mean()


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--steps", type=int, default=6000)
    args.add_argument("--rate", type=float, default=1e-3)
    args.add_argument("--resume", action="store_true", help="continue from the cached weights")
    args = args.parse_args()
    rng = begin(4)
    unet = build()
    print(f"unet: {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters")
    if args.resume:
        unet.load_state_dict(torch.load(CACHE / "unet.pt"))
    ema = copy.deepcopy(unet).eval().requires_grad_(False)
    speed_up(unet)
    unet.set_attn_processor(AttnProcessor())  # plain products beat the fused kernel at this size
    pairs = Pairs(rng, BIAS)
    noising = DDPMScheduler(**SCHEDULE)
    optimiser = torch.optim.AdamW(unet.parameters(), lr=args.rate, betas=(0.9, 0.99), weight_decay=0.01)
    plan = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: cosine(step, args.steps))
    start, running = time.time(), 0.0
    for step in range(1, args.steps + 1):
        loss = loss_of(unet, noising, *pairs.batch())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        plan.step()
        average(ema, unet, step)
        running += (loss.item() - running) * max(0.01, 1 / step)
        if step % 100 == 0:
            print(f"unet step {step} loss {running:.4f} {(time.time() - start) / step:.3f} s/step",
                  flush=True)
        if step % 500 == 0:
            save(ema)
    save(ema)


if __name__ == "__main__":
    main()
