"""Builds the checkpoints, then records text-encoder, UNet and VAE calls on them."""

import shutil

import build
import calls
from common import CHECKPOINTS


def record(args):
    for name, make in build.BUILDERS.items():
        shutil.rmtree(CHECKPOINTS / name, ignore_errors=True)
        make(CHECKPOINTS / name)
    calls.record()
