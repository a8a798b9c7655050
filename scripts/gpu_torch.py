"""PyTorch beside our kernels, and the table of all results: `gpu_torch.py compare`, `images sd15|sdxl`, `table`.

`compare` reads results/bench-*.json and times cuBLAS, cuDNN and scaled_dot_product_attention at every shape in them, as
`respodiff bench` does: CUDA events, a cold L2 cache, the median. `images` makes whole images with diffusers, eager and with
torch.compile, and with `respodiff sample`, of one checkpoint with random weights.
"""

import glob
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

import real_size

RESULTS = "results"
DEVICE = "cuda"
RUNS = 20  # of a kernel
IMAGES, STEPS, PROMPT = 8, 20, "a photo of a doctor"


def load(name):
    try:
        with open(os.path.join(RESULTS, name)) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def write(name, value):
    with open(os.path.join(RESULTS, name), "w") as file:
        json.dump(value, file, indent=1)


class Timer:
    """Median seconds of a function on a cold cache."""

    def __init__(self, torch):
        self.torch = torch
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, run):
        for _ in range(3):
            run()
        times = []
        for _ in range(RUNS):
            start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)


def prepare(torch, case):
    """What PyTorch would run for a case, in fp16 and channels last; None where it has no one call for it."""
    functional = torch.nn.functional

    def random(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.float16)

    kind = case["kind"]
    if kind == "conv" and case["kernel"] == 1:
        x = random(case["n"] * case["h"] * case["w"], case["inputs"])
        weight, bias = random(case["outputs"], case["inputs"]), random(case["outputs"])
        return "cuBLAS", lambda: functional.linear(x, weight, bias)
    if kind == "conv":
        # The case has the output's size; the input of a halving convolution is twice it, of a doubling one half of it,
        # which PyTorch enlarges first.
        scale = case["stride"]
        x = random(case["n"], case["inputs"], case["h"] * scale, case["w"] * scale).to(memory_format=torch.channels_last)
        weight = random(case["outputs"], case["inputs"], 3, 3).to(memory_format=torch.channels_last)
        bias = random(case["outputs"])
        return "cuDNN", lambda: functional.conv2d(x, weight, bias, stride=case["stride"], padding=1)
    if kind == "attention":
        q = random(case["n"], case["heads"], case["queries"], case["head_dim"])
        k, v = (random(case["n"], case["heads"], case["keys"], case["head_dim"]) for _ in range(2))
        attention = lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=case["causal"])
        if case["products"] == 2:
            return "SDPA", attention
        by = [q, k, v] if case["products"] == 5 else [q]
        for tensor in by:
            tensor.requires_grad_()
        out = attention()
        slope = torch.randn_like(out)
        return "SDPA backward", lambda: torch.autograd.grad(out, by, slope, retain_graph=True)
    if kind == "group_norm":
        x = random(case["n"], case["c"], case["h"], case["w"]).to(memory_format=torch.channels_last)
        weight, bias = random(case["c"]), random(case["c"])
        silu = functional.silu if case["silu"] else (lambda y: y)
        return "group_norm", lambda: silu(functional.group_norm(x, case["groups"], weight, bias))
    if kind == "layer_norm":
        x, weight, bias = random(case["rows"], case["c"]), random(case["c"]), random(case["c"])
        return "layer_norm", lambda: functional.layer_norm(x, (case["c"],), weight, bias)
    return None


def compare_kernels(torch):
    timer = Timer(torch)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    result = {"torch": torch.__version__, "peak_flops": 2 * 8192**3 / timer(lambda: a @ b), "seconds": {}}
    print(f"cuBLAS at 8192: {result['peak_flops'] / 1e12:.0f} TFLOP/s", flush=True)
    del a, b
    for path in sorted(glob.glob(os.path.join(RESULTS, "bench-*.json"))):
        for network in load(os.path.basename(path))["networks"]:
            for row in network["rows"]:
                if row["label"] in result["seconds"]:
                    continue
                try:
                    prepared = prepare(torch, row["case"])
                    if prepared:
                        result["seconds"][row["label"]] = [prepared[0], timer(prepared[1])]
                except RuntimeError as problem:
                    print(f"{row['label']}: {str(problem).splitlines()[0]}", flush=True)
            write("torch.json", result)


def text(name, folder):
    """The text encoders' and tokenizers' part of a pipeline."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    parts = {"text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer}
    if name == "sdxl":
        parts |= {"text_encoder_2": CLIPTextModelWithProjection, "tokenizer_2": CLIPTokenizer}
    return {part: kind.from_pretrained(folder / part) for part, kind in parts.items()}


def pipeline(torch, name, folder):
    """diffusers' pipeline of a checkpoint, in fp16 and channels last."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

    parts = text(name, folder) | {
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet"),
        "vae": AutoencoderKL.from_pretrained(folder / "vae"),
        "scheduler": DDIMScheduler.from_pretrained(folder / "scheduler"),
    }
    if name == "sdxl":
        pipe = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe = pipe.to(DEVICE, torch.float16)
    for network in (pipe.unet, pipe.vae):
        network.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(folder):
    """Seconds of an image by `respodiff sample`, file and all, and of what comes before the first: by two runs of different
    length."""
    pictures, seconds = folder / "pictures", []
    for count in (1, 1 + IMAGES):
        pictures.mkdir(exist_ok=True)
        line = ["./respodiff", "sample", PROMPT, "--model", folder, "--device", DEVICE, "--images", count, "--steps", STEPS,
                "--scheduler", "DDIM", "--seed", 1, "--out", pictures]
        begin = time.perf_counter()
        subprocess.run(list(map(str, line)), check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - begin)
    image = (seconds[1] - seconds[0]) / IMAGES
    return image, seconds[0] - image


