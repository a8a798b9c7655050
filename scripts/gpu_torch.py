"""PyTorch beside our kernels, and the table of all results: `gpu_torch.py compare`, `gpu_torch.py table`.

`compare` reads results/bench-*.json and times cuBLAS, cuDNN and scaled_dot_product_attention at every shape in them, as
`respodiff bench` does: CUDA events, a cold L2 cache, the median. Then, if diffusers is there, whole networks of Stable
Diffusion 1.5 with random weights, made here, eager and with torch.compile, beside the `step` of ours.
"""

import glob
import json
import os
import re
import statistics
import sys
import time

RESULTS = "results"
RUNS = 20


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
        return "SDPA", lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=case["causal"])
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
    return result


def make_checkpoint(torch, folder):
    """Stable Diffusion 1.5's UNet and VAE with random weights, by diffusers itself."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    blocks = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **blocks)
    for name, model in (("unet", unet), ("vae", vae)):
        model.half().save_pretrained(os.path.join(folder, name))


def compare_networks(torch, result):
    """A guided UNet call and a decode with torch.compile; ours are the `step` of the same networks in bench-sd15.json."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder = os.path.join(RESULTS, "checkpoint")
    if not os.path.isdir(os.path.join(folder, "vae")):
        make_checkpoint(torch, folder)
    options = dict(torch_dtype=torch.float16)
    unet = UNet2DConditionModel.from_pretrained(os.path.join(folder, "unet"), **options).to("cuda").eval()
    vae = AutoencoderKL.from_pretrained(os.path.join(folder, "vae"), **options).to("cuda").eval()
    sample, states = (torch.randn(*s, device="cuda", dtype=torch.float16) for s in ((2, 4, 64, 64), (2, 77, 768)))
    step = torch.full((), 500, device="cuda")
    networks = {}
    for mode in ("eager", "compiled"):
        for model in (unet, vae):
            model.to(memory_format=torch.channels_last)
        call, decode = unet, vae.decode
        if mode == "compiled":
            call, decode = (torch.compile(f, mode="max-autotune-no-cudagraphs") for f in (unet, vae.decode))
        runs = {
            "unet": lambda: call(sample, step, encoder_hidden_states=states, return_dict=False),
            "vae": lambda: decode(sample[:1], return_dict=False),
        }
        for name, run in runs.items():
            with torch.inference_mode():
                for _ in range(3):
                    run()
                torch.cuda.synchronize()
                # Without the CPU's share, as a graph replays.
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    run()
                start = time.perf_counter()
                for _ in range(RUNS):
                    graph.replay()
                torch.cuda.synchronize()
            networks[f"{name} {mode}"] = (time.perf_counter() - start) / RUNS
            print(f"{name} {mode}: {networks[f'{name} {mode}'] * 1e3:.2f} ms", flush=True)
            result["networks"] = networks
            write("torch.json", result)


def compare():
    import torch

    torch.backends.cudnn.benchmark = True
    result = compare_kernels(torch)
    try:
        compare_networks(torch, result)
    except ImportError:
        print("not run: diffusers is not installed")


def table():
    """One Markdown and one JSON of whatever parts have run."""
    doctor, torch = load("doctor.json"), load("torch.json") or {}
    outcomes = {}
    for path in sorted(glob.glob(os.path.join(RESULTS, "*.outcome"))):
        with open(path) as file:
            outcomes[os.path.basename(path)[: -len(".outcome")]] = file.read().strip()
    benches = {re.sub(r".*bench-|\.json", "", p): load(os.path.basename(p)) for p in sorted(glob.glob(f"{RESULTS}/bench-*.json"))}
    lines = ["# Kernels on a GPU", ""]
    for gpu in (doctor or {}).get("gpus", []):
        lines.append(f"{gpu['name']}, driver of CUDA {doctor['driver']}, respodiff {doctor['version']}, PyTorch {torch.get('torch', 'not run')}.")
    lines += ["", "| part | outcome |", "| --- | --- |", *(f"| {part} | {outcome} |" for part, outcome in outcomes.items())]
    if torch.get("networks"):
        lines += ["", "| PyTorch, replayed as a CUDA graph | ms |", "| --- | --- |"]
        lines += [f"| SD 1.5 {name} | {seconds * 1e3:.2f} |" for name, seconds in torch["networks"].items()]
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
    write("gpu.json", {"doctor": doctor, "outcomes": outcomes, "torch": torch, "benches": benches})
    print(f"{RESULTS}/gpu.md and {RESULTS}/gpu.json")


if __name__ == "__main__":
    tasks = {"compare": compare, "table": table}
    if len(sys.argv) != 2 or sys.argv[1] not in tasks:
        sys.exit(__doc__)
    os.makedirs(RESULTS, exist_ok=True)
    tasks[sys.argv[1]]()
