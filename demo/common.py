"""Folders, seeds and batches of pictures that the training scripts share."""

import copy
import os
import random
from pathlib import Path

import numpy as np
import torch

from draw import draw

HERE = Path(__file__).resolve().parent
MODEL = HERE / "model"
CLIP = HERE / "clip"
XL = HERE / "xl"  # the same portraits, as a checkpoint in SDXL's layout
CACHE = HERE / "cache"  # latents and full-precision weights; not in git
THREADS = int(os.environ.get("OMP_NUM_THREADS", 2))


def begin(seed):
    """Fixes every source of randomness and prepares the cache folder."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(seed)
    CACHE.mkdir(exist_ok=True)
    return random.Random(seed)


def pictures(people, seeds):
    """Drawings as a float tensor [N, 3, 64, 64] in -1..1."""
    stack = np.stack([np.asarray(draw(p, s)) for p, s in zip(people, seeds)])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1


def cosine(step, steps, warmup=100):
    """Factor of the learning rate: linear warm-up, then half a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.49 * (1 + np.cos(np.pi * (step - warmup) / max(1, steps - warmup)))


def save_half(module, folder):
    """Writes `module` as fp16 safetensors in the layout of `save_pretrained`, without changing it."""
    copy.deepcopy(module).half().save_pretrained(folder, safe_serialization=True)
