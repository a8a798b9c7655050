"""Makes the table of everything that `gpu-check` found: `gpu_table.py FIGURES RESULTS`.

Adds FIGURES/*.json to RESULTS/gpu.json, which keeps the figures of earlier calls, writes all of them as tables to
RESULTS/gpu.md, and prints a short summary: the time of each network beside PyTorch's, the share of each family of
operations, and the operations that lose the most time.
"""

import json
import pathlib
import sys

MODELS = ["sd15", "sdxl"]
BENCHES = [*MODELS, *(f"{model}-training" for model in MODELS), "demo", "demo-training"]
STEPS = 20  # of an image, for adding up the time lost in steps and in the decode
WORST = 8  # number of operations to show


def family(row):
    """The family of an operation."""
    case = row["case"]
    kind = case["kind"]
    if kind == "conv" and case["kernel"] == 1:
        return "GEGLU linear" if case["gated"] else "linear"
    if kind == "conv":
        return "conv 3x3"
    if kind == "attention":
        return "self attention" if case["queries"] == case["keys"] else "cross attention"
    return {"group_norm": "group norm", "layer_norm": "layer norm"}.get(kind, "others")


def benches(figures):
    """The reports of `respodiff bench`, by the model's name."""
    return [(name, figures[f"bench-{name}"]) for name in BENCHES if f"bench-{name}" in figures]


def rivals(figures):
    """PyTorch's seconds of operations by their label, on a cold cache and a warm one."""
    return {label: times for label, (_, *times) in figures.get("torch", {}).get("seconds", {}).items()}


def families(network, rival):
    """The seconds of each family, and their ratio to PyTorch's over the operations that were timed in both."""
    sums = {}
    for row in network["rows"]:
        ours, compared, theirs = sums.get(family(row), (0, 0, 0))
        seconds = row["seconds"] * row["count"]
        if row["label"] in rival:
            compared, theirs = compared + seconds, theirs + rival[row["label"]][0] * row["count"]
        sums[family(row)] = ours + seconds, compared, theirs
    longest = sorted(sums.items(), key=lambda item: -item[1][0])
    return [(name, ours, compared / theirs if theirs else None) for name, (ours, compared, theirs) in longest]


def bound(row, peaks):
    """Seconds that an operation would take at the best rates that our kernels reach anywhere."""
    return max(row["flops"] / peaks["flops"], row["bytes"] / peaks["bytes"], peaks["launch"])


def losses(model, figures):
    """Operations of an image by the time lost in each: the time beyond PyTorch's, or where PyTorch has no such
    operation beyond the time at our best rates."""
    bench, rival, found = figures.get(f"bench-{model}"), rivals(figures), []
    for network in bench["networks"] if bench else []:
        times = STEPS if network["network"] == "unet" else 1
        for row in network["rows"]:
            best = rival[row["label"]][0] if row["label"] in rival else bound(row, bench["peaks"])
            found.append(((row["seconds"] - best) * row["count"] * times, network["network"], row))
    return [loss for loss in sorted(found, key=lambda loss: -loss[0])[:WORST] if loss[0] > 0]


def ratio(ours, theirs):
    return f"{ours / theirs:.2f}" if theirs else "-"


