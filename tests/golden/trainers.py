"""Records RespoDiff's whole training (arXiv 2509.15257, algorithm 1) with diffusers, in float64.

What is drawn follows respodiff's own generator, so that both train on the same noise.
"""

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

import pipelines
from calls import load
from common import CHECKPOINTS, save_case

MASK = 2**64 - 1
HEIGHT, WIDTH = 16, 24
#: Name, checkpoint, the prompts (base, toward, neutral), and the recipe.
TASKS = [
    ("fair", "sd1", ("", "a photo of a cat", "a photo"),
     dict(batch=2, iterations=4, lr_ram=1e-2, lr_sam=3e-3, kind="fair", concept="a photo of a cat", rollout_steps=6,
          latents_per_rollout=2, target_guidance=4.0, timestep_offset=0.0, init=0.3, **{"lambda": 0.7})),
    ("safe", "sd2", ("a small boat", "a photo", "a photo"),
     dict(batch=1, iterations=3, lr_ram=1e-2, lr_sam=1e-3, kind="safe", concept="a small boat", rollout_steps=5,
          latents_per_rollout=1, target_guidance=12.0, timestep_offset=19.0, init=0.316, **{"lambda": 1.0})),
    ("xl", "sdxl", (None, "a photo of a cat", "a photo"),
     dict(batch=1, iterations=3, lr_ram=1e-2, lr_sam=3e-3, kind="fair", concept="a photo of a cat", rollout_steps=5,
          latents_per_rollout=2, target_guidance=4.0, timestep_offset=0.0, init=0.1, **{"lambda": 1.0})),
]
SEED = 11


class Draws:
    """SplitMix64, started from a seed and a position."""

    def __init__(self, seed, position):
        self.state = seed
        self.state = self.next() ^ (position * 0xD1342543DE82EF95 & MASK)

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = (self.state ^ (self.state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
        return z ^ (z >> 31)

    def unit(self):
        return (self.next() >> 40) / 2**24


class Reference:
    def __init__(self, checkpoint, prompts):
        self.unet = load(UNet2DConditionModel, checkpoint, "unet").requires_grad_(False).double()
        self.pipeline = pipelines.load(checkpoint)  # its text encoders cannot run in float64
        self.empty, self.base, self.toward, self.neutral = (self.condition(prompt) for prompt in (None, *prompts))
        config = DDIMScheduler.load_config(CHECKPOINTS / checkpoint / "scheduler")
        forced = {} if checkpoint in pipelines.XL else {"steps_offset": 1, "clip_sample": False}
        self.scheduler = DDIMScheduler.from_config({**config, **forced, "timestep_spacing": "leading"})

    @torch.no_grad()
    def condition(self, prompt):
        """What the UNet reads beside latents and timestep; None is no prompt."""
        asked = dict(do_classifier_free_guidance=prompt is None, num_images_per_prompt=1, device="cpu")
        encoded = self.pipeline.encode_prompt(prompt or "", **asked)
        # With guidance the unconditional half stands in the odd places.
        parts = [part.double() for part in encoded[prompt is None :: 2] if part is not None]
        if len(parts) == 1:
            return parts
        height, width = 8 * HEIGHT, 8 * WIDTH
        return [*parts, torch.tensor([[height, width, 0, 0, height, width]]).double()]

    def predict(self, x, t, condition, shift=None):
        hook = None
        if shift is not None:
            hook = self.unet.mid_block.register_forward_hook(lambda m, a, out: out + shift)
        states, *added = (part.expand(len(x), *part.shape[1:]) for part in condition)
        added = dict(zip(("text_embeds", "time_ids"), added)) or None
        out = self.unet(x, torch.tensor(t, dtype=torch.float64), states, added_cond_kwargs=added).sample
        if hook:
            hook.remove()
        return out


def uniform(draws, shape, bound):
    """Row-major over rows, columns, channels."""
    c, h, w = shape
    values = [bound * (2 * draws.unit() - 1) for _ in range(c * h * w)]
    return torch.tensor(values).reshape(h, w, c).permute(2, 0, 1).double().contiguous()


def train(name, checkpoint, prompts, recipe):
    model = Reference(checkpoint, prompts)
    shapes = []
    hook = model.unet.mid_block.register_forward_hook(lambda m, a, out: shapes.append(out.shape[1:]))
    with torch.no_grad():
        model.predict(torch.zeros(1, 4, HEIGHT, WIDTH, dtype=torch.float64), 1.0, model.empty)
    hook.remove()
    draws = Draws(SEED, MASK)
    ram, sam = (uniform(draws, shapes[0], recipe["init"]).requires_grad_() for _ in range(2))
    first = {"ram": ram.detach().clone(), "sam": sam.detach().clone()}
    adam = [torch.optim.Adam([ram], lr=recipe["lr_ram"]), torch.optim.Adam([sam], lr=recipe["lr_sam"])]
    losses, rollout = [], 0
    while len(losses) < recipe["iterations"]:
        draws = Draws(SEED, rollout)
        noise = torch.Generator().manual_seed(draws.next())
        x = torch.cat([torch.randn(1, 4, HEIGHT, WIDTH, generator=noise) for _ in range(recipe["batch"])]).double()
        levels = sorted(draws.next() % (recipe["rollout_steps"] - 1) for _ in range(recipe["latents_per_rollout"]))
        rollout += 1
        model.scheduler.set_timesteps(recipe["rollout_steps"])
        times, step = model.scheduler.timesteps, 0
        for level in levels:
            with torch.no_grad():
                while step < level:
                    u = model.predict(x, times[step].item(), model.empty)
                    c = model.predict(x, times[step].item(), model.neutral, ram + sam)
                    x = model.scheduler.step(u + 3 * (c - u), times[step], x).prev_sample
                    step += 1
                t = times[level].item() + recipe["timestep_offset"]
                base = model.predict(x, t, model.base)
                target = base + recipe["target_guidance"] * (model.predict(x, t, model.toward) - base)
            resp = (model.predict(x, t, model.neutral, ram) - target).square().mean()
            adam[0].zero_grad()
            resp.backward()
            adam[0].step()
            with torch.no_grad():
                plain = model.predict(x, t, model.neutral)
            sem = (model.predict(x, t, model.neutral, ram.detach() + sam) - plain).square().mean()
            adam[1].zero_grad()
            (recipe["lambda"] * sem).backward()
            adam[1].step()
            losses.append(torch.stack([resp, sem]).detach())
    tensors = first | {"out.ram": ram, "out.sam": sam, "out.losses": torch.stack(losses)}
    metadata = {"checkpoint": checkpoint, "neutral": prompts[2], "seed": SEED, "height": 8 * HEIGHT,
                "width": 8 * WIDTH, "recipe": recipe}
    save_case(f"trainer_{name}", {k: v.float() for k, v in tensors.items()}, metadata)


def record(args):
    for task in TASKS:
        train(*task)
