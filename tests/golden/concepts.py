"""Records pipelines with concepts: a hook adds them to the conditional half of the middle block's output."""

import torch
from diffusers import DDIMScheduler

import pipelines
from common import randn, save_case

HEIGHT, WIDTH, SEED = 128, 96, 11
PROMPT = "a photo of a cat"
#: For each image its concepts and their weights.
IMAGES = [[("a", 0.8), ("b", -0.5)], [("c", 1.2)]]
#: Name, checkpoint, scheduler (None: its own), steps, guidance, and for each image the timestep below which nothing is
#: added.
CASES = [
    ("sd1", "sd1", DDIMScheduler, 2, 7.5, [0, 0]),
    ("sdxl", "sdxl", None, 2, 5.0, [0, 0]),
    ("until_sd1", "sd1", DDIMScheduler, 4, 7.5, [700, 300]),
]


@torch.no_grad()
def record_case(name, checkpoint, kind, steps, guidance, until):
    pipeline = pipelines.load(checkpoint)
    if kind:
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    unet, first, mids, timesteps = pipeline.unet, {}, [], []

    def shapes(module, args, out):
        mids.append(out.shape[1:])

    handle = unet.mid_block.register_forward_hook(shapes)
    call = dict(
        prompt=[PROMPT] * len(IMAGES), steps=steps, seed=SEED, guidance=guidance, height=HEIGHT, width=WIDTH
    )
    plain = pipelines.run(pipeline, **call)[0]["out.latents"]
    handle.remove()
    names = sorted({name for image in IMAGES for name, _ in image})
    tensors = {f"{part}.{name}": randn(f"concepts/{part}/{name}", *mids[0]) for name in names for part in ("ram", "sam")}
    shift = torch.stack([
        sum(weight * (tensors[f"ram.{name}"] + tensors[f"sam.{name}"]) for name, weight in image) for image in IMAGES
    ])

    def see(module, args, kwargs):
        timesteps.append(float(args[1]))

    def add(module, args, out):
        without, with_prompt = out.chunk(2)
        acts = torch.tensor([timesteps[-1] >= end for end in until]).reshape(-1, 1, 1, 1)
        return torch.cat([without, with_prompt + shift * acts])

    def remember(module, args, kwargs, out):
        if not first:
            first["sample"], first["timestep"] = args[0], args[1].reshape(1).float()
            first["encoder_hidden_states"], first["out.sample"] = kwargs["encoder_hidden_states"], out[0]
            first.update(kwargs["added_cond_kwargs"] or {})

    unet.register_forward_pre_hook(see, with_kwargs=True)
    unet.mid_block.register_forward_hook(add)
    unet.register_forward_hook(remember, with_kwargs=True)
    recorded, settings = pipelines.run(pipeline, **call)
    latents = recorded["out.latents"]
    print(f"  the concepts move the latents by {(latents - plain).norm() / plain.norm():.2f} of their norm")
    settings |= {
        "checkpoint": checkpoint,
        "images": IMAGES,
        "until": until,
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_config": pipelines.plain_config(pipeline.scheduler),
    }
    save_case(f"concepts_{name}", tensors | first | {"out.latents": latents}, settings)


def record(args):
    for case in CASES:
        record_case(*case)
