"""Stable Diffusion 1.5's UNet beside OpenVINO: python benches/peers/unet.py FOLDER PROGRAM... [--rounds N] [--threads N]

Makes a UNet of full size with random fp16 weights in FOLDER, unless it is there, and runs a guided step of 512x512 pixels (two
rows of 77 tokens) in fp32 on the CPU: in every round by OpenVINO and by each PROGRAM (`respodiff`, or several builds of it),
each in a process of its own with as many threads, one after the other. What counts is the second call of a process, and the
peak of its memory. Prints medians with least and most, ratios to OpenVINO's of the same round, and how far each PROGRAM's
output is from OpenVINO's (relative L2).

OpenVINO's graph is built here from its operations, in NCHW as its frontends make it, so that no other framework is needed:
pip install -r benches/peers/requirements.txt
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

CHANNELS = (320, 640, 1280, 1280)
LAYERS, HEADS, CONTEXT, GROUPS, TIME, TIMESTEP = 2, 8, 768, 32, 1280, 500.0
CONFIG = dict(
    _class_name="UNet2DConditionModel", sample_size=64, cross_attention_dim=CONTEXT, attention_head_dim=HEADS,
    block_out_channels=CHANNELS, layers_per_block=LAYERS,
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
INPUTS = {"sample": (2, 4, 64, 64), "timestep": (1,), "encoder_hidden_states": (2, 77, CONTEXT)}


def write_tensors(path, tensors):
    """A safetensors file."""
    names = {np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}
    header, end = {}, 0
    for name, x in tensors.items():
        header[name] = dict(dtype=names[x.dtype], shape=x.shape, data_offsets=(end, end + x.nbytes))
        end += x.nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            file.write(np.ascontiguousarray(x).data)


def read_tensors(path):
    """All of a safetensors file, mapped."""
    size = int.from_bytes(open(path, "rb").read(8), "little")
    header = json.loads(open(path, "rb").read(8 + size)[8:])
    numbers, types = np.memmap(path, np.uint8, "r", 8 + size), {"F16": np.float16, "F32": np.float32}
    return {
        name: numbers[slice(*tensor["data_offsets"])].view(types[tensor["dtype"]]).reshape(tensor["shape"])
        for name, tensor in header.items() if name != "__metadata__"
    }


class Names:
    """Stands for OpenVINO's operations where only the weights' names and shapes are wanted."""

    def __getattr__(self, _):
        return lambda *args, **named: self

    def __getitem__(self, _):
        return self


class UNet:
    """The graph, as diffusers lays it out; `weight(name, shape)` gives each tensor."""

    def __init__(self, ops, weight):
        self.ops, self.weight = ops, weight

    def vector(self, name, width, shape):
        return self.ops.constant(self.weight(name, (width,)).reshape(shape))

    def conv(self, x, name, inputs, outputs, kernel=3, stride=1):
        weight, pad = self.ops.constant(self.weight(f"{name}.weight", (outputs, inputs, kernel, kernel))), [kernel // 2] * 2
        y = self.ops.convolution(x, weight, [stride] * 2, pad, pad, [1, 1])
        return self.ops.add(y, self.vector(f"{name}.bias", outputs, (1, -1, 1, 1)))

    def linear(self, x, name, inputs, outputs, bias=True):
        y = self.ops.matmul(x, self.ops.constant(self.weight(f"{name}.weight", (outputs, inputs))), False, True)
        return self.ops.add(y, self.vector(f"{name}.bias", outputs, (-1,))) if bias else y

    def group_norm(self, x, name, c, eps):
        scale, shift = (self.vector(f"{name}.{part}", c, (-1,)) for part in ("weight", "bias"))
        return self.ops.group_normalization(x, scale, shift, GROUPS, eps)

    def layer_norm(self, x, name, c):
        y = self.ops.mvn(x, np.array([-1]), True, 1e-5, "inside_sqrt")
        y = self.ops.multiply(y, self.vector(f"{name}.weight", c, (-1,)))
        return self.ops.add(y, self.vector(f"{name}.bias", c, (-1,)))

    def resnet(self, x, name, inputs, outputs):
        y = self.conv(self.ops.swish(self.group_norm(x, f"{name}.norm1", inputs, 1e-5)), f"{name}.conv1", inputs, outputs)
        time = self.linear(self.ops.swish(self.time), f"{name}.time_emb_proj", TIME, outputs)
        y = self.ops.add(y, self.ops.reshape(time, np.array([1, -1, 1, 1]), False))
        y = self.conv(self.ops.swish(self.group_norm(y, f"{name}.norm2", outputs, 1e-5)), f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            x = self.conv(x, f"{name}.conv_shortcut", inputs, outputs, 1)
        return self.ops.add(x, y)

    def attention(self, x, name, c, context, width):
        def heads(x):
            return self.ops.transpose(self.ops.reshape(x, np.array([0, 0, HEADS, c // HEADS]), True), np.array([0, 2, 1, 3]))

        q = heads(self.linear(x, f"{name}.to_q", c, c, False))
        k, v = (heads(self.linear(context, f"{name}.to_{part}", width, c, False)) for part in "kv")
        y = self.ops.transpose(self.ops.scaled_dot_product_attention(q, k, v), np.array([0, 2, 1, 3]))
        return self.linear(self.ops.reshape(y, np.array([0, 0, c]), True), f"{name}.to_out.0", c, c)

    def transformer(self, x, name, c, side):
        skip, block = x, f"{name}.transformer_blocks.0"
        x = self.conv(self.group_norm(x, f"{name}.norm", c, 1e-6), f"{name}.proj_in", c, c, 1)
        x = self.ops.transpose(self.ops.reshape(x, np.array([0, c, side * side]), True), np.array([0, 2, 1]))
        y = self.layer_norm(x, f"{block}.norm1", c)
        x = self.ops.add(x, self.attention(y, f"{block}.attn1", c, y, c))
        y = self.layer_norm(x, f"{block}.norm2", c)
        x = self.ops.add(x, self.attention(y, f"{block}.attn2", c, self.context, CONTEXT))
        y = self.linear(self.layer_norm(x, f"{block}.norm3", c), f"{block}.ff.net.0.proj", c, 8 * c)
        values, gates = (self.ops.slice(y, *(np.array([i]) for i in (4 * c * half, 4 * c * (half + 1), 1, 2))) for half in (0, 1))
        y = self.linear(self.ops.multiply(values, self.ops.gelu(gates, "erf")), f"{block}.ff.net.2", 4 * c, c)
        x = self.ops.transpose(self.ops.add(x, y), np.array([0, 2, 1]))
        x = self.ops.reshape(x, np.array([0, c, side, side]), True)
        return self.ops.add(skip, self.conv(x, f"{name}.proj_out", c, c, 1))

    def build(self, sample, sinusoid, context):
        self.context, side = context, INPUTS["sample"][2]
        time = self.ops.swish(self.linear(sinusoid, "time_embedding.linear_1", CHANNELS[0], TIME))
        self.time = self.linear(time, "time_embedding.linear_2", TIME, TIME)
        x, width = self.conv(sample, "conv_in", 4, CHANNELS[0]), CHANNELS[0]
        skips = [(x, width)]
        for i, c in enumerate(CHANNELS):
            for j in range(LAYERS):
                x = self.resnet(x, f"down_blocks.{i}.resnets.{j}", width, c)
                width = c
                if i < 3:
                    x = self.transformer(x, f"down_blocks.{i}.attentions.{j}", c, side)
                skips.append((x, c))
            if i < 3:
                x, side = self.conv(x, f"down_blocks.{i}.downsamplers.0.conv", c, c, 3, 2), side // 2
                skips.append((x, c))
        x = self.resnet(x, "mid_block.resnets.0", width, width)
        x = self.transformer(x, "mid_block.attentions.0", width, side)
        x = self.resnet(x, "mid_block.resnets.1", width, width)
        for i, c in enumerate(reversed(CHANNELS)):
            for j in range(LAYERS + 1):
                skip, skip_width = skips.pop()
                x = self.resnet(self.ops.concat([x, skip], 1), f"up_blocks.{i}.resnets.{j}", width + skip_width, c)
                width = c
                if i > 0:
                    x = self.transformer(x, f"up_blocks.{i}.attentions.{j}", c, side)
            if i < 3:
                side *= 2
                x = self.ops.interpolate(
                    x, np.array([side, side]), "nearest", "sizes", axes=np.array([2, 3]), nearest_mode="floor",
                    coordinate_transformation_mode="asymmetric")
                x = self.conv(x, f"up_blocks.{i}.upsamplers.0.conv", c, c)
        return self.conv(self.ops.swish(self.group_norm(x, "conv_norm_out", width, 1e-5)), "conv_out", width, 4)


def make(folder):
    """The checkpoint and the inputs, unless they are there; the configuration is written last."""
    done = folder / "unet/config.json"
    if done.exists():
        return
    random, tensors = np.random.default_rng(1), {}

    def weight(name, shape):
        scale, center = (math.sqrt(3 / math.prod(shape[1:])), 0) if len(shape) > 1 else (0.1, "norm" in name and "weight" in name)
        tensors[name] = (random.random(shape, np.float32) * 2 * scale - scale + center).astype(np.float16)
        return tensors[name]

    UNet(Names(), weight).build(None, None, None)
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "unet/diffusion_pytorch_model.safetensors", tensors)
    inputs = {name: random.standard_normal(shape, np.float32) for name, shape in INPUTS.items()}
    inputs["timestep"][:] = TIMESTEP
    write_tensors(folder / "inputs.safetensors", inputs)
    done.write_text(json.dumps(CONFIG))


def openvino(folder, threads, output):
    """In a process of its own: two calls; prints the second's seconds and the peak."""
    import openvino as ov
    from openvino import opset15 as ops

    start = time.perf_counter()
    tensors, inputs = read_tensors(folder / "unet/diffusion_pytorch_model.safetensors"), read_tensors(folder / "inputs.safetensors")
    parameters = [ops.parameter(list(INPUTS["sample"]), np.float32), ops.parameter([1, CHANNELS[0]], np.float32),
                  ops.parameter(list(INPUTS["encoder_hidden_states"]), np.float32)]
    result = UNet(ops, lambda name, shape: tensors[name].astype(np.float32)).build(*parameters)
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(ov.Model([result], parameters, "unet"), "CPU", config)
    loaded = time.perf_counter() - start
    angles = TIMESTEP * np.exp(-math.log(10000) * np.arange(CHANNELS[0] // 2) / (CHANNELS[0] // 2))
    sinusoid = np.concatenate([np.cos(angles), np.sin(angles)]).astype(np.float32)[None]
    for _ in range(2):
        start = time.perf_counter()
        result = compiled([inputs["sample"], sinusoid, inputs["encoder_hidden_states"]])[0]
        call = time.perf_counter() - start
    write_tensors(output, {"sample": np.asarray(result)})
    print(json.dumps(dict(load=loaded, call=call)))


def run(command, threads):
    """A process's text and the peak of its memory, MiB."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env=os.environ | {"RAYON_NUM_THREADS": str(threads)}) as process:
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command}: {text}")
    return text, usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("programs", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--openvino", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.openvino:
        return openvino(args.folder, args.threads, args.openvino)
    make(args.folder)
    theirs, measured = args.folder / "openvino.safetensors", {}
    for _ in range(args.rounds):
        command = [sys.executable, __file__, str(args.folder), "--threads", str(args.threads), "--openvino", str(theirs)]
        text, peak = run(command, args.threads)
        told = json.loads(text.splitlines()[-1])
        measured.setdefault("OpenVINO", []).append((told["call"], told["load"], peak, 0.0))
        for program in args.programs:
            output = args.folder / "ours.safetensors"
            text, peak = run([str(program), "probe", "unet", "--model", str(args.folder), "--inputs",
                              str(args.folder / "inputs.safetensors"), "--output", str(output)], args.threads)
            call, load = float(re.search(r"again ([\d.]+) s", text)[1]), float(re.search(r"weights in ([\d.]+) s", text)[1])
            ours, other = (read_tensors(path)["sample"].astype(np.float64) for path in (output, theirs))
            error = np.linalg.norm(ours - other) / np.linalg.norm(other)
            measured.setdefault(str(program), []).append((call, load, peak, error))
        print(f"round {len(measured['OpenVINO'])}:", {name: round(rows[-1][0], 2) for name, rows in measured.items()}, flush=True)
    for name, rows in measured.items():
        calls, loads, peaks, errors = zip(*rows)
        ratios = [call / other[0] for call, other in zip(calls, measured["OpenVINO"])]
        print(f"{name}: call {statistics.median(calls):.2f} s ({min(calls):.2f} to {max(calls):.2f}), "
              f"{statistics.median(ratios):.2f} of OpenVINO's ({min(ratios):.2f} to {max(ratios):.2f}); "
              f"load {statistics.median(loads):.1f} s; peak {max(peaks):.0f} MiB; off by {max(errors):.1e}")


if __name__ == "__main__":
    main()
