"""Files that torch.save wrote: the official checkpoint's layout, SDisc's, and what must be refused."""

import json
import os
from collections import OrderedDict

import torch

from common import ROOT, randn

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
