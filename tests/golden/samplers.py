"""Records what diffusers' newer schedulers and k-diffusion's samplers do: cases/sampler_<name>.safetensors.

The files are as those of schedulers.py, with one sampler named for each case, and with the numbers that tune it. Both
libraries run in float64 as far as they let themselves.
"""

import inspect
import itertools

import diffusers
import k_diffusion
import numpy as np
import torch
from diffusers.schedulers import (
    scheduling_ddim,
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
    scheduling_dpmsolver_sde,
    scheduling_k_dpm_2_ancestral_discrete,
    scheduling_tcd,
)
from k_diffusion.external import DiscreteSchedule

from common import randn, save_case
from schedulers import SD15, SD21V, SDXL, ZERO_SNR, with_config

SHAPE = (1, 1, 2, 2)
CALLS = 60
NOISY = (scheduling_ddim, scheduling_ddpm, scheduling_dpmsolver_multistep, scheduling_k_dpm_2_ancestral_discrete,
         scheduling_tcd)
WHOLE = ["leading", "trailing", "linspace"]
FLAGS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas",
         "lu": "use_lu_lambdas"}


def grid(spacings, zero_snr=True):
    for steps in (1, 2, 3, 10):
        yield SD15, None, steps
    for spacing, config in zip(spacings, itertools.cycle((SDXL, SD21V))):
        yield config, spacing, 5
    if zero_snr:
        yield ZERO_SNR, None, 5


SIGMAS = [*WHOLE, "karras", "exponential", "beta"]
SDE = {"algorithm_type": "sde-dpmsolver++"}
#: File, sampler, its class, its cases: (config, spacing, steps, tuning or nothing).
DIFFUSERS = {
    "ddpm": ("DDPM", "DDPMScheduler", [
        *grid(WHOLE, False),
        (ZERO_SNR, "trailing", 5),
        (with_config(clip_sample=True), None, 6),
        (with_config(variance_type="fixed_large"), None, 6),
        (with_config(variance_type="fixed_small_log"), "linspace", 6),
        ({"_class_name": "DDPMScheduler"}, None, 4),
    ]),
    "ddim_eta": ("DDIM", "DDIMScheduler", [
        *((config, spacing, 6, {"eta": eta}) for eta in (0.3, 1.0) for config, spacing in
          ((SD15, None), (SD15, "trailing"), (SD21V, "linspace"))),
        (ZERO_SNR, "trailing", 6, {"eta": 0.8}),
        (with_config(clip_sample=True, set_alpha_to_one=True), None, 6, {"eta": 0.5}),
    ]),
    "tcd": ("TCD", "TCDScheduler", [
        *((SD15, None, steps) for steps in (1, 2, 4, 8)),
        *((SD15, None, 5, {"eta": eta}) for eta in (0.0, 0.1, 0.55, 1.0)),
        (SD21V, None, 4),
        (SDXL, None, 4, {"eta": 1.0}),
        (with_config(original_inference_steps=100, prediction_type="sample"), None, 3),
        ({"_class_name": "TCDScheduler"}, None, 4),
    ]),
    "heun": ("Heun", "HeunDiscreteScheduler", [
        *grid(SIGMAS),
        (with_config(prediction_type="sample"), "karras", 5),
        ({"_class_name": "HeunDiscreteScheduler"}, None, 4),
        ({"_class_name": "HeunDiscreteScheduler", "use_beta_sigmas": True}, None, 4),
    ]),
    "lms": ("LMS", "LMSDiscreteScheduler", [*grid(SIGMAS), ({"_class_name": "LMSDiscreteScheduler"}, None, 6)]),
    "dpm2": ("DPM2", "KDPM2DiscreteScheduler", [*grid(SIGMAS), ({"_class_name": "KDPM2DiscreteScheduler"}, None, 4)]),
    "dpm2_a": ("DPM2 a", "KDPM2AncestralDiscreteScheduler",
               # In long steps, and from a level without signal, diffusers' fp32 loses the sigma in the middle.
               [*(case for case in grid(SIGMAS, False) if case[2] != 2),
                ({"_class_name": "KDPM2AncestralDiscreteScheduler"}, None, 4)]),
    "dpmpp_sde": ("DPM++ SDE", "DPMSolverSDEScheduler",
                  [*grid(SIGMAS), ({"_class_name": "DPMSolverSDEScheduler"}, None, 4)]),
    "dpmpp_2m_sde": ("DPM++ 2M SDE", "DPMSolverMultistepScheduler", [
        *grid([*SIGMAS, "lu"]),
        (with_config(solver_type="heun"), None, 12),
        (with_config(solver_order=1), "karras", 6),
        (with_config(euler_at_final=True, final_sigmas_type="sigma_min"), None, 18),
        ({"_class_name": "DPMSolverMultistepScheduler", **SDE, "use_lu_lambdas": True}, None, 6),
    ]),
    "singlestep": ("DPM++ 2S", "DPMSolverSinglestepScheduler", [
        *grid(["karras", "exponential", "beta"], False),
        *((with_config(solver_order=3, solver_type=kind), "karras", steps)
          for kind in ("midpoint", "heun") for steps in (6, 7, 8)),
        *((with_config(solver_order=order, final_sigmas_type="sigma_min", solver_type="heun"), None, 6)
          for order in (1, 2, 3)),
        (with_config(solver_order=3, final_sigmas_type="sigma_min"), None, 7),
        ({"_class_name": "DPMSolverSinglestepScheduler"}, None, 5),
    ]),
    "beta": ("Euler", "EulerDiscreteScheduler", [(SD15, "beta", 7), (SDXL, "beta", 10), (SDXL, "beta", 1)]),
    "beta_2m": ("DPM++ 2M", "DPMSolverMultistepScheduler", [(SD15, "beta", 7), (SDXL, "lu", 9)]),
    "beta_unipc": ("UniPC", "UniPCMultistepScheduler", [(SDXL, "beta", 7)]),
}


