"""Times a UNet step or a decode on the CPU beside OpenVINO, ONNX Runtime and PyTorch.

python benches/peers/compare.py FOLDER PROGRAM... [--network unet|decode] [--rounds N] [--threads N] [--engines NAMES]
[--exact] [--rounded] [--plot FILE.png]

Makes a UNet and a VAE of Stable Diffusion 1.5's size with random fp16 weights in FOLDER, unless they are there
(scripts/real_size.py), and runs a guided step of 512x512 pixels (two CFG rows of 77 tokens) or the decode of one image,
in fp32. In every round, each engine and each PROGRAM (`respodiff`, or several builds of it) runs in a process of its
own with the same number of threads, one after the other. It measures the second call of a process, its peak memory, and
the time until the first call could begin.

PyTorch runs diffusers' network eagerly. OpenVINO and ONNX Runtime get that network as a file, which is made once and is
not timed. Prints medians with minimum and maximum, ratios to the first engine in the same round, and the distance
(relative L2) from the first engine's output or, with `--exact`, from PyTorch's in float64, which takes minutes once.

pip install -r benches/peers/requirements.txt
"""

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import real_size  # noqa: E402

MODEL = "sd15"
COMPONENT = {"unet": "unet", "decode": "vae"}
OUTPUT = {"unet": "sample", "decode": "image"}  # the names that `respodiff probe` uses
NAMES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime", "torch": "PyTorch"}
CALLS = 2  # calls in each process; the last one counts


def inputs(network):
    """The inputs by name, in the order in which the networks take them."""
    return real_size.inputs(MODEL, COMPONENT[network])


def module(folder, network, dtype):
    """diffusers' network as a function of the inputs alone."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from safetensors.torch import load_file as load

    kind = UNet2DConditionModel if network == "unet" else AutoencoderKL
    at = folder / COMPONENT[network]
    with torch.device("meta"):
        inner = kind.from_config(kind.load_config(at))
    weights = {name: tensor.to(dtype) for name, tensor in load(at / "diffusion_pytorch_model.safetensors").items()}
    inner.load_state_dict(weights, assign=True)

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, *given):
            return (self.inner if network == "unet" else self.inner.decode)(*given, return_dict=False)[0]

    return Call().eval()


class Torch:
    def __init__(self, folder, network, threads):
        import torch

        torch.set_num_threads(threads)
        self.torch, self.module = torch, module(folder, network, torch.float32)

    def call(self, given):
        with self.torch.inference_mode():
            return self.module(*given.values()).numpy()


class OpenVino:
    def __init__(self, folder, network, threads):
        import openvino

        config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
                  "PERFORMANCE_HINT": "LATENCY"}
        self.compiled = openvino.Core().compile_model(self.file(folder, network), "CPU", config)

    @staticmethod
    def file(folder, network):
        return folder / f"{network}.xml"

    @staticmethod
    def make(folder, network):
        import openvino
        import torch

        given = inputs(network)
        model = openvino.convert_model(module(folder, network, torch.float32), example_input=tuple(given.values()),
                                       input=[tuple(tensor.shape) for tensor in given.values()])
        # The weights are fp16 numbers, so the file holds them in fp16 without loss.
        openvino.save_model(model, OpenVino.file(folder, network), compress_to_fp16=True)

    def call(self, given):
        return self.compiled([tensor.numpy() for tensor in given.values()])[0]


class OnnxRuntime:
    def __init__(self, folder, network, threads):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            self.file(folder, network), options, providers=["CPUExecutionProvider"])

    @staticmethod
    def file(folder, network):
        return folder / f"{network}_onnx" / "model.onnx"

    @staticmethod
    def make(folder, network):
        import torch

        given, to = inputs(network), OnnxRuntime.file(folder, network).parent
        # Has another name until it is complete: beyond 2 GiB the weights are separate files beside it.
        making = to.with_name(to.name + ".part")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        torch.onnx.export(module(folder, network, torch.float32), tuple(given.values()), str(making / "model.onnx"),
                          dynamo=False, input_names=list(given), opset_version=17)
        shutil.rmtree(to, ignore_errors=True)
        making.rename(to)

    def call(self, given):
        return self.session.run(None, {name: tensor.numpy() for name, tensor in given.items()})[0]


ENGINES = {"openvino": OpenVino, "onnxruntime": OnnxRuntime, "torch": Torch}


def engine(name, folder, network, threads, output):
    """Prints the seconds of loading and of the last call, and the peak memory in MiB. Runs in a process of its own."""
    given = inputs(network)
    start = time.perf_counter()
    made = ENGINES[name](folder, network, threads)
    load = time.perf_counter() - start
    for _ in range(CALLS):
        start = time.perf_counter()
        result = made.call(given)
        call = time.perf_counter() - start
    save_file({OUTPUT[network]: np.ascontiguousarray(result)}, output)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(dict(load=load, call=call, peak=peak)))


def make_inputs(folder, network):
    """Makes the checkpoint, and the network's inputs for our program."""
    # Not the whole checkpoint, as neither network needs the text encoders.
    real_size.make(MODEL, folder, "cpu", whole=False)
    given = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in inputs(network).items()}
    save_file(given, folder / f"{network}_inputs.safetensors")


def make_exact(folder, network):
    """Makes the network's output in float64."""
    import torch

    given = [tensor.double() for tensor in inputs(network).values()]
    with torch.inference_mode():
        result = module(folder, network, torch.float64)(*given)
    save_file({OUTPUT[network]: result.numpy()}, folder / f"{network}_exact.safetensors")


