"""Records RespoDiff's losses and gradients by PyTorch autograd, and short trainings.

In float64, since the gradient through so many norms loses three digits of fp32's seven.
The reference is written from the paper (arXiv 2509.15257): predictions of the neutral
prompt with RAM, with RAM and SAM, and with neither, through the frozen up half.
"""

import torch
from diffusers import UNet2DConditionModel

from calls import load
from common import randn, save_case

LAMBDA = 0.7
RATES = {"ram": 1e-2, "sam": 1e-3}
STEPS = 5
#: Checkpoint, batch, latent height and width; large enough that no norm is over a few numbers.
CASES = [("sd1", 2, 16, 24), ("sd2", 1, 16, 16), ("sdxl", 2, 12, 16), ("odd", 1, 10, 14)]


def predict(model, inputs, shift=None):
    """The prediction with `shift` added to the middle block's output."""
    handle = None
    if shift is not None:
        handle = model.mid_block.register_forward_hook(lambda module, args, out: out + shift)
    added = {k: inputs[k] for k in ("text_embeds", "time_ids") if k in inputs}
    batch = len(inputs["latents"])
    states = inputs["neutral_embeds"].expand(batch, -1, -1)
    out = model(inputs["latents"], inputs["timestep"], states, added_cond_kwargs=added or None).sample
    if handle:
        handle.remove()
    return out


def loss_resp(model, inputs, ram):
    return (predict(model, inputs, ram) - inputs["target"]).square().mean()


def loss_sem(model, inputs, ram, sam):
    with torch.no_grad():
        plain = predict(model, inputs)
    return (predict(model, inputs, ram + sam) - plain).square().mean()


def draw(label, model, batch, height, width, timestep):
    states = model.config.cross_attention_dim
    states = states if isinstance(states, int) else states[0]
    inputs = {
        "latents": randn(f"{label}/latents", batch, 4, height, width),
        "timestep": torch.tensor([timestep]),
        "neutral_embeds": randn(f"{label}/states", 1, 77, states),
        "target": randn(f"{label}/target", batch, 4, height, width),
    }
    if model.config.addition_embed_type == "text_time":
        inputs["text_embeds"] = randn(f"{label}/embeds", batch, 40)
        inputs["time_ids"] = torch.tensor([[8.0 * height, 8.0 * width, 0, 0, 64, 96]] * batch)
    return {name: value.double() for name, value in inputs.items()}


def save(name, tensors, metadata):
    save_case(name, {key: value.float() for key, value in tensors.items()}, metadata)


def record_case(checkpoint, batch, height, width):
    model = load(UNet2DConditionModel, checkpoint, "unet").requires_grad_(False).double()
    label = f"gradient_{checkpoint}"
    inputs = draw(label, model, batch, height, width, 481.0)
    shapes = []
    handle = model.mid_block.register_forward_hook(lambda m, a, out: shapes.append(out.shape))
    predict(model, inputs)
    handle.remove()
    ram, sam = (randn(f"{label}/{k}", *shapes[0][1:]).double() for k in ("ram", "sam"))
    ram, sam = ram.float().double().requires_grad_(), sam.float().double().requires_grad_()
    resp = loss_resp(model, inputs, ram)
    sem = loss_sem(model, inputs, ram.detach(), sam)
    outputs = {
        "ram": ram, "sam": sam, "out.loss_resp": resp[None], "out.loss_sem": sem[None],
        "out.grad_ram": torch.autograd.grad(resp, ram)[0],
        "out.grad_sam": torch.autograd.grad(LAMBDA * sem, sam)[0],
    }
    save(label, inputs | outputs, {"checkpoint": checkpoint, "lambda": LAMBDA})

    # A training of a few steps, each with latents and a target of its own, from far enough off
    # zero that both losses are more than rounding.
    ram, sam = ram.detach().clone().requires_grad_(), sam.detach().clone().requires_grad_()
    adam = {k: torch.optim.Adam([v], lr=RATES[k]) for k, v in (("ram", ram), ("sam", sam))}
    recorded = {"ram": ram.detach().clone(), "sam": sam.detach().clone()}
    for step in range(STEPS):
        inputs = draw(f"{label}/{step}", model, batch, height, width, 981.0 - 180 * step)
        resp = loss_resp(model, inputs, ram)
        adam["ram"].zero_grad()
        resp.backward()
        adam["ram"].step()
        sem = loss_sem(model, inputs, ram.detach(), sam)
        adam["sam"].zero_grad()
        (LAMBDA * sem).backward()
        adam["sam"].step()
        recorded |= {f"{k}.{step}": v for k, v in inputs.items()}
        recorded[f"out.losses.{step}"] = torch.stack([resp, sem])
    recorded |= {"out.ram": ram, "out.sam": sam}
    save(f"training_{checkpoint}", recorded, {"lambda": LAMBDA, "rates": RATES, "steps": STEPS})


def record(args):
    for case in CASES:
        record_case(*case)