def scheduler(class_name, config, spacing, steps):
    own = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    override = {flag: False for flag in FLAGS.values()} if spacing else {}
    if spacing in WHOLE:
        override["timestep_spacing"] = spacing
    elif spacing:
        override[FLAGS[spacing]] = True
    # DPMSolverMultistepScheduler knows which of its two samplers it is by this field alone.
    override |= {key: config[key] for key in SDE if key in config}
    chosen = getattr(diffusers, class_name).from_config(own.config, **override)
    if config.get("rescale_betas_zero_snr") and class_name not in ("DDIMScheduler", "DDPMScheduler"):
        # Most of these classes have no such setting, and their steps do not care where the levels come from.
        chosen.alphas_cumprod = diffusers.EulerDiscreteScheduler.from_config(own.config).alphas_cumprod
    chosen.set_timesteps(steps)
    return chosen


def diffusers_case(class_name, case, tensors):
    config, spacing, steps, tuning = (*case, {})[:4]
    chosen = scheduler(class_name, config, spacing, steps)
    if hasattr(chosen, "set_begin_index"):
        chosen.set_begin_index(0)
    call = 0
    noise = lambda *_, **__: tensors["noise"][call].double()
    for module in NOISY:
        module.randn_tensor = noise
    scheduling_dpmsolver_sde.BrownianTreeNoiseSampler = lambda *_: noise
    x = tensors["sample"].double() * chosen.init_noise_sigma
    inputs, samples = [], []
    for call, timestep in enumerate(chosen.timesteps):
        inputs.append(chosen.scale_model_input(x, timestep))
        x = chosen.step(tensors["out"][call].double(), timestep, x, return_dict=False, **tuning)[0]
        samples.append(x)
    recorded = {"timesteps": chosen.timesteps, "model_input": torch.stack(inputs), "prev_sample": torch.stack(samples)}
    return recorded, float(chosen.init_noise_sigma)


class Table:
    """k-diffusion's sigmas of a config's training."""

    def __init__(self, config):
        base = diffusers.EulerDiscreteScheduler.from_config(dict(config))
        alphas = base.alphas_cumprod.double()
        self.schedule = DiscreteSchedule(((1 - alphas) / alphas) ** 0.5, quantize=False)
        self.min, self.max = float(self.schedule.sigma_min), float(self.schedule.sigma_max)

    def sigma(self, t):
        return float(self.schedule.t_to_sigma(torch.tensor(t, dtype=torch.float64)))

    def timestep(self, sigma):
        return float(self.schedule.sigma_to_t(torch.tensor(sigma, dtype=torch.float64)))


AYS = {
    False: [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029],
    True: [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029],
}


