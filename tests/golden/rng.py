"""Records normals drawn by torch's CPU generator: cases/rng.safetensors."""

import torch

from common import save_case

#: Below 16 values torch draws one by one, from 16 on in blocks of 16; both sides count.
LENGTHS = [1, 3, 15, 16, 17, 31, 40, 256, 4 * 8 * 8 + 5]
SEEDS = [0, 1, 42, 2**32 + 5, 2**63 + 11]


def record(args):
    tensors = {}
    for seed in SEEDS:
        for length in LENGTHS:
            draw = torch.Generator().manual_seed(seed)
            tensors[f"out.{seed}.{length}"] = torch.randn(length, generator=draw)
        # Two draws from one generator, as ancestral samplers make them: the first leaves
        # the generator at a place that depends on how it was drawn.
        for first, second in [(3, 5), (20, 35), (140, 140)]:
            draw = torch.Generator().manual_seed(seed)
            parts = [torch.randn(count, generator=draw) for count in (first, second)]
            tensors[f"out.{seed}.{first}+{second}"] = torch.cat(parts)
    save_case("rng", tensors, {"seeds": SEEDS})
