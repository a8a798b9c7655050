"""Records pipelines with T-GATE's cross attention: from one call of the UNet on there is no guidance, and hooks put the
outputs of that call in the place of new ones."""

import torch
from diffusers import DDIMScheduler

import pipelines
from common import randn, save_case

HEIGHT, WIDTH, SEED = 128, 96, 13
PROMPTS = ["a photo of a cat", "a red house"]
GATE = 3
#: Name, checkpoint, whether a concept shifts the bottleneck, the guidance scale, steps. In seven steps at a scale of 5, this
#: SDXL turns an error of 1e-6 in every call into one of 3e-4; as it is here, into 3e-5.
CASES = [
    ("sd1", "sd1", False, 7.5, 7),
    ("sdxl", "sdxl", False, 1.5, 5),
    ("concept_sd1", "sd1", True, 7.5, 7),
    ("unguided_sd1", "sd1", False, 1.0, 7),
]


@torch.no_grad()
def record_case(name, checkpoint, concept, guidance, steps):
    pipeline = pipelines.load(checkpoint)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    unet, kept, calls, tensors = pipeline.unet, {}, [0], {}
    guided, gate = guidance > 1.0, [steps + 1]
    call = dict(prompt=PROMPTS, steps=steps, seed=SEED, guidance=guidance, height=HEIGHT, width=WIDTH)
    #: True after the last guided call.
    gated = lambda: calls[0] > gate[0]
    last_half = lambda x: x.chunk(2)[1]

    def before(module, args, kwargs):
        calls[0] += 1
        if not (guided and gated()):
            return None
        kwargs = dict(kwargs, encoder_hidden_states=last_half(kwargs["encoder_hidden_states"]))
        if kwargs.get("added_cond_kwargs"):
            kwargs["added_cond_kwargs"] = {key: last_half(x) for key, x in kwargs["added_cond_kwargs"].items()}
        return (last_half(args[0]), *args[1:]), kwargs

    def after(module, args, kwargs, out):
        # Guidance of two equal halves is the half itself.
        return (torch.cat([out[0], out[0]]),) if guided and gated() else None

    def attend(key):
        def hook(module, args, kwargs, out):
            if gated():
                return kept[key]
            if calls[0] == gate[0]:
                kept[key] = sum(out.chunk(2)) / 2 if guided else out

        return hook

    def shift(module, args, out):
        if "ram" not in tensors:
            tensors["ram"] = randn("tgate/ram", *out.shape[1:])
        if guided and not gated():
            without, with_prompt = out.chunk(2)
            return torch.cat([without, with_prompt + tensors["ram"]])
        return out + tensors["ram"]

    unet.register_forward_pre_hook(before, with_kwargs=True)
    unet.register_forward_hook(after, with_kwargs=True)
    for key, module in unet.named_modules():
        if key.endswith("attn2"):
            module.register_forward_hook(attend(key), with_kwargs=True)
    if concept:
        unet.mid_block.register_forward_hook(shift)
    whole = pipelines.run(pipeline, **call)[0]["out.latents"]
    calls[0], gate[0] = 0, GATE
    recorded, settings = pipelines.run(pipeline, **call)
    assert len(kept) > 0 and calls[0] == steps
    latents = recorded["out.latents"]
    print(f"  the gate moves the latents by {(latents - whole).norm() / whole.norm():.2f} of their norm")
    settings |= {"checkpoint": checkpoint, "scheduler": "DDIMScheduler", "gate": GATE}
    save_case(f"tgate_{name}", tensors | {"out.latents": latents}, settings)


def record(args):
    for case in CASES:
        record_case(*case)