def grid(lines):
    """Columns of a common width, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
            for line in lines]


def head(figures):
    doctor = figures.get("doctor", {})
    # The driver chooses the first capable GPU.
    gpus = [gpu["name"] for gpu in doctor.get("gpus", [])]
    return (f"{figures.get('machine') or ', '.join(gpus)}; driver of CUDA {doctor.get('driver')}, "
            f"respodiff {doctor.get('version')}, PyTorch {figures.get('torch', {}).get('torch', 'not run')}")


def outcomes(figures):
    """Lines of a part: outcome, seconds, the clocks before and after."""
    parts = {name[len("part-"):]: part for name, part in figures.items() if name.startswith("part-")}
    return [["part", "outcome", "s", "clock, temperature, power before", "after"],
            *([name, part["outcome"], str(part["seconds"]), part["before"], part["after"]]
              for name, part in parts.items())]


def steps(figures):
    """A line per network: milliseconds of ours, of diffusers compiled and eager, and the ratio of ours to compiled."""
    lines = [["ms", "ours", "compiled", "eager", "ours / compiled"]]
    milliseconds = lambda seconds: f"{seconds * 1e3:.2f}" if seconds else "-"
    for model, bench in benches(figures):
        images = figures.get(f"images-{model}", {})
        for network in bench["networks"]:
            which, ours = network["network"], network["step"]
            compiled, eager = (images.get(f"{which}, {how}") for how in ("compiled", "eager"))
            lines.append([f"{model} {which}", *map(milliseconds, (ours, compiled, eager)), ratio(ours, compiled)])
            if slow := images.get(f"{which}, eager, fp32"):
                lines.append(["  in fp32, as diffusers ships it", "", "", milliseconds(slow), ""])
    for model in MODELS:
        images = figures.get(f"images-{model}", {})
        if images:
            ours, compiled, eager = (images.get(f"image, {who}") for who in ("respodiff", "compiled", "eager"))
            lines.append([f"{model} image, {STEPS} steps", *map(milliseconds, (ours, compiled, eager)),
                          ratio(ours, compiled) if ours else "-"])
            if slow := images.get("image, eager, decode in fp32"):
                lines.append(["  decoded in fp32, as diffusers ships it; above, force_upcast is off", "", "",
                              milliseconds(slow), ""])
            start, compiling = (images.get(key) for key in ("start to first image, respodiff", "first calls, compiled"))
            lines.append([f"{model} start to first image; compiling", *map(milliseconds, (start, compiling)), "", ""])
    return lines


def summary(figures):
    """The short summary."""
    rival, lines = rivals(figures), [f"== figures: {head(figures)}", *grid(outcomes(figures)), ""]
    lines += [*grid(steps(figures)), ""]
    launches = {"ours": next((bench["peaks"]["launch"] for _, bench in benches(figures)), None),
                "PyTorch": figures.get("torch", {}).get("launch")}
    lines += ["a launch in a graph: " + ", ".join(f"{who} {s * 1e6:.2f} us" for who, s in launches.items() if s), ""]
    lines.append("share of each family, operations timed one by one on a cold cache, and its time beside PyTorch's")
    for model, bench in benches(figures):
        for network in bench["networks"]:
            total = sum(row["seconds"] * row["count"] for row in network["rows"])
            if network["network"].startswith("text") or model.startswith("demo") or not total:
                continue
            shares = (f"{name} {100 * ours / total:.0f} %" + (f" x{beside:.2f}" if beside else "")
                      for name, ours, beside in families(network, rival))
            lines.append(f"{model} {network['network']}: {', '.join(shares)}")
    for model in MODELS:
        lost = losses(model, figures)
        if not lost:
            continue
        table = [[f"{model}: most ms lost in an image of {STEPS} steps", "lost", "times", "us", "warm", "PyTorch",
                  "warm"]]
        for seconds, network, row in lost:
            cold, warm = rival.get(row["label"], (None, None))
            us = [f"{s * 1e6:.1f}" if s else "-" for s in (row["seconds"], row["warm"], cold, warm)]
            table.append([f"{network} {row['label']}", f"{seconds * 1e3:.2f}", str(row["count"]), *us])
        lines += ["", *grid(table)]
    return "\n".join(lines) + "\n"


def markdown(figures):
    """The whole report."""
    rival = figures.get("torch", {}).get("seconds", {})

    def rows(lines):
        first, *others = lines
        return ["| " + " | ".join(cells) + " |" for cells in (first, ["---"] * len(first), *others)]

    lines = ["# Kernels on a GPU", "", head(figures) + ".", "", *rows(outcomes(figures)), "", *rows(steps(figures))]
    for name, real in figures.items():
        if not name.startswith("real-"):
            continue
        lines += ["", f"## {name[len('real-'):]} at full size against fp32", ""]
        lines += rows([["network", "error", "s to load", "first call", "again"], *(
            [part, f"{of['error']:.1e}", f"{of['ours']['load']:.1f}", f"{of['ours']['call']:.4f}",
             f"{of['ours']['again']:.4f}"] for part, of in real.items())])
    for model, bench in benches(figures):
        peaks = bench["peaks"]
        lines += ["", f"## {model}, batch {bench['batch']}", ""]
        lines.append(f"Our best: {peaks['flops'] / 1e12:.0f} TFLOP/s, {peaks['bytes'] / 1e9:.0f} GB/s, "
                     f"{peaks['launch'] * 1e6:.2f} us per launch in a graph.")
        for network in bench["networks"]:
            total = sum(row["seconds"] * row["count"] for row in network["rows"])
            step = network["step"] * 1e3
            lines += ["", f"### {network['network']}: {step:.3f} ms per step, {total * 1e3:.3f} ms one by one", ""]
            table = [["operation", "count", "us", "warm", "TFLOP/s", "GB/s", "% of best", "PyTorch us", "warm",
                      "kernels"]]
            for row in network["rows"]:
                seconds = max(row["seconds"], 1e-12)
                who, cold, warm = rival.get(row["label"], ("", None, None))
                table.append([
                    row["label"], str(row["count"]), f"{seconds * 1e6:.1f}",
                    f"{row['warm'] * 1e6:.1f}" if row["warm"] else "-",
                    f"{row['flops'] / seconds / 1e12:.1f}" if row["flops"] else "-",
                    f"{row['bytes'] / seconds / 1e9:.0f}", f"{100 * bound(row, peaks) / seconds:.0f}",
                    f"{cold * 1e6:.1f} ({who})" if cold else "-", f"{warm * 1e6:.1f}" if warm else "-", row["kernels"]])
            lines += rows(table)
    return "\n".join(lines) + "\n"


def main(found, results):
    figures, problems = {}, []
    for path in [results / "gpu.json", *sorted(found.glob("*.json"))]:
        if path.exists():
            try:
                value = json.loads(path.read_text())
                figures |= value if path.name == "gpu.json" else {path.stem: value}
            except ValueError as problem:
                problems.append(f"{path}: {problem}")
    for name, text in (("gpu.json", json.dumps(figures, indent=1)), ("gpu.md", markdown(figures))):
        beside = results / (name + ".part")
        beside.write_text(text)
        beside.replace(results / name)
    print(summary(figures), end="")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*map(pathlib.Path, sys.argv[1:]))
