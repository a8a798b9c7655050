"""Records pipelines with concepts: a hook adds them to the conditional half of the middle block's output."""

import torch
from diffusers import DDIMScheduler

import pipelines
from common import randn, save_case

HEIGHT, WIDTH, STEPS, SEED = 128, 96, 2, 11
PROMPT = "a photo of a cat"
#: For each image its concepts and their weights.
IMAGES = [[("a", 0.8), ("b", -0.5)], [("c", 1.2)]]
#: Checkpoint, scheduler (None: its own), guidance.
CASES = [("sd1", DDIMScheduler, 7.5), ("sdxl", None, 5.0)]


@torch.no_grad()
def record_case(checkpoint, kind, guidance):
    pipeline = pipelines.load(checkpoint)
    if kind:
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    unet, first, mids = pipeline.unet, {}, []

    def shapes(module, args, out):
        mids.append(out.shape[1:])

    handle = unet.mid_block.register_forward_hook(shapes)
    call = dict(
        prompt=[PROMPT] * len(IMAGES), steps=STEPS, seed=SEED, guidance=guidance, height=HEIGHT, width=WIDTH
    )
    plain = pipelines.run(pipeline, **call)[0]["out.latents"]
    handle.remove()
    names = sorted({name for image in IMAGES for name, _ in image})
    tensors = {f"{part}.{name}": randn(f"concepts/{part}/{name}", *mids[0]) for name in names for part in ("ram", "sam")}
    shift = torch.stack([
        sum(weight * (tensors[f"ram.{name}"] + tensors[f"sam.{name}"]) for name, weight in image) for image in IMAGES
    ])

    def add(module, args, out):
        without, with_prompt = out.chunk(2)
        return torch.cat([without, with_prompt + shift])

    def remember(module, args, kwargs, out):
        if not first:
            first["sample"], first["timestep"] = args[0], args[1].reshape(1).float()
            first["encoder_hidden_states"], first["out.sample"] = kwargs["encoder_hidden_states"], out[0]
            first.update(kwargs["added_cond_kwargs"] or {})

    unet.mid_block.register_forward_hook(add)
    unet.register_forward_hook(remember, with_kwargs=True)
    recorded, settings = pipelines.run(pipeline, **call)
    latents = recorded["out.latents"]
    print(f"  the concepts move the latents by {(latents - plain).norm() / plain.norm():.2f} of their norm")
    settings |= {
        "checkpoint": checkpoint,
        "images": IMAGES,
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_config": pipelines.plain_config(pipeline.scheduler),
    }
    save_case(f"concepts_{checkpoint}", tensors | first | {"out.latents": latents}, settings)


def record(args):
    for case in CASES:
        record_case(*case)
