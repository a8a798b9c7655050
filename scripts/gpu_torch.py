"""Times PyTorch beside our kernels, for `gpu-check`.

gpu_torch.py kernels FIGURES
gpu_torch.py images FIGURES --model sd15 --checkpoint FOLDER

`kernels` reads FIGURES/bench-*.json and times cuBLAS, cuDNN and scaled_dot_product_attention at every shape in them, as
`respodiff bench` does: with CUDA events, a cold and a warm L2 cache, and the median. `images` times a UNet step with
guidance, a decode and whole images, by diffusers, eager and with torch.compile, in fp16 and NHWC, and by
`respodiff sample`; weights are random. Both write FIGURES/*.json after every figure, so that a killed run keeps its
figures. They end with code 3 if a module or a GPU is missing.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
import traceback

try:
    import torch

    import real_size
except ImportError:
    traceback.print_exc()
    sys.exit(3)

DEVICE = "cuda"
RUNS = 20  # of a kernel, or of a network back to back
LAUNCHES = 512  # of the smallest kernel in one graph
IMAGES, STEPS, PROMPT = 5, 20, "a photo of a doctor"
COMPILE = dict(mode="reduce-overhead")  # CUDA graphs


class Timer:
    """Measures the median seconds of a function on a cold cache and on a warm one."""

    def __init__(self):
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)

    def __call__(self, run):
        for _ in range(3):
            run()
        return [self.median(run, warm) for warm in (False, True)]

    def median(self, run, warm):
        times = []
        for _ in range(RUNS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # While the GPU is busy with this, the following work is queued, so that the GPU does not wait for Python.
            self.flush.zero_()
            if warm:
                run()
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)


def prepare(case):
    """The library and the call that PyTorch would use for a case, in fp16 and channels last; None if there is no single
    call for it."""
    functional = torch.nn.functional

    def random(*shape):
        return torch.randn(*shape, device=DEVICE, dtype=torch.float16)

    kind = case["kind"]
    if kind == "conv" and case["kernel"] == 1:
        x = random(case["n"] * case["h"] * case["w"], case["inputs"])
        weight, bias = random(case["outputs"], case["inputs"]), random(case["outputs"])
        return "cuBLAS", lambda: functional.linear(x, weight, bias)
    if kind == "conv":
        # The case has the output's size. A halving convolution has an input twice as large. A doubling one has an input
        # half as large, which PyTorch enlarges first.
        scale = case["stride"]
        x = random(case["n"], case["inputs"], case["h"] * scale, case["w"] * scale)
        x = x.to(memory_format=torch.channels_last)
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


def launch():
    """Seconds per launch of PyTorch's smallest kernel in a CUDA graph, where each launch waits for the previous one."""
    x = torch.zeros(8, device=DEVICE)
    x.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            x.add_(1)
    return in_a_row(graph.replay) / LAUNCHES


def kernels(args):
    """Writes FIGURES/torch.json: the operations of all networks that `respodiff bench` has timed."""
    benches = {}
    if args.earlier and args.earlier.exists():
        earlier = json.loads(args.earlier.read_text())
        benches = {name: value for name, value in earlier.items() if name.startswith("bench-")}
    benches |= {path.stem: json.loads(path.read_text()) for path in args.figures.glob("bench-*.json")}
    if not benches:
        print("not run: there are no figures of the part bench")
        sys.exit(3)
    timer, seconds = Timer(), {}
    result = {"torch": torch.__version__, "launch": launch(), "seconds": seconds}
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.float16) for _ in range(2))
    result["peak_flops"] = 2 * 8192**3 / timer(lambda: a @ b)[0]
    print(f"cuBLAS at 8192: {result['peak_flops'] / 1e12:.0f} TFLOP/s; "
          f"{result['launch'] * 1e6:.2f} us per launch in a graph")
    del a, b
    # The largest networks come last, and the demo's after them, so that the operations that are cut off matter least.
    order = ["bench-sd15", "bench-sdxl", "bench-sd15-training", "bench-sdxl-training"]
    for name in sorted(benches, key=lambda name: (order.index(name) if name in order else len(order), name)):
        for network in benches[name]["networks"]:
            for row in network["rows"]:
                if row["label"] in seconds:
                    continue
                try:
                    prepared = prepare(row["case"])
                    if prepared:
                        seconds[row["label"]] = [prepared[0], *timer(prepared[1])]
                except RuntimeError as problem:
                    print(f"{row['label']}: {str(problem).splitlines()[0]}")
            real_size.write(args.figures / "torch.json", result)


