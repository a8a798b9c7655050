"""Records how far PyTorch itself is off when it computes the recorded calls in fp16.

A rounding more or less can move a tiny network's result tenfold, so one run says little of what fp16 can do: recorded are
the median and the worst of the call itself and eight more whose inputs are moved by a thousandth, each against fp32 on the
same inputs."""

import json
from statistics import median

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open

import calls
import gradients
from common import CASES, CHECKPOINTS, VARIANTS, randn

NEARBY = 8


def load(kind, checkpoint, part):
    return kind.from_pretrained(
        CHECKPOINTS / checkpoint, subfolder=part, torch_dtype=torch.float16, variant=VARIANTS.get(checkpoint)
    ).eval()


def error(ours, truth):
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


def read(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def text(model, case):
    out = model(case["input_ids"], output_hidden_states=True)
    results = {"last_hidden_state": out.last_hidden_state, "penultimate_hidden_state": out.hidden_states[-2]}
    return results | ({"text_embeds": out.text_embeds} if "out.text_embeds" in case else {})


def unet(model, case):
    middle = []
    hook = calls.watch_middle(model, middle)
    added = {key: case[key] for key in ("text_embeds", "time_ids") if key in case}
    inputs = [case[key] for key in ("sample", "timestep", "encoder_hidden_states")]
    out = model(*inputs, timestep_cond=case.get("timestep_cond"), added_cond_kwargs=added or None).sample
    hook.remove()
    return {"sample": out, "mid": middle.pop()}


def vae(model, case):
    return calls.vae_outputs(model, case["latents"], case["image"])


def gradient(model, case):
    """Losses' gradients. The loss and its derivative are fp32's; that goes backwards at the size that fp16 holds best."""
    inputs = {k: v for k, v in case.items() if not k.startswith("out.")}
    dtype = model.dtype
    cast = halved(inputs) if dtype == torch.float16 else inputs
    batch = len(inputs["latents"])
    results = {}
    for name, weight in (("ram", 1.0), ("sam", gradients.LAMBDA)):
        shift = inputs["ram"] if name == "ram" else inputs["ram"] + inputs["sam"]
        rows = shift.repeat(batch, 1, 1, 1).requires_grad_()
        out = gradients.predict(model, cast, rows.to(dtype))
        with torch.no_grad():
            target = inputs["target"] if name == "ram" else gradients.predict(model, cast).float()
            seed = 2 * weight / out.numel() * (out.float() - target)
            scale = 2.0 ** -seed.abs().max().log2().floor()
        (by_rows,) = torch.autograd.grad(out, rows, (seed * scale).to(dtype))
        results[f"grad_{name}"] = by_rows.float().sum(0) / scale
    return results


def moved(case, label):
    """The same call with its activations moved by a thousandth."""
    numbers = ("sample", "encoder_hidden_states", "text_embeds", "latents", "image", "neutral_embeds")
    return case | {k: case[k] + 1e-3 * randn(f"{label}/{k}", *case[k].shape) for k in numbers if k in case}


def halved(case):
    """The inputs in fp16, but for timesteps and sizes, which are no activations."""
    return {k: v.half() if v.is_floating_point() and k not in ("timestep", "time_ids") else v for k, v in case.items()}


def record(args):
    texts = {f"text_{checkpoint}_{part}": (kind, checkpoint, part) for checkpoint, part, kind in calls.TEXT_ENCODERS}
    parts = {"unet": lambda _: UNet2DConditionModel, "vae": calls.vae_class}
    errors = {}
    for path in sorted(CASES.glob("*.safetensors")):
        name = path.stem
        if name in texts:
            run, model = torch.no_grad()(text), texts[name]
        elif name.startswith(("unet_", "vae_")):
            family, checkpoint, _ = name.split("_")
            run, model = {"unet": torch.no_grad()(unet), "vae": torch.no_grad()(vae)}[family], (parts[family](checkpoint), checkpoint, family)
        elif name.startswith("gradient_"):
            run, model = gradient, (UNet2DConditionModel, name.split("_")[1], "unet")
        else:
            continue
        single, half = calls.load(*model), load(*model)
        case = read(path)
        inputs = [case] + [moved(case, f"half/{name}/{i}") for i in range(0 if name in texts else NEARBY)]
        pairs = [(run(half, halved(x)), run(single, x)) for x in inputs]
        errors[name] = {}
        for key in pairs[0][0]:
            all_errors = [error(ours[key], truth[key]) for ours, truth in pairs]
            errors[name][key] = {"median": median(all_errors), "worst": max(all_errors)}
    (CASES / "half.json").write_text(json.dumps(errors, indent=1) + "\n")
