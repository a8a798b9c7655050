"""Records whole pipelines: from prompt and seed to latents and image."""

import contextlib
import inspect
import json
import math

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

from common import CHECKPOINTS, VARIANTS, save_case

CAT = "a photo of a cat on the table"
BOAT = "Oil painting of a small boat, in the harbour at night!"
BAD = "blurry, low quality"
#: Checkpoints with StableDiffusionXLPipeline.
XL = ("sdxl", "turbo")

#: Name, checkpoint, scheduler class (None: the checkpoint's own), its settings, the call.
RECORDINGS = [
    ("sd1_pndm", "sd1", None, {}, dict(prompt=[CAT], steps=5)),
    ("sd1_pndm_negative", "sd1", None, {}, dict(prompt=[BOAT], negative=[BAD], steps=4, seed=42)),
    ("sd1_ddim", "sd1", DDIMScheduler, {}, dict(prompt=[CAT], steps=4, height=64, width=48)),
    (
        "sd1_ddim_batch",
        "sd1",
        DDIMScheduler,
        {},
        dict(prompt=[CAT, BOAT], negative=["", BAD], steps=4, seed=7),
    ),
    (
        "sd1_euler_a",
        "sd1",
        EulerAncestralDiscreteScheduler,
        {},
        dict(prompt=[CAT, CAT], steps=4, seed=2**32 + 5),
    ),
    (
        "sd1_dpmpp_2m_karras",
        "sd1",
        DPMSolverMultistepScheduler,
        {"use_karras_sigmas": True},
        dict(prompt=[BOAT], negative=[BAD], steps=6),
    ),
    ("sd1_unipc", "sd1", UniPCMultistepScheduler, {}, dict(prompt=[BOAT], steps=6, guidance=5.0)),
    ("sd1_lcm", "sd1", LCMScheduler, {}, dict(prompt=[CAT], steps=4, guidance=1.0)),
    ("sd2_ddim", "sd2", None, {}, dict(prompt=[BOAT], negative=[BAD], steps=5)),
    (
        "sd2_ddim_zsnr",
        "sd2",
        DDIMScheduler,
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        dict(prompt=[CAT], steps=4, seed=3, guidance=2.5),
    ),
    (
        "sd2_ddim_zsnr_rescale",
        "sd2",
        DDIMScheduler,
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        dict(prompt=[CAT], steps=4, seed=3, guidance=4.0, guidance_rescale=0.7),
    ),
    ("sdxl_euler", "sdxl", None, {}, dict(prompt=[BOAT], steps=4, guidance=5.0)),
    (
        "sdxl_euler_negative",
        "sdxl",
        None,
        {},
        dict(prompt=[CAT, BOAT], negative=[BAD, ""], steps=3, guidance=5.0, seed=9),
    ),
    (
        "sdxl_sizes",
        "sdxl",
        DPMSolverMultistepScheduler,
        {"use_karras_sigmas": True},
        dict(prompt=[CAT], negative=[BAD], steps=4, guidance=5.0, seed=2, height=72, width=40,
             sizes=dict(original_size=(48, 200), crops_coords_top_left=(24, 8))),
    ),
    ("turbo_euler_a", "turbo", None, {}, dict(prompt=[CAT, BOAT], steps=2, guidance=0.0, seed=5, height=56, width=24)),
    (
        "turbo_lightning",
        "turbo",
        EulerDiscreteScheduler,
        {},
        dict(prompt=[BOAT], steps=4, guidance=1.0, seed=1, sizes=dict(original_size=(512, 768))),
    ),
    (
        "sd1_heun",
        "sd1",
        HeunDiscreteScheduler,
        {"use_beta_sigmas": True},
        dict(prompt=[BOAT], negative=[BAD], steps=4, guidance_rescale=0.6),
    ),
    ("sd1_dpm2_a", "sd1", KDPM2AncestralDiscreteScheduler, {}, dict(prompt=[CAT], steps=4, seed=6)),
    (
        "sd1_dpmpp_2m_sde",
        "sd1",
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
        dict(prompt=[BOAT], steps=5, seed=11),
    ),
    ("sd2_ddim_eta", "sd2", DDIMScheduler, {}, dict(prompt=[CAT], steps=4, seed=4, guidance=3.0, eta=0.5)),
    ("sdxl_tcd", "sdxl", TCDScheduler, {}, dict(prompt=[BOAT], steps=3, guidance=1.0, seed=8, eta=0.6)),
    # Neither the offset nor the clipping that StableDiffusionPipeline would force.
    ("turbo_ddim", "turbo", DDIMScheduler, {"timestep_spacing": "leading"}, dict(prompt=[CAT], steps=3, guidance=3.0, seed=1)),
    # The UNet reads the guidance scale, and negative prompts have no effect.
    ("lcm", "lcm", LCMScheduler, {}, dict(prompt=[CAT, BOAT], steps=4, guidance=8.5, seed=3)),
    ("taesd", "taesd", None, {}, dict(prompt=[CAT, BOAT], steps=3, seed=12, height=56, width=40)),
]