def in_a_row(run):
    """Wall-clock seconds per call of a function that is called several times back to back."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(RUNS):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / RUNS


def in_nhwc(network):
    return network.to(memory_format=torch.channels_last)


def pipeline(name):
    """diffusers' pipeline of a model, with random weights generated on the GPU, in fp16 and channels last."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(real_size.TOKENIZER)
    parts = {part: network.eval() for part, network in real_size.networks(name, DEVICE)}
    parts |= {"tokenizer": tokenizer, "scheduler": DDIMScheduler(**real_size.SCHEDULER)}
    if name == "sdxl":
        pipe = StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                       requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    in_nhwc(pipe.unet), in_nhwc(pipe.vae)
    return pipe


def calls(name, pipe):
    """A step with guidance and a decode, as functions without arguments. They look the networks up in each call."""
    given = {key: tensor.to(DEVICE, torch.float16) for key, tensor in real_size.inputs(name, "unet").items()}
    added = {key: given[key] for key in ("text_embeds", "time_ids") if key in given} or None
    # As in the pipelines, the networks convert their inputs to NHWC themselves.
    sample, latents, timestep = given["sample"], given["sample"][:1].clone(), torch.tensor(481, device=DEVICE)

    def step():
        torch.compiler.cudagraph_mark_step_begin()
        return pipe.unet(sample, timestep, given["encoder_hidden_states"], added_cond_kwargs=added, return_dict=False)

    def decode():
        torch.compiler.cudagraph_mark_step_begin()
        return pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)

    return step, decode


def whole(pipe):
    """Median seconds of an image by diffusers, without writing a file."""
    seconds = []
    for i in range(IMAGES + 2):
        begin = time.perf_counter()
        pipe(PROMPT, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(i))
        seconds.append(time.perf_counter() - begin)
    # The first images also pay for compiling and recording.
    return statistics.median(seconds[2:])


def ours(program, folder):
    """Seconds of an image by `respodiff sample` including its file, and of the start before the first image, from two
    runs of different lengths."""
    pictures, seconds = folder / "pictures", []
    pictures.mkdir(exist_ok=True)
    for count in (1, 1 + IMAGES):
        line = [program, "sample", PROMPT, "--model", folder, "--device", DEVICE, "--images", count, "--steps", STEPS,
                "--scheduler", "DDIM", "--seed", 1, "--out", pictures]
        begin = time.perf_counter()
        subprocess.run(list(map(str, line)), check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - begin)
    shutil.rmtree(pictures)
    image = (seconds[1] - seconds[0]) / IMAGES
    return image, seconds[0] - image


@torch.no_grad()
def images(args):
    """Writes FIGURES/images-MODEL.json: a step, a decode and a whole image of diffusers, and a whole image of ours."""
    name, done = args.model, {}

    def tell(figure, seconds):
        done[figure] = seconds
        print(f"{name}, {figure}: {seconds:.4f} s", flush=True)
        real_size.write(args.figures / f"images-{name}.json", done)

    real_size.make(name, args.checkpoint, DEVICE)
    try:
        image, start = ours(args.respodiff, args.checkpoint)
        tell("image, respodiff", image)
        tell("start to first image, respodiff", start + image)
    except subprocess.CalledProcessError as problem:
        # PyTorch's figures are useful all the same.
        print(problem, flush=True)
        args.failed = True

    pipe = pipeline(name)
    step, decode = calls(name, pipe)

    def measure(how):
        begin = time.perf_counter()
        for call in (step, decode):
            for _ in range(4):  # Compiles, records, and replays.
                call()
        torch.cuda.synchronize()
        tell(f"first calls, {how}", time.perf_counter() - begin)
        tell(f"unet, {how}", in_a_row(step))
        tell(f"vae, {how}", in_a_row(decode))

    measure("eager")
    if pipe.vae.config.force_upcast:
        # This is what diffusers ships: the VAE is converted to fp32 and back for every decode.
        tell("image, eager, decode in fp32", whole(pipe))
        pipe.vae.float()
        tell("vae, eager, fp32", in_a_row(decode))
        pipe.vae.half()
        pipe.vae.register_to_config(force_upcast=False)
    tell("image, eager", whole(pipe))
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, **COMPILE)
    pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True, **COMPILE)
    measure("compiled")
    tell("image, compiled", whole(pipe))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("kernels", "images"))
    parser.add_argument("figures", type=pathlib.Path, help="folder of the figures")
    parser.add_argument("--earlier", type=pathlib.Path, help="gpu.json with figures of earlier calls")
    parser.add_argument("--model", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="folder for a checkpoint of that model")
    parser.add_argument("--respodiff", default="./respodiff")
    parser.set_defaults(failed=False)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"not run: PyTorch {torch.__version__} sees no GPU")
        sys.exit(3)
    torch.backends.cudnn.benchmark = True
    try:
        kernels(args) if args.task == "kernels" else images(args)
        sys.exit(args.failed)
    except ImportError:
        traceback.print_exc()
        sys.exit(3)


if __name__ == "__main__":
    main()