#: The files that are made once. Each maker runs in a process of its own, whose end releases its memory: the peak of a
#: measured process begins at the size of the process that started it.
MAKERS = {"inputs": make_inputs, "exact": make_exact} | {
    name: engine.make for name, engine in ENGINES.items() if hasattr(engine, "make")}


def run(command, threads):
    """Runs a process; returns its output and its peak memory in MiB."""
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env=os.environ | {"RAYON_NUM_THREADS": str(threads)}) as process:
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))}:\n{text}")
    return text, usage.ru_maxrss / 1024


def measure(args, name, given, output):
    """Measures an engine or a program: seconds of a call and of loading, and the peak memory in MiB."""
    if name in ENGINES:
        command = [sys.executable, __file__, args.folder, "--network", args.network, "--threads", args.threads]
        text, _ = run(command + ["--engine", name, "--output", output], args.threads)
        told = json.loads(text.splitlines()[-1])
        return told["call"], told["load"], told["peak"]
    component = {"unet": "unet", "decode": "vae-decode"}[args.network]
    program, _, precision = str(name).partition(" ")
    command = [program, "probe", component, "--model", args.folder, "--inputs", given, "--output", output]
    command += ["--precision", precision] if precision else []
    text, peak = run(command, args.threads)
    return float(re.search(r"again ([\d.]+) s", text)[1]), float(re.search(r"weights in ([\d.]+) s", text)[1]), peak


def plot(measured, args):
    """Draws the times of calls by engine, with their spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name.rpartition("/")[2] for name in measured]
    calls = [[row[0] for row in rows] for rows in measured.values()]
    middle = [statistics.median(row) for row in calls]
    spread = [[m - min(row) for m, row in zip(middle, calls)], [max(row) - m for m, row in zip(middle, calls)]]
    figure, axes = pyplot.subplots(figsize=(7, 0.6 * len(names) + 1.2), layout="constrained")
    colors = ["#a9b4bc" if name in NAMES.values() else "#2a6f97" for name in measured]
    bars = axes.barh(names, middle, xerr=spread, capsize=4, color=colors)
    axes.bar_label(bars, [f" {m:.1f} s" for m in middle], padding=6)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(map(max, calls)))
    what = {"unet": "a guided UNet step", "decode": "a decode"}[args.network]
    figure.suptitle(f"Stable Diffusion 1.5, {what} at 512x512, {args.threads} threads", fontsize=11)
    axes.set_xlabel(f"seconds, median of {len(calls[0])} with minimum and maximum")
    figure.savefig(args.plot, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("programs", nargs="*", type=Path)
    parser.add_argument("--network", choices=COMPONENT, default="unet")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--engines", default=",".join(ENGINES), help="some of openvino,onnxruntime,torch")
    parser.add_argument("--exact", action="store_true", help="measure distances from PyTorch's output in float64")
    parser.add_argument("--plot", type=Path, help="draw the times of calls in this file")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--rounded", action="store_true", help="run every PROGRAM also with --precision bf16 and int8")
    parser.add_argument("--make", choices=MAKERS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        return engine(args.engine, args.folder, args.network, args.threads, args.output)
    if args.make:
        # Tracing warns that it holds for these shapes alone, which is what is wanted.
        warnings.simplefilter("ignore")
        return MAKERS[args.make](args.folder, args.network)
    engines = [name for name in args.engines.split(",") if name]
    if unknown := set(engines) - set(ENGINES):
        parser.error(f"--engines: no {', '.join(unknown)}; there are {', '.join(ENGINES)}")
    if not engines:
        parser.error("--engines: name at least one, with which the others are compared")

    given, kept = (args.folder / f"{args.network}_{what}.safetensors" for what in ("inputs", "exact"))
    wanted = ["inputs"] + ["exact"] * (args.exact and not kept.exists())
    wanted += [name for name in engines
               if name in MAKERS and not ENGINES[name].file(args.folder, args.network).exists()]
    for name in wanted:
        print(f"making {NAMES.get(name, name)}", flush=True)
        command = [sys.executable, __file__, args.folder, "--network", args.network, "--make", name]
        subprocess.run(command, check=True)
    right = load_file(kept)[OUTPUT[args.network]] if args.exact else None
    if args.rounded:
        args.programs += [f"{program} {precision}" for program in args.programs for precision in ("bf16", "int8")]

    measured, output = {}, args.folder / "output.safetensors"
    for number in range(args.rounds):
        first = right
        for name in engines + args.programs:
            row = measure(args, name, given, output)
            result = load_file(output)[OUTPUT[args.network]].astype(np.float64)
            first = result if first is None else first
            error = np.linalg.norm(result - first) / np.linalg.norm(first)
            measured.setdefault(NAMES.get(name, str(name)), []).append((*row, error))
        print(f"round {number + 1}:", {name: round(rows[-1][0], 2) for name, rows in measured.items()}, flush=True)
    base = measured[NAMES[engines[0]]]
    for name, rows in measured.items():
        calls, loads, peaks, errors = zip(*rows)
        ratios = [call / other[0] for call, other in zip(calls, base)]
        print(f"{name}: call {statistics.median(calls):.2f} s ({min(calls):.2f} to {max(calls):.2f}), "
              f"{statistics.median(ratios):.2f} of {NAMES[engines[0]]}'s ({min(ratios):.2f} to {max(ratios):.2f}); "
              f"load {statistics.median(loads):.1f} s; peak {max(peaks):.0f} MiB; off by {max(errors):.1e}")
    if args.plot:
        plot(measured, args)
        print(args.plot)


if __name__ == "__main__":
    main()
