"""Records runs that begin with a picture (image to image, inpainting), and Pillow's resizing."""

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

from common import generator, randn, save_case
from pipelines import BAD, BOAT, CAT, XL, load, plain_config

KARRAS = {"use_karras_sigmas": True}
#: Name, checkpoint, scheduler class (None: the checkpoint's own), its settings, the call. `picture` is the width and
#: height of the picture; `mask` that of the mask, if there is one. `nine`: a UNet that knows masks.
RECORDINGS = [
    ("sd1_ddim", "sd1", DDIMScheduler, {}, dict(prompt=[CAT], steps=5, strength=0.8)),
    (
        "sd1_euler_a",
        "sd1",
        EulerAncestralDiscreteScheduler,
        {},
        dict(prompt=[CAT, BOAT], steps=7, strength=0.6, seed=3, picture=(70, 50)),
    ),
    ("sd1_dpmpp_2m_karras", "sd1", DPMSolverMultistepScheduler, KARRAS, dict(prompt=[BOAT], negative=[BAD], steps=10, strength=0.7)),
    ("sd1_dpmpp_2m_leading", "sd1", DPMSolverMultistepScheduler, {"timestep_spacing": "leading"}, dict(prompt=[BOAT], steps=10, strength=0.3)),
    ("sd1_whole", "sd1", EulerDiscreteScheduler, {}, dict(prompt=[CAT], steps=3, strength=1.0, seed=8)),
    ("sd1_unipc", "sd1", UniPCMultistepScheduler, {}, dict(prompt=[BOAT], steps=8, strength=0.75)),
    ("sd1_lcm", "sd1", LCMScheduler, {}, dict(prompt=[CAT], steps=6, strength=0.5, guidance=1.0)),
    ("sd2_ddim", "sd2", None, {}, dict(prompt=[BOAT], negative=[BAD], steps=6, strength=0.55, picture=(23, 31))),
    # Seed 0 magnifies small differences forty times as much.
    ("sdxl_euler", "sdxl", None, {}, dict(prompt=[BOAT], steps=5, strength=0.7, guidance=5.0, seed=2)),
    ("sdxl_dpmpp_2m", "sdxl", DPMSolverMultistepScheduler, {}, dict(prompt=[CAT], steps=8, strength=0.5, guidance=5.0)),
    ("sd1_inpaint", "sd1", DDIMScheduler, {}, dict(prompt=[CAT], steps=4, strength=1.0, mask=(56, 40))),
    (
        "sd1_inpaint_euler_a",
        "sd1",
        EulerAncestralDiscreteScheduler,
        {},
        dict(prompt=[CAT, BOAT], negative=[BAD, ""], steps=4, strength=1.0, seed=4, mask=(30, 50), picture=(61, 47)),
    ),
    ("sd1_inpaint_unipc", "sd1", UniPCMultistepScheduler, {}, dict(prompt=[CAT], steps=6, strength=0.7, mask=(56, 40))),
    ("sd1_inpaint_lcm", "sd1", LCMScheduler, {}, dict(prompt=[CAT], steps=5, strength=0.8, mask=(56, 40), guidance=1.0)),
    ("sdxl_inpaint", "sdxl", None, {}, dict(prompt=[BOAT], steps=4, strength=0.9, guidance=5.0, mask=(56, 40))),
    ("sd1_nine", "sd1", DDIMScheduler, {}, dict(prompt=[CAT], steps=4, strength=1.0, mask=(56, 40), nine=True)),
    (
        "sd1_nine_euler_a",
        "sd1",
        EulerAncestralDiscreteScheduler,
        {},
        dict(prompt=[CAT, BOAT], steps=5, strength=0.6, seed=6, mask=(56, 40), nine=True),
    ),
    # TAESD's latents are no distribution, so that nothing is drawn for the picture.
    ("taesd", "taesd", EulerAncestralDiscreteScheduler, {}, dict(prompt=[CAT, BOAT], steps=5, strength=0.6, seed=2)),
    ("taesd_inpaint", "taesd", DDIMScheduler, {}, dict(prompt=[BOAT], steps=4, strength=0.9, mask=(56, 40), seed=5)),
    (
        "taesd_nine",
        "taesd",
        DDIMScheduler,
        {},
        dict(prompt=[CAT], steps=4, strength=1.0, seed=7, mask=(56, 40), nine=True),
    ),
]
WIDTH, HEIGHT = 56, 40


