"""Shared helpers: paths, seeded tensors, non-degenerate weights, case files."""

import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import save

ROOT = Path(__file__).resolve().parent
CHECKPOINTS = ROOT / "checkpoints"
CASES = ROOT / "cases"

#: Checkpoints whose weight files carry the `.fp16` variant in their names.
VARIANTS = {"sd2": "fp16"}


def generator(label):
    """A CPU generator seeded by a label, so that adding a case moves no other."""
    return torch.Generator().manual_seed(zlib.crc32(label.encode()))


def randn(label, *shape):
    """Unit normals that depend on the label and the shape only."""
    return torch.randn(*shape, generator=generator(label))


def save_case(name, tensors, metadata=None):
    """Writes cases/<name>.safetensors; metadata values that are no strings become JSON."""
    CASES.mkdir(exist_ok=True)
    tensors = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
    for key, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{name}: {key} is not finite")
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value, allow_nan=False)
        for key, value in (metadata or {}).items()
    }
    data = save(tensors, metadata=metadata or None)
    (CASES / f"{name}.safetensors").write_bytes(sorted_header(data))


def sorted_header(data):
    """A safetensors file with its header in a fixed order; the library's order varies."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":"))
    header = header.ljust((len(header) + 7) // 8 * 8).encode()
    return len(header).to_bytes(8, "little") + header + data[end:]


def gain(name):
    """How strongly a matrix acts: attention sharper than uniform, outputs of order one."""
    if name.endswith(("to_q.weight", "to_k.weight", "q_proj.weight", "k_proj.weight")):
        return 1.4
    return 1.0


@torch.no_grad()
def randomise(module, label):
    """Fills every parameter with seeded values rounded to fp16.

    Norms get weights near one and biases off zero, and all other biases are off zero
    too, so that a bias left out or two norms swapped change the result.
    """
    for name, parameter in module.named_parameters():
        values = randn(f"{label}/{name}", *parameter.shape)
        owner = name.rsplit(".", 2)[-2]
        if "embedding" in owner and parameter.ndim == 2 and "linear" not in owner:
            values *= 0.5
        elif parameter.ndim >= 2:
            values *= gain(name) / parameter[0].numel() ** 0.5
        elif "norm" in owner and name.endswith("weight"):
            values = 1 + 0.2 * values
        else:
            values *= 0.15
        parameter.copy_(values.half())
    return module.eval()
