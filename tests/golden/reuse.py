"""Records pipelines whose UNet takes activations from an earlier step: hooks put them in the place of the new ones."""

import torch
from diffusers import DDIMScheduler

import pipelines
from common import randn, save_case

HEIGHT, WIDTH, SEED = 128, 96, 11
PROMPTS = ["a photo of a cat", "a red house"]
STEPS, GUIDANCE, INTERVAL = 7, 7.5, 3
#: Name, checkpoint, whether a concept shifts the bottleneck.
CASES = [("sd1", "sd1", False), ("sdxl", "sdxl", False), ("concept_sd1", "sd1", True)]


@torch.no_grad()
def record_case(name, checkpoint, concept):
    pipeline = pipelines.load(checkpoint)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    unet, kept, calls, tensors = pipeline.unet, {}, [0], {}
    call = dict(prompt=PROMPTS, steps=STEPS, seed=SEED, guidance=GUIDANCE, height=HEIGHT, width=WIDTH)
    reusing = lambda: (calls[0] - 1) % INTERVAL != 0

    def count(module, args, kwargs):
        calls[0] += 1

    def kept_or(key, new):
        if not reusing():
            kept[key] = new
        return kept[key]

    def shift(module, args, out):
        if "ram" not in tensors:
            tensors["ram"] = randn("reuse/ram", *out.shape[1:])
        without, with_prompt = out.chunk(2)
        return torch.cat([without, with_prompt + tensors["ram"]])

    unet.register_forward_pre_hook(count, with_kwargs=True)
    if concept:
        unet.mid_block.register_forward_hook(shift)
    whole = pipelines.run(pipeline, **call)[0]["out.latents"]
    calls[0] = 0
    if concept:
        unet.mid_block.register_forward_pre_hook(lambda module, args: (kept_or("mid", args[0]), *args[1:]))
        for i, block in enumerate(unet.up_blocks):

            def skips(module, args, kwargs, i=i):
                name = "res_hidden_states_tuple"
                return args, kwargs | {name: kept_or(i, kwargs[name])}

            block.register_forward_pre_hook(skips, with_kwargs=True)
    else:
        # The channels of the first block of the down half are the skip connection.
        skip = unet.config.block_out_channels[0]

        def input_of_block(module, args):
            old = kept_or("x", args[0][:, :-skip])
            return (torch.cat([old, args[0][:, -skip:]], dim=1), *args[1:])

        unet.up_blocks[-1].resnets[-2].register_forward_pre_hook(input_of_block)
    recorded, settings = pipelines.run(pipeline, **call)
    latents = recorded["out.latents"]
    print(f"  reuse moves the latents by {(latents - whole).norm() / whole.norm():.2f} of their norm")
    settings |= {"checkpoint": checkpoint, "scheduler": "DDIMScheduler", "interval": INTERVAL}
    save_case(f"reuse_{name}", tensors | {"out.latents": latents}, settings)


def record(args):
    for case in CASES:
        record_case(*case)