def picture(label, width, height):
    """A picture with smooth and sharp parts."""
    x, y = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    waves = np.stack([np.sin(9 * x + 2 * y), np.cos(7 * y - 3 * x), (x > y) * 1.4 - 0.7], -1)
    noise = randn(f"picture/{label}", height, width, 3).numpy()
    return Image.fromarray(np.uint8(np.clip(127.5 + 90 * waves + 25 * noise, 0, 255)))


def mask(width, height):
    """A grey ellipse whose edge passes through all levels, off the centre."""
    x, y = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    distance = np.hypot((x - 0.6) / 0.35, (y - 0.4) / 0.3)
    return Image.fromarray(np.uint8(np.clip(255 * (1.5 - distance), 0, 255)))


def with_nine_channels(unet):
    """Widens the UNet's first convolution as inpainting models have it; returns its weights."""
    old = unet.conv_in
    new = torch.nn.Conv2d(9, old.out_channels, 3, padding=1)
    new.weight.data = torch.cat([old.weight.data, 0.2 * randn("nine", old.out_channels, 5, 3, 3)], 1).half().float()
    new.bias.data = old.bias.data
    unet.conv_in = new
    unet.register_to_config(in_channels=9)
    return new.weight.data


def run(checkpoint, kind, settings, call):
    pipeline = load(checkpoint)
    tensors = {}
    if call.get("nine"):
        tensors["conv_in.weight"] = with_nine_channels(pipeline.unet).half()
    if kind:
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **settings)
    inpaints, xl = "mask" in call, checkpoint in XL
    kinds = {
        (False, False): StableDiffusionImg2ImgPipeline,
        (False, True): StableDiffusionXLImg2ImgPipeline,
        (True, False): StableDiffusionInpaintPipeline,
        (True, True): StableDiffusionXLInpaintPipeline,
    }
    extra = {} if xl else dict(safety_checker=None, requires_safety_checker=False, feature_extractor=None)
    parts = {k: v for k, v in pipeline.components.items() if k not in ("image_encoder", "feature_extractor", "safety_checker")}
    pipeline = kinds[inpaints, xl](**parts, **extra)
    pipeline.set_progress_bar_config(disable=True)
    size = call.get("picture", (WIDTH, HEIGHT))
    image = picture(f"{size}", *size)
    arguments = dict(image=[image] * len(call["prompt"]))
    tensors["image"] = torch.from_numpy(np.array(image))
    if inpaints:
        region = mask(*call["mask"])
        tensors["mask"] = torch.from_numpy(np.array(region))
        arguments = dict(image=[image] * len(call["prompt"]), mask_image=[region] * len(call["prompt"]))
    if inpaints or image.size != (WIDTH, HEIGHT):
        if not inpaints:
            # These pipelines have no size of their own: the processor resizes.
            resized = pipeline.image_processor.resize(image, HEIGHT, WIDTH)
            arguments["image"] = [resized] * len(call["prompt"])
        else:
            arguments |= dict(width=WIDTH, height=HEIGHT)
    seed = call.get("seed", 0)
    tensors["out.latents"] = pipeline(
        prompt=call["prompt"],
        negative_prompt=call.get("negative"),
        num_inference_steps=call["steps"],
        strength=call["strength"],
        guidance_scale=call.get("guidance", 7.5),
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(call["prompt"]))],
        output_type="latent",
        **arguments,
    ).images
    metadata = dict(
        checkpoint=checkpoint,
        prompt=call["prompt"],
        negative_prompt=call.get("negative"),
        seed=seed,
        steps=call["steps"],
        strength=call["strength"],
        guidance_scale=call.get("guidance", 7.5),
        scheduler=type(pipeline.scheduler).__name__,
        scheduler_config=plain_config(pipeline.scheduler),
    )
    return tensors, metadata


def resizing():
    """Pillow's Lanczos filter, which shrinks and enlarges."""
    image = picture("resize", 23, 17)
    sizes = [(56, 40), (9, 30), (11, 5), (23, 6), (64, 17)]
    tensors = {"image": torch.from_numpy(np.array(image))}
    for size in sizes:
        resized = np.array(image.resize(size, Image.Resampling.LANCZOS))
        tensors[f"{size[0]}x{size[1]}"] = torch.from_numpy(resized)
    tensors["lightness"] = torch.from_numpy(np.array(image.convert("L")))
    save_case("resize", tensors)


@torch.no_grad()
def record(args):
    resizing()
    for name, checkpoint, kind, settings, call in RECORDINGS:
        tensors, metadata = run(checkpoint, kind, settings, call)
        save_case(f"init_{name}", tensors, metadata)
        latents = tensors["out.latents"]
        print(f"  {name}: latents {tuple(latents.shape)} std {latents.std():.2f}, max {latents.abs().max():.1f}")
