"""Compares networks of full size with diffusers, on random weights.

python scripts/real_size.py sd15|sd21|sdxl FOLDER [--device cuda] [--respodiff PROGRAM] [--whole]

Makes a UNet and a VAE of full size with random fp16 weights in FOLDER, on the device, unless they are there, and
compares one UNet call and one decode with diffusers in fp32 from the same files: relative L2 error (at most 1e-3; on a
GPU, in fp16, 1e-2), seconds to load, peak memory of the process beside the plan's, and seconds of the first call and of
the second. Needs torch and diffusers (0.35 or later), and memory for the UNet in fp32 (SDXL: 12 GiB); programs run one
after the other. `--whole` makes the text encoders too, and with them a checkpoint for `sample` and `train`, which needs
transformers (4.57 or later); `tests/models.rs` tests those networks on it. Ends with code 3 if a module is missing.
"""

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TOKENIZER = REPOSITORY / "demo/model/tokenizer"
LIMITS = {"cpu": 1e-3, "cuda": 1e-2}
CALLS = 3  # calls of PyTorch, of which the fastest counts

CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
              hidden_act="quick_gelu")
CLIP_H = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu")
CLIP_G = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu",
              projection_dim=1280)
SD2 = dict(attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True, sample_size=96)
XL = dict(
    sample_size=128, cross_attention_dim=2048, attention_head_dim=(5, 10, 20), block_out_channels=(320, 640, 1280),
    transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
    addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))
#: UNet and text encoders of each model.
MODELS = {
    "sd15": (dict(attention_head_dim=8, cross_attention_dim=768, sample_size=64), [CLIP_L]),
    "sd21": (SD2, [CLIP_H]),
    "sdxl": (XL, [CLIP_L, CLIP_G]),
}


VAE = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
           down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
SCHEDULER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False,
                 clip_sample=False, steps_offset=1)


def write(path, value):
    """Writes JSON, whole or not at all even if this process is killed."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(value, indent=1))
    beside.replace(path)


def networks(name, device, whole=True):
    """A model's networks by name, in fp16 on the device, with the random weights with which diffusers and transformers
    begin a training."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet, encoders = MODELS[name]
    scale = dict(scaling_factor=0.13025, force_upcast=True) if name == "sdxl" else dict(force_upcast=False)
    kinds = {"unet": lambda: UNet2DConditionModel(**unet), "vae": lambda: AutoencoderKL(**VAE, **scale)}
    if whole:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        for i, config in enumerate(encoders):
            kind = CLIPTextModelWithProjection if i else CLIPTextModel
            kinds["text_encoder_2" if i else "text_encoder"] = (
                lambda kind=kind, config=config: kind(CLIPTextConfig(vocab_size=49408, **config)))
    for part, kind in kinds.items():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float16)
        try:
            with torch.device(device):
                network = kind()
        finally:
            torch.set_default_dtype(torch.float32)
        yield part, network


def make(name, folder, device, whole=True):
    """Makes a checkpoint of a model, or its UNet and VAE alone, unless it is there."""
    if (folder / ("model_index.json" if whole else "vae")).exists():
        return
    # Has another name until it is complete, since the process may be killed meanwhile.
    making = folder.with_name(folder.name + ".part")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    for part, network in networks(name, device, whole):
        network.save_pretrained(making / part)
        if part.startswith("text_encoder"):
            shutil.copytree(TOKENIZER, making / part.replace("text_encoder", "tokenizer"))
    if whole:
        kind = "v_prediction" if name == "sd21" else "epsilon"
        (making / "scheduler").mkdir()
        scheduler = SCHEDULER | dict(prediction_type=kind, _class_name="DDIMScheduler")
        write(making / "scheduler/scheduler_config.json", scheduler)
        write(making / "model_index.json", {})
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)


def inputs(name, component):
    import torch

    unet, _ = MODELS[name]
    generator = torch.Generator().manual_seed(1)
    randn = lambda *shape: torch.randn(*shape, generator=generator)
    side = unet["sample_size"]
    if component == "vae":
        return {"latents": randn(1, 4, side, side)}
    tensors = {"sample": randn(2, 4, side, side), "timestep": torch.tensor([481.0]),
               "encoder_hidden_states": randn(2, 77, unet["cross_attention_dim"])}
    if name == "sdxl":
        size = [8.0 * side] * 2
        tensors |= {"text_embeds": randn(2, 1280), "time_ids": torch.tensor([[*size, 0.0, 0.0, *size]] * 2)}
    return tensors


