"""Regenerates the golden files: python make.py [--clip-tokenizer FOLDER] [MODULE ...]"""

import argparse
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

#: In order: what comes later reads the checkpoints that `models` writes.
MODULES = ["models", "half", "gradients", "trainers", "concepts", "adapters", "reuse", "tgate", "clip", "quality", "safety", "pickles", "pipelines", "init_images", "prompts", "single", "tokenizer", "rng", "schedulers", "samplers"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clip-tokenizer", type=Path, help="folder of the real CLIP vocabulary")
    parser.add_argument("modules", nargs="*", help=f"some of {', '.join(MODULES)}; default all")
    args = parser.parse_args()
    unknown = set(args.modules) - set(MODULES)
    if unknown:
        parser.error(f"no such module: {', '.join(sorted(unknown))}")

    import torch

    torch.set_num_threads(2)
    for name in args.modules or MODULES:
        if not (ROOT / f"{name}.py").exists():
            print(f"{name}: no such recorder here, skipped")
            continue
        print(f"{name} ...", flush=True)
        importlib.import_module(name).record(args)


if __name__ == "__main__":
    main()
