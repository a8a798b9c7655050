#!/usr/bin/env python3
"""Runs an evaluation in parts on a Ray cluster, and merges them.

    pip install ray
    scripts/ray_eval.py --parts 8 --gpus 1 --out /shared/report -- \\
        respodiff eval fairness --concepts woman.safetensors,man.safetensors --model ./sd15

The folder is on a file system that all nodes see, and the command is installed on all of them. The folder gets part-0,
part-1, ..., and `whole` with the report of all. A part whose node is lost is continued elsewhere, and a driver that was
killed continues all parts when it is called again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import ray


def part(command, index, parts, folder, cwd):
    """Runs one part. A failure carries the last lines that the command wrote."""
    words = [*command, "--shard", f"{index}/{parts}", "--out", str(folder / f"part-{index}")]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"part {index} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return index


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--parts", type=int, required=True, help="number of parts")
    args.add_argument("--out", type=lambda text: Path(text).absolute(), required=True, help="folder to write")
    args.add_argument("--cpus", type=float, default=1, help="processor cores of each part")
    args.add_argument("--gpus", type=float, default=0, help="GPUs of each part")
    args.add_argument("--retries", type=int, default=3, help="how often a part is begun again on a lost node")
    args.add_argument("--address", help="address of the cluster [default: this machine or RAY_ADDRESS]")
    args.add_argument("command", nargs="+", help="the evaluation, without --out and --shard")
    args = args.parse_args()
    if args.parts < 1:
        sys.exit(f"--parts {args.parts}: give 1 or more")
    whole = args.out / "whole"
    if whole.exists():
        sys.exit(f"{whole} is there already; delete it, or give another folder")
    args.out.mkdir(parents=True, exist_ok=True)

    ray.init(address=args.address, log_to_driver=False)
    remote = ray.remote(num_cpus=args.cpus, num_gpus=args.gpus, max_retries=args.retries)(part)
    waiting = [remote.remote(args.command, i, args.parts, args.out, Path.cwd()) for i in range(args.parts)]
    while waiting:
        done, waiting = ray.wait(waiting)
        try:
            index = ray.get(done[0])
        except ray.exceptions.RayError as error:
            sys.exit(f"{error}\nThe other parts are kept: call this again to continue.")
        print(f"part {index} is done, {len(waiting)} left", flush=True)
    folders = [str(args.out / f"part-{i}") for i in range(args.parts)]
    sys.exit(subprocess.run([args.command[0], "eval", "merge", *folders, "--out", str(whole)]).returncode)


if __name__ == "__main__":
    main()