def reference(name, folder, device, component, output):
    """Computes diffusers' result, in a process of its own, whose end releases all memory."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import load_file, save_file

    torch.backends.cudnn.allow_tf32 = False
    kind = UNet2DConditionModel if component == "unet" else AutoencoderKL
    begin = time.time()
    # Not `from_pretrained`, which without accelerate first makes random weights on the CPU.
    with torch.device("meta"):
        model = kind.from_config(kind.load_config(folder / component))
    model = model.to_empty(device=device).eval()
    model.load_state_dict(load_file(folder / component / "diffusion_pytorch_model.safetensors", device=device))
    loaded = time.time() - begin
    given, seconds = {name: tensor.to(device) for name, tensor in inputs(name, component).items()}, []
    for _ in range(CALLS):
        begin = time.time()
        with torch.inference_mode():
            if component == "unet":
                added = {k: given[k] for k in ("text_embeds", "time_ids") if k in given} or None
                sample, timestep, states = (given[k] for k in ("sample", "timestep", "encoder_hidden_states"))
                out = model(sample, timestep, states, added_cond_kwargs=added).sample
            else:
                out = model.decode(given["latents"]).sample
        out = out.cpu()
        seconds.append(time.time() - begin)
    save_file({"out": out.contiguous()}, output)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({"load": loaded, "call": seconds[0], "again": min(seconds), "peak": peak}))


def ours(program, folder, device, component, given, output):
    """Computes our result; returns the times and the memory that `probe` reports."""
    command = "unet" if component == "unet" else "vae-decode"
    line = [program, "probe", command, "--model", str(folder), "--inputs", str(given), "--output", str(output),
            "--device", device]
    # A process in between, whose children's peak memory is that of this program alone.
    spy = "import resource, subprocess, sys; r = subprocess.run(sys.argv[1:], stderr=subprocess.PIPE, text=True); " \
          "print(r.stderr); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10); " \
          "sys.exit(r.returncode)"
    run = subprocess.run([sys.executable, "-c", spy, *line], stdout=subprocess.PIPE, text=True, check=True)
    numbers = re.search(r"([\d.]+) MiB of weights in ([\d.]+) s, ([\d.]+) MiB of activations\s+"
                        r"call: ([\d.]+) s, again ([\d.]+) s", run.stdout)
    weights, load, activations, call, again = map(float, numbers.groups())
    peak = float(run.stdout.split()[-1])
    return {"load": load, "call": call, "again": again, "peak": peak, "plan": weights + activations}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=LIMITS, default="cpu")
    parser.add_argument("--respodiff", default=str(REPOSITORY / "target/release/respodiff"))
    parser.add_argument("--whole", action="store_true", help="make the text encoders too")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--reference", nargs=2, metavar=("COMPONENT", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reference:
        return reference(args.model, args.folder, args.device, *args.reference)
    make(args.model, args.folder, args.device, args.whole)

    from safetensors.torch import load_file, save_file

    errors, figures = [], {}
    print("| | error | s to load | theirs | plan, MiB | process, MiB | theirs | s of first call, second | theirs |")
    for component in ("unet", "vae"):
        kinds = ("inputs", "truth", "result")
        given, truth, result = (args.folder / f"{component}.{kind}.safetensors" for kind in kinds)
        save_file(inputs(args.model, component), given)
        we = ours(args.respodiff, args.folder, args.device, component, given, result)
        command = [sys.executable, __file__, args.model, str(args.folder), "--device", args.device, "--reference",
                   component, str(truth)]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        they = json.loads(run.stdout.splitlines()[-1])
        output = "sample" if component == "unet" else "image"
        a, b = load_file(result)[output].double(), load_file(truth)["out"].double()
        error = ((a - b).norm() / b.norm()).item()
        errors.append(error)
        figures[component] = {"error": error, "ours": we, "diffusers": they}
        if args.json:
            write(args.json, figures)
        print(f"| {args.model} {component} | {error:.1e} | {we['load']:.1f} | {they['load']:.1f} | {we['plan']:.0f} | "
              f"{we['peak']:.0f} | {they['peak']:.0f} | {we['call']:.3f}, {we['again']:.3f} | "
              f"{they['call']:.3f}, {they['again']:.3f} |", flush=True)
    # `not all(error <= ...)`, so that NaN fails too.
    if not all(error <= LIMITS[args.device] for error in errors):
        sys.exit(f"off by {', '.join(f'{error:.1e}' for error in errors)}, allowed {LIMITS[args.device]}")


if __name__ == "__main__":
    try:
        main()
    except ImportError:
        traceback.print_exc()
        sys.exit(3)
