"""Records what diffusers' schedulers do: cases/scheduler_<sampler>.safetensors.

All cases of a file share the first sample (unit noise), the
model outputs and the noise; each has its timesteps, and the model's input and the next sample of every step. The
configs, choices and step counts are in the metadata. diffusers runs in float64 as far as it lets itself; its
coefficients are float32.
"""

import diffusers
import torch
from diffusers.schedulers import (
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_lcm,
)

from common import randn, save_case

SHAPE = (1, 4, 2, 3)
CALLS = 52

LATENT = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD15 = {"_class_name": "PNDMScheduler", **LATENT, "clip_sample": False, "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None}
SD21V = {"_class_name": "DDIMScheduler", **LATENT, "clip_sample": False, "set_alpha_to_one": False,
         "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "prediction_type": "v_prediction"}
SDXL = {"_class_name": "EulerDiscreteScheduler", **LATENT, "clip_sample": False, "interpolation_type": "linear",
        "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True,
        "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False}
ZERO_SNR = {**SD21V, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
LCM = {"_class_name": "LCMScheduler", **LATENT, "clip_sample": False, "clip_sample_range": 1.0,
       "dynamic_thresholding_ratio": 0.995, "original_inference_steps": 50, "prediction_type": "epsilon",
       "rescale_betas_zero_snr": False, "sample_max_value": 1.0, "set_alpha_to_one": True, "steps_offset": 1,
       "thresholding": False, "timestep_scaling": 10.0, "timestep_spacing": "leading", "trained_betas": None}
WHOLE = ["leading", "trailing", "linspace"]
SIGMAS = WHOLE + ["karras", "exponential"]


def grid(spacings):
    """The cases of every sampler: (config, spacing or None, steps)."""
    for steps in (1, 2, 3, 10, 21, 50):
        yield SD15, None, steps
    for spacing in spacings:
        yield SD15, spacing, 4
        yield SD15, spacing, 13
        yield SD21V, spacing, 17
    yield SD21V, None, 20
    yield SDXL, None, 10
    yield SDXL, None, 30


def zero_snr(spacings):
    for spacing in [None, *spacings]:
        yield ZERO_SNR, spacing, 9


def with_config(**fields):
    return {**SD15, "_class_name": None, **fields}


def dpm_and_unipc():
    yield with_config(solver_order=1), None, 6
    yield with_config(solver_order=3), None, 12
    yield with_config(solver_order=3), "karras", 20
    yield with_config(lower_order_final=False, final_sigmas_type="sigma_min"), None, 7
    yield with_config(final_sigmas_type="sigma_min"), None, 8
    yield with_config(final_sigmas_type="sigma_min"), "karras", 8
    yield with_config(final_sigmas_type="sigma_min", sigma_min=0.05), "karras", 8
    yield with_config(final_sigmas_type="sigma_min", solver_order=3), None, 14
    yield with_config(final_sigmas_type="sigma_min", solver_order=3), None, 15
    yield with_config(use_karras_sigmas=True), None, 6
    yield with_config(use_exponential_sigmas=True, sigma_min=0.05, sigma_max=12.0), None, 6
    yield with_config(prediction_type="sample"), None, 6
    yield with_config(beta_schedule="squaredcos_cap_v2"), "karras", 6


EXTRA = {
    "DDIMScheduler": [
        (with_config(clip_sample=True), None, 8),
        (with_config(clip_sample=True, clip_sample_range=2.5, prediction_type="v_prediction"), "trailing", 8),
        (with_config(prediction_type="sample", set_alpha_to_one=True), None, 8),
        (with_config(beta_schedule="linear", beta_end=0.02), None, 5),
        (with_config(beta_schedule="squaredcos_cap_v2"), None, 5),
        ({"_class_name": "DDIMScheduler"}, None, 5),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 8, "steps_offset": 0,
          "trained_betas": [0.1, 0.12, 0.14, 0.16, 0.2, 0.24, 0.3, 0.4]}, None, 4),
    ],
    "PNDMScheduler": [
        (with_config(set_alpha_to_one=True), None, 8),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, None, 5),
    ],
    "EulerDiscreteScheduler": [
        (with_config(interpolation_type="log_linear"), None, 8),
        (with_config(interpolation_type="log_linear"), "karras", 8),
        (with_config(final_sigmas_type="sigma_min"), None, 8),
        (with_config(timestep_type="continuous", prediction_type="v_prediction"), "karras", 8),
        (with_config(sigma_min=0.002, sigma_max=80.0), "exponential", 8),
        (with_config(use_karras_sigmas=True), None, 6),
        (with_config(prediction_type="sample"), None, 6),
        (with_config(beta_schedule="squaredcos_cap_v2"), "karras", 6),
        ({"_class_name": "EulerDiscreteScheduler"}, None, 5),
    ],
    "EulerAncestralDiscreteScheduler": [({"_class_name": "EulerAncestralDiscreteScheduler"}, None, 5)],
    "DPMSolverMultistepScheduler": [
        *dpm_and_unipc(),
        (with_config(lower_order_final=False), "karras", 7),
        (with_config(solver_type="heun"), None, 12),
        (with_config(solver_type="heun"), "karras", 17),
        (with_config(euler_at_final=True, final_sigmas_type="sigma_min"), None, 18),
        (with_config(lambda_min_clipped=-5.1, beta_schedule="squaredcos_cap_v2"), None, 8),
        (with_config(lambda_min_clipped=-2.0), "trailing", 8),
        (with_config(solver_type="logrho"), None, 6),
    ],
    "UniPCMultistepScheduler": [
        *dpm_and_unipc(),
        (with_config(solver_type="bh1", final_sigmas_type="sigma_min"), None, 12),
        (with_config(solver_type="bh1", final_sigmas_type="sigma_min", solver_order=3), "karras", 16),
        (with_config(predict_x0=False, final_sigmas_type="sigma_min"), None, 12),
        (with_config(predict_x0=False, final_sigmas_type="sigma_min", prediction_type="v_prediction"), None, 12),
        (with_config(disable_corrector=[0, 2]), None, 8),
    ],
    "LCMScheduler": [
        *((LCM, None, steps) for steps in (1, 2, 4, 8, 50)),
        *((config, None, 4) for config in (SD15, SD21V, SDXL)),
        ({**LCM, "original_inference_steps": 100, "clip_sample": True, "timestep_scaling": 0.01}, None, 7),
        ({**LCM, "prediction_type": "sample"}, None, 3),
        (ZERO_SNR, None, 4),
        ({"_class_name": "EulerDiscreteScheduler"}, None, 4),
    ],
}

SAMPLERS = {
    "ddim": ("DDIMScheduler", WHOLE, WHOLE),
    "pndm": ("PNDMScheduler", WHOLE, []),
    "euler": ("EulerDiscreteScheduler", SIGMAS, SIGMAS),
    "euler_a": ("EulerAncestralDiscreteScheduler", SIGMAS, WHOLE),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", SIGMAS, SIGMAS),
    "unipc": ("UniPCMultistepScheduler", SIGMAS, SIGMAS),
    "lcm": ("LCMScheduler", None, None),
}


def cases(class_name, spacings, zero_snr_spacings):
    if spacings is not None:
        yield from grid(spacings)
    if zero_snr_spacings:
        yield from zero_snr(zero_snr_spacings)
    for config, spacing, steps in EXTRA[class_name]:
        yield {**config, "_class_name": config["_class_name"] or class_name}, spacing, steps


def scheduler(class_name, config, spacing, steps):
    own = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    override = {}
    if spacing in WHOLE:
        override = {"timestep_spacing": spacing, "use_karras_sigmas": False, "use_exponential_sigmas": False}
    elif spacing is not None:
        override = {"use_karras_sigmas": spacing == "karras", "use_exponential_sigmas": spacing == "exponential"}
    chosen = getattr(diffusers, class_name).from_config(own.config, **override)
    chosen.set_timesteps(steps)
    if class_name == "EulerAncestralDiscreteScheduler" and spacing in ("karras", "exponential"):
        # Its class has no such sigmas, and its steps do not care where the sigmas come from.
        euler = scheduler("EulerDiscreteScheduler", config, spacing, steps)
        chosen.timesteps, chosen.sigmas = euler.timesteps, euler.sigmas
    return chosen


def record(args):
    for file, (class_name, spacings, zero_snr_spacings) in SAMPLERS.items():
        out = randn(f"{file}.out", CALLS, *SHAPE)
        noise = randn(f"{file}.noise", CALLS, *SHAPE)
        sample = randn(f"{file}.sample", *SHAPE)
        tensors = {"sample": sample, "out": out, "noise": noise}
        described = []
        for index, (config, spacing, steps) in enumerate(cases(class_name, spacings, zero_snr_spacings)):
            chosen = scheduler(class_name, config, spacing, steps)
            if hasattr(chosen, "set_begin_index"):
                # Left to itself, a scheduler whose first two timesteps are equal starts at the second.
                chosen.set_begin_index(0)
            call = 0
            for module in (scheduling_euler_ancestral_discrete, scheduling_euler_discrete, scheduling_lcm):
                module.randn_tensor = lambda *_, **__: noise[call].double()
            x = sample.double() * chosen.init_noise_sigma
            inputs, samples = [], []
            for call, timestep in enumerate(chosen.timesteps):
                inputs.append(chosen.scale_model_input(x, timestep))
                x = chosen.step(out[call].double(), timestep, x, return_dict=False)[0]
                samples.append(x)
            recorded = {
                "timesteps": chosen.timesteps.float(),
                "model_input": torch.stack(inputs).float(),
                "prev_sample": torch.stack(samples).float(),
            }
            tensors |= {f"{index}.{name}": tensor for name, tensor in recorded.items()}
            described.append({"sampler": class_name, "config": config, "spacing": spacing,
                              "steps": steps, "init_noise_sigma": float(chosen.init_noise_sigma)})
        save_case(f"scheduler_{file}", tensors, {"cases": described})