def load(checkpoint):
    """The checkpoint's pipeline in fp32, without a progress bar. `lcm` is `sd1` with another UNet, `taesd` with another
    VAE."""
    if checkpoint == "lcm":
        pipeline = load("sd1")
        pipeline.unet = UNet2DConditionModel.from_pretrained(CHECKPOINTS / "lcm/unet")
        return pipeline
    if checkpoint == "taesd":
        pipeline = load("sd1")
        pipeline.vae = AutoencoderTiny.from_pretrained(CHECKPOINTS / "taesd/vae", torch_dtype=torch.float32)
        return pipeline
    pipeline = DiffusionPipeline.from_pretrained(
        CHECKPOINTS / checkpoint,
        torch_dtype=torch.float32,
        variant=VARIANTS.get(checkpoint),
        **({"add_watermarker": False} if checkpoint in XL else {"safety_checker": None}),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def step_noise(scheduler):
    """Collects the noise that the scheduler's steps draw."""
    module, drawn = inspect.getmodule(type(scheduler)), []
    original = getattr(module, "randn_tensor", None)

    def draw(*args, **kwargs):
        drawn.append(original(*args, **kwargs))
        return drawn[-1]

    if original:
        module.randn_tensor = draw
    try:
        yield drawn
    finally:
        if original:
            module.randn_tensor = original


def run(
    pipeline,
    prompt,
    steps,
    negative=None,
    seed=0,
    guidance=7.5,
    guidance_rescale=0.0,
    eta=0.0,
    height=40,
    width=56,
    sizes={},
    perturb=0.0,
):
    """One run; image i draws from a generator of its own, seeded seed + i.

    Returns the recorded tensors and the settings. `perturb` scales the initial noise by
    1 + perturb, to measure how a run magnifies small differences.
    """
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompt))]
    # What the pipeline draws itself first of all, drawn here to be kept.
    shape = (1, 4, height // 8, width // 8)
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    noise = noise * (1 + perturb)
    after, timesteps = [], []

    def remember(pipeline, index, timestep, state):
        after.append(state["latents"].clone())
        timesteps.append(float(timestep))
        return {}

    with step_noise(pipeline.scheduler) as drawn:
        latents = pipeline(
            prompt=prompt,
            negative_prompt=negative,
            num_inference_steps=steps,
            guidance_scale=guidance,
            guidance_rescale=guidance_rescale,
            eta=eta,
            height=height,
            width=width,
            generator=generators,
            latents=noise,
            output_type="latent",
            **sizes,
            callback_on_step_end=remember,
        ).images
    vae = pipeline.vae
    tensors = {
        "initial_latents": noise,
        "timesteps": torch.tensor(timesteps),
        "out.step_latents": torch.stack(after),
        "out.latents": latents,
        "out.image": vae.decode(latents / vae.config.scaling_factor).sample,
    }
    if drawn:
        tensors["step_noise"] = torch.stack(drawn)
    settings = dict(
        prompt=prompt,
        negative_prompt=negative,
        seed=seed,
        steps=steps,
        guidance_scale=guidance,
        guidance_rescale=guidance_rescale,
        eta=eta,
        height=height,
        width=width,
        **sizes,
    )
    return tensors, settings


def check_noise(pipeline, call, tensors):
    """The same run with the pipeline drawing its own noise must end the same."""
    size = dict(height=call.get("height", 40), width=call.get("width", 56))
    seeds = range(call.get("seed", 0), call.get("seed", 0) + len(call["prompt"]))
    latents = pipeline(
        prompt=call["prompt"],
        negative_prompt=call.get("negative"),
        num_inference_steps=call["steps"],
        guidance_scale=call.get("guidance", 7.5),
        guidance_rescale=call.get("guidance_rescale", 0.0),
        eta=call.get("eta", 0.0),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **call.get("sizes", {}),
        **size,
    ).images
    torch.testing.assert_close(latents, tensors["out.latents"], rtol=0, atol=0)


def plain_config(scheduler):
    """The scheduler's settings as JSON keeps them, without diffusers' own bookkeeping."""
    names = inspect.signature(type(scheduler)).parameters
    config = {name: scheduler.config[name] for name in names if name in scheduler.config}
    # JSON has no infinity; the one setting that is infinite (no clipping) is left out.
    config = {name: value for name, value in config.items() if value != -math.inf}
    return json.loads(json.dumps(config, allow_nan=False))


@torch.no_grad()
def record(args):
    for name, checkpoint, kind, settings, call in RECORDINGS:
        pipeline = load(checkpoint)
        if kind:
            pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **settings)
        tensors, metadata = run(pipeline, **call)
        check_noise(pipeline, call, tensors)
        near = run(pipeline, **call, perturb=1e-4)[0]["out.latents"]
        growth = (near - tensors["out.latents"]).norm() / tensors["out.latents"].norm() / 1e-4
        metadata |= {
            "checkpoint": checkpoint,
            "scheduler": type(pipeline.scheduler).__name__,
            "scheduler_config": plain_config(pipeline.scheduler),
            "scheduler_overrides": settings,
        }
        save_case(f"pipeline_{name}", tensors, metadata)
        latents = tensors["out.latents"]
        print(
            f"  {name}: latents std {latents.std():.2f}, max {latents.abs().max():.1f}, "
            f"small differences grow {growth:.2f} times"
        )
