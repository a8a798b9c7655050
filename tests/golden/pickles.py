"""Files that torch.save wrote: the official checkpoint's layout, SDisc's, and what must be refused."""

import json
import os
import sys
import types
from collections import OrderedDict

import numpy
import torch
from safetensors.torch import load_file

from common import CHECKPOINTS, ROOT, randn

FOLDER = ROOT / "pickles"
#: Of the demo's bottleneck: 128 channels of 2x2 stand for 4x4, to keep the files small.
ROWS = 128 * 2 * 2


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/respodiff-was-tricked",)


def record(args):
    FOLDER.mkdir(exist_ok=True)
    ram, sam = randn("pickle/ram", ROWS, 10), randn("pickle/sam", ROWS, 10)
    (FOLDER / "expected.json").write_text(json.dumps(ram[:40, 0].tolist()))
    state = OrderedDict([("controlnet.fc1.weight", ram), ("controlnet_residual.fc2.weight", sam)])
    state._metadata = OrderedDict(version=1)
    torch.save(state, FOLDER / "official.pth")
    # Parameters, a view with strides and an offset of a shared storage, and half precision.
    whole = torch.zeros(ROWS, 24)
    whole[:, 3:23:2] = ram
    strided = {"controlnet.fc1.weight": torch.nn.Parameter(whole[:, 3:23:2]),
               "controlnet_residual.fc2.weight": sam.t().contiguous().t()}
    torch.save({"state_dict": strided, "step": 7}, FOLDER / "strided.pth")
    torch.save(randn("pickle/sdisc", ROWS, 8).half(), FOLDER / "sdisc.pth")
    torch.save({"controlnet.fc1.weight": ram[:, :1].clone(), "x": Malicious()}, FOLDER / "malicious.pth")
    torch.save(state, FOLDER / "old.pth", _use_new_zipfile_serialization=False)
    record_checkpoints(ram)


def record_checkpoints(ram):
    """What trainers save, and a part of a diffusers folder before safetensors."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        sys.modules[part] = module = types.ModuleType(part)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    torch.save(
        {
            "epoch": 3,
            "global_step": 1000,
            "pytorch-lightning_version": "1.4.2",
            "state_dict": OrderedDict([("controlnet.fc1.weight", ram), ("steps", torch.tensor(7, dtype=torch.int32))]),
            "callbacks": {module.ModelCheckpoint: {"best_model_score": numpy.float64(0.5), "seen": {1, 2}}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}],
            "lr_schedulers": [],
        },
        FOLDER / "lightning.ckpt",
    )
    state = load_file(CHECKPOINTS / "sd1/text_encoder/model.safetensors")
    # A matrix in columns, a part of a larger storage, and other formats, all of the same numbers.
    transposed = "text_model.encoder.layers.0.mlp.fc1.weight"
    state[transposed] = state[transposed].t().contiguous().t()
    bias = "text_model.encoder.layers.0.mlp.fc1.bias"
    state[bias] = torch.cat([torch.ones(5), state[bias].float(), torch.ones(3)])[5:-3]
    state["text_model.final_layer_norm.weight"] = state["text_model.final_layer_norm.weight"].double()
    for name, zipped in [("text_encoder.bin", True), ("text_encoder_old.bin", False)]:
        torch.save(state, FOLDER / name, _use_new_zipfile_serialization=zipped)
