"""Records how far PyTorch itself is off when it computes the recorded calls in fp16."""

import json

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open

from calls import TEXT_ENCODERS
from common import CASES, CHECKPOINTS, VARIANTS


def load(kind, checkpoint, part):
    return kind.from_pretrained(
        CHECKPOINTS / checkpoint, subfolder=part, torch_dtype=torch.float16, variant=VARIANTS.get(checkpoint)
    ).eval()


def error(ours, truth):
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


def read(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def text(kind, checkpoint, part, case):
    out = load(kind, checkpoint, part)(case["input_ids"], output_hidden_states=True)
    results = {"last_hidden_state": out.last_hidden_state, "penultimate_hidden_state": out.hidden_states[-2]}
    return results | ({"text_embeds": out.text_embeds} if "out.text_embeds" in case else {})


def unet(checkpoint, case):
    model = load(UNet2DConditionModel, checkpoint, "unet")
    middle = []
    model.mid_block.register_forward_hook(lambda module, inputs, out: middle.append(out))
    added = {key: case[key].half() if key == "text_embeds" else case[key] for key in ("text_embeds", "time_ids") if key in case}
    states = case["encoder_hidden_states"].half()
    out = model(case["sample"].half(), case["timestep"], states, added_cond_kwargs=added or None).sample
    return {"sample": out, "mid": middle.pop()}


def vae(checkpoint, case):
    model = load(AutoencoderKL, checkpoint, "vae")
    spread = model.encode(case["image"].half()).latent_dist
    image = model.decode(case["latents"].half()).sample
    return {"image": image, "mean": spread.mean, "logvar": spread.logvar}


@torch.no_grad()
def record(args):
    kinds = {f"text_{checkpoint}_{part}": (kind, checkpoint, part) for checkpoint, part, kind in TEXT_ENCODERS}
    errors = {}
    for path in sorted(CASES.glob("*.safetensors")):
        name = path.stem
        if name in kinds:
            case = read(path)
            results = text(*kinds[name], case)
        elif name.startswith(("unet_", "vae_")):
            family, checkpoint, _ = name.split("_")
            case = read(path)
            results = {"unet": unet, "vae": vae}[family](checkpoint, case)
        else:
            continue
        errors[name] = {key: error(value, case[f"out.{key}"]) for key, value in results.items()}
    (CASES / "half.json").write_text(json.dumps(errors, indent=1) + "\n")