def sigmas(config, spacing, n, xl):
    """The sigmas of a spacing as A1111 and ComfyUI define it, without the zero at the end."""
    table = Table(config)
    if spacing == "ays":
        points = np.interp(np.linspace(0, 1, n + 1), np.linspace(0, 1, 11), np.log(AYS[xl]))
        return list(np.exp(points)[:-1])
    if spacing == "kl_optimal":
        ramp = np.arange(n) / max(n - 1, 1)
        return list(np.tan(ramp * np.arctan(table.min) + (1 - ramp) * np.arctan(table.max)))
    if spacing == "sgm_uniform":
        return [table.sigma(t) for t in np.linspace(999, 0, n + 1)[:-1]]
    if spacing == "simple":
        return [table.sigma(999.0 - int(i * 1000 / n)) for i in range(n)]
    if spacing == "karras":
        # As k_diffusion.sampling.get_sigmas_karras, which computes in float32.
        ramp = np.linspace(0, 1, n)
        return list((table.max ** (1 / 7) + ramp * (table.min ** (1 / 7) - table.max ** (1 / 7))) ** 7)
    raise ValueError(spacing)


S_CHURN = {"s_churn": 3.0, "s_noise": 1.01}
WINDOW = {"s_churn": 30.0, "s_tmin": 0.4, "s_tmax": 8.0}
TUNED = ({}, {"eta": 0.0}, {"eta": 0.6, "s_noise": 0.9})
#: Function, sampler, cases: (config, spacing, steps, tuning, SDXL).
K_DIFFUSION = [
    ("sample_euler", "Euler", [
        *((SD15, spacing, steps, {}, False)
          for spacing in ("ays", "kl_optimal", "sgm_uniform", "simple") for steps in (1, 4, 10, 13)),
        (SDXL, "ays", 7, {}, True),
        (SD21V, "sgm_uniform", 6, {}, False),
        *((config, spacing, 6, tuning, False) for config in (SD15, SD21V)
          for spacing in ("karras", "sgm_uniform") for tuning in (S_CHURN, WINDOW)),
    ]),
    ("sample_euler_ancestral", "Euler a", [
        *((SD15, "karras", 6, tuning, False) for tuning in TUNED[1:])]),
    ("sample_heun", "Heun", [
        *((config, "karras", 5, tuning, False) for config in (SD15, SD21V) for tuning in (S_CHURN, WINDOW))]),
    ("sample_lms", "LMS", [(SD15, "sgm_uniform", 9, {}, False)]),
    ("sample_dpm_2", "DPM2", [
        *((config, "sgm_uniform", 5, tuning, False) for config in (SD15, SD21V) for tuning in (S_CHURN, WINDOW))]),
    ("sample_dpm_2_ancestral", "DPM2 a", [
        (ZERO_SNR, "sgm_uniform", 5, {}, False),
        *((SD15, "sgm_uniform", 5, tuning, False) for tuning in TUNED[1:])]),
    ("sample_dpmpp_2s_ancestral", "DPM++ 2S a", [
        *((SD15, "karras", 6, tuning, False) for tuning in TUNED),
        (SD21V, "ays", 3, {}, False),
        (ZERO_SNR, "karras", 5, {}, False),
        (SD15, "karras", 1, {}, False)]),
    ("sample_dpmpp_sde", "DPM++ SDE", [
        *((SD15, "karras", 5, tuning, False) for tuning in TUNED)]),
    ("sample_dpmpp_2m_sde", "DPM++ 2M SDE", [
        *((SD15, "sgm_uniform", steps, tuning, False) for steps in (6, 16)
          for tuning in TUNED)]),
    ("sample_dpmpp_3m_sde", "DPM++ 3M SDE", [
        *((SD15, "kl_optimal", 6, tuning, False) for tuning in TUNED),
        (SD21V, "sgm_uniform", 16, {}, False),
        (ZERO_SNR, "kl_optimal", 5, {}, False),
        (SD15, "sgm_uniform", 2, {}, False)]),
]
#: Samplers that work with samples of unit variance here.
SCALED = ("sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde")