def theirs(torch, name, folder, compiled):
    """Median seconds of an image by diffusers, without its file, and of what comes before the first."""
    begin = time.perf_counter()
    pipe = pipeline(torch, name, folder)
    if compiled:
        pipe.unet = torch.compile(pipe.unet, mode="max-autotune", fullgraph=True)
        pipe.vae.decode = torch.compile(pipe.vae.decode, mode="max-autotune")
    loaded, seconds = time.perf_counter() - begin, []
    for _ in range(IMAGES + 1):
        begun = time.perf_counter()
        pipe(PROMPT, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(1))
        seconds.append(time.perf_counter() - begun)
    image = statistics.median(seconds[1:])
    return image, loaded + seconds[0] - image


def images(name):
    """A whole image of a checkpoint of full size with random weights, ours and diffusers'."""
    import torch

    folder = pathlib.Path(RESULTS, f"checkpoint-{name}")
    if not (folder / "model_index.json").exists():
        real_size.make(name, folder)
    done = {}
    for who, measure in (
        ("respodiff", lambda: ours(folder)),
        ("diffusers", lambda: theirs(torch, name, folder, False)),
        ("diffusers, torch.compile", lambda: theirs(torch, name, folder, True)),
    ):
        done[who] = measure()
        print(f"{name}, {who}: {done[who][0]:.3f} s an image of {STEPS} steps, {done[who][1]:.1f} s before the first", flush=True)
        write(f"images-{name}.json", done)


def compare():
    import torch

    torch.backends.cudnn.benchmark = True
    compare_kernels(torch)


def table():
    """One Markdown and one JSON of whatever parts have run."""
    doctor, torch = load("doctor.json"), load("torch.json") or {}
    whole = {name: load(f"images-{name}.json") or {} for name in ("sd15", "sdxl")}
    outcomes = {}
    for path in sorted(glob.glob(os.path.join(RESULTS, "*.outcome"))):
        with open(path) as file:
            outcomes[os.path.basename(path)[: -len(".outcome")]] = file.read().strip()
    benches = {re.sub(r".*bench-|\.json", "", p): load(os.path.basename(p)) for p in sorted(glob.glob(f"{RESULTS}/bench-*.json"))}
    lines = ["# Kernels on a GPU", ""]
    for gpu in (doctor or {}).get("gpus", []):
        lines.append(f"{gpu['name']}, driver of CUDA {doctor['driver']}, respodiff {doctor['version']}, PyTorch {torch.get('torch', 'not run')}.")
    lines += ["", "| part | outcome |", "| --- | --- |", *(f"| {part} | {outcome} |" for part, outcome in outcomes.items())]
    if any(whole.values()):
        lines += ["", f"| an image of {STEPS} guided steps, random weights | s | s before the first |", "| --- | --- | --- |"]
        for name, who in whole.items():
            lines += [f"| {name}, {whose} | {image:.3f} | {before:.1f} |" for whose, (image, before) in who.items()]
    for model, bench in benches.items():
        peaks = bench["peaks"]
        lines += ["", f"## {model}, batch {bench['batch']}", ""]
        lines.append(f"Our best: {peaks['flops'] / 1e12:.0f} TFLOP/s, {peaks['bytes'] / 1e9:.0f} GB/s.")
        for network in bench["networks"]:
            total = sum(row["seconds"] * row["count"] for row in network["rows"])
            lines += ["", f"### {network['network']}: {network['step'] * 1e3:.3f} ms a step, {total * 1e3:.3f} ms one by one", ""]
            lines += ["| operation | count | us | TFLOP/s | GB/s | % of best | PyTorch us | kernels |", "| --- |" + " --- |" * 7]
            for row in network["rows"]:
                seconds = max(row["seconds"], 1e-12)
                bound = max(row["flops"] / peaks["flops"], row["bytes"] / peaks["bytes"])
                rival = torch.get("seconds", {}).get(row["label"])
                rival = f"{rival[1] * 1e6:.1f} ({rival[0]})" if rival else "-"
                rate = f"{row['flops'] / seconds / 1e12:.1f}" if row["flops"] else "-"
                lines.append(
                    f"| {row['label']} | {row['count']} | {seconds * 1e6:.1f} | {rate} | {row['bytes'] / seconds / 1e9:.0f} "
                    f"| {100 * bound / seconds:.0f} | {rival} | {row['kernels']} |"
                )
    with open(os.path.join(RESULTS, "gpu.md"), "w") as file:
        file.write("\n".join(lines) + "\n")
    write("gpu.json", {"doctor": doctor, "outcomes": outcomes, "torch": torch, "images": whole, "benches": benches})
    print(f"{RESULTS}/gpu.md and {RESULTS}/gpu.json")


if __name__ == "__main__":
    tasks = {"compare": compare, "images sd15": lambda: images("sd15"), "images sdxl": lambda: images("sdxl"), "table": table}
    task = tasks.get(" ".join(sys.argv[1:]))
    if not task:
        sys.exit(__doc__)
    os.makedirs(RESULTS, exist_ok=True)
    task()