def k_diffusion_case(function, case, tensors):
    config, spacing, steps, tuning, xl = case
    table, at = Table(config), sigmas(config, spacing, steps, xl)
    timesteps, inputs, samples, levels = [], [], [], []

    # The sample before noise was added to it for the next call, which is where the call before led to.
    unstirred = []

    def churn(x):
        unstirred.append(x.clone())
        return tensors["noise"][len(inputs)].double()

    def model(x, sigma, **_):
        if inputs:
            samples.append(unstirred.pop() if unstirred else x)
        unstirred.clear()
        sigma = float(sigma)
        timesteps.append(table.timestep(sigma))
        inputs.append(x / (sigma * sigma + 1) ** 0.5)
        levels.append(sigma)
        out = tensors["out"][len(inputs) - 1].double()
        if config.get("prediction_type", "epsilon") == "epsilon":
            return x - sigma * out
        return x / (sigma * sigma + 1) - out * sigma / (sigma * sigma + 1) ** 0.5

    chosen = getattr(k_diffusion.sampling, function)
    options = dict(tuning)
    if "noise_sampler" in inspect.signature(chosen).parameters:
        options["noise_sampler"] = lambda *_: tensors["noise"][len(inputs) - 1].double()
    first = (at[0] ** 2 + 1) ** 0.5 if config.get("timestep_spacing") == "leading" else at[0]
    if function in SCALED:
        first = (at[0] ** 2 + 1) ** 0.5
    real, torch.randn_like = torch.randn_like, churn
    last = chosen(model, tensors["sample"].double() * first, torch.tensor([*at, 0.0], dtype=torch.float64),
                  disable=True, **options)
    torch.randn_like = real
    samples.append(last)
    if function in SCALED:
        samples = [x / (sigma * sigma + 1) ** 0.5 for x, sigma in zip(samples, [*levels[1:], 0.0])]
        first = 1.0
    recorded = {"timesteps": torch.tensor(timesteps), "model_input": torch.stack(inputs),
                "prev_sample": torch.stack(samples)}
    return recorded, first


def write(file, cases, run):
    """Records cases of (sampler, its class or function, case)."""
    tensors = {name: randn(f"{file}.{name}", *shape) for name, shape in
               (("sample", SHAPE), ("out", (CALLS, *SHAPE)), ("noise", (CALLS, *SHAPE)))}
    described = []
    for index, (sampler, chosen, case) in enumerate(cases):
        recorded, sigma = run(chosen, case, tensors)
        tensors |= {f"{index}.{name}": tensor.float() for name, tensor in recorded.items()}
        config, spacing, steps, tuning = (*case, {})[:4]
        described.append({"sampler": sampler, "config": config, "spacing": spacing, "steps": steps, "tuning": tuning,
                          "xl": len(case) > 4 and case[4], "init_noise_sigma": sigma})
    save_case(f"sampler_{file}", tensors, {"cases": described})


#: Sigmas of which steps overlap, as those of DPM++ SDE, and a list whose ends are not whole millionths.
SPANS = {
    "k": ([14.614643, 2.3456789, 1.7, 0.61803398, 0.3, 0.1234567, 0.02916753],
          [(0, 1), (0, 2), (2, 3), (2, 4), (4, 5), (4, 6), (0, 6)]),
    "short": ([1.5, 0.75, 0.375], [(0, 1), (1, 2)]),
}


def brownian():
    tensors = {}
    for name, (at, spans) in SPANS.items():
        for seed in (0, 42, 2**32 + 5, 2**63 + 11):
            x = torch.zeros(1, 2, 3, 5)
            sampler = k_diffusion.sampling.BrownianTreeNoiseSampler(x, min(at), max(at), seed=[seed])
            noise = [sampler(torch.tensor(at[i]), torch.tensor(at[j])) for i, j in spans]
            tensors[f"out.{name}.{seed}"] = torch.cat(noise)
    spans = {name: [[at[i], at[j]] for i, j in spans] for name, (at, spans) in SPANS.items()}
    save_case("brownian", tensors, {"spans": spans})


def record(args):
    brownian()
    for file, (sampler, class_name, cases) in DIFFUSERS.items():
        sde = SDE if sampler == "DPM++ 2M SDE" else {}
        full = [({**case[0], "_class_name": case[0]["_class_name"] or class_name, **sde}, *case[1:]) for case in cases]
        write(file, [(sampler, class_name, case) for case in full], diffusers_case)
    all_cases = [(sampler, function, case) for function, sampler, cases in K_DIFFUSION for case in cases]
    write("k_diffusion", all_cases, k_diffusion_case)
