"""The engine as Python programs use it: arguments become a request, warnings become Python's."""

from __future__ import annotations

import json
import os
import warnings
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from . import _respodiff
from ._errors import made
from ._respodiff import Concept, Picture

File = Union[str, "os.PathLike[str]"]
"""A file or folder."""

Named = Union[str, Concept]
"""A concept: a file, the name of one of the demo's concepts, or one that was loaded."""

Lora = Union[File, Tuple[File, float]]
"""A LoRA or another adapter: a file, or a name in the engine's `lora_folder`; with a weight or without."""

Weighted = Union[Named, Tuple[Named, float]]
"""A concept with its own strength, or with a weight."""


class Engine:
    """A checkpoint on a device, ready to make pictures.

    `model` is "demo", a folder as diffusers' `save_pretrained` writes it, a file, or a Hugging Face model id, which is
    taken from the local cache or downloaded. `device` is "auto", "cpu", "cuda" or a GPU by its number, such as
    "cuda:1"; `precision` is "full", "bf16" or "int8"; `tokenizer` is "fast" or "slow". `vae`, `text_encoder` and
    `text_encoder_2` are folders or files in place of the checkpoint's own, and `ema` takes the moving averages of its
    UNet. `loras` are files of adapters, each with its weight or without, and `lora_folder` is a folder in which calls
    find adapters by name. `embeddings` are learnt words (textual inversion): files, or folders of them. Pictures of
    more than `vae_tile` pixels squared are encoded and decoded in strips of that size, which takes less memory and
    longer. Up to `max_batch` pictures of a call are made at once.

    An engine may be used from several threads. It does not survive a fork: start processes by "spawn".
    """

    def __init__(
        self,
        model: File = "demo",
        *,
        device: str = "auto",
        precision: str = "full",
        tokenizer: str = "fast",
        vae: Optional[File] = None,
        text_encoder: Optional[File] = None,
        text_encoder_2: Optional[File] = None,
        ema: bool = False,
        loras: Sequence[Lora] = (),
        lora_folder: Optional[File] = None,
        embeddings: Sequence[File] = (),
        vae_tile: Optional[int] = None,
        max_batch: int = 8,
    ) -> None:
        files = {
            "vae": vae,
            "text_encoder": text_encoder,
            "text_encoder_2": text_encoder_2,
            "lora_folder": lora_folder,
        }
        options = {
            "device": device,
            "precision": precision,
            "tokenizer": tokenizer,
            **{name: os.fspath(path) for name, path in files.items() if path is not None},
            "ema": ema,
            "loras": [_lora(lora, "file") for lora in loras],
            "embeddings": [os.fspath(path) for path in embeddings],
            "vae_tile": vae_tile,
            "max_batch": max_batch,
        }
        self._engine = _respodiff.Engine(os.fspath(model), _dumped(options))

    def info(self) -> Dict[str, Any]:
        """The checkpoint's name and defaults, the device, the samplers, and the demo's concepts."""
        info: Dict[str, Any] = json.loads(self._engine.info())
        return info

    def generate(
        self,
        prompt: Union[str, Sequence[str]],
        *,
        n: Optional[int] = None,
        negative_prompt: Optional[str] = None,
        width: Optional[int] = None,
        height: Optional[int] = None,
        seed: Optional[int] = None,
        steps: Optional[int] = None,
        guidance: Optional[float] = None,
        sampler: Optional[str] = None,
        concepts: Union[Weighted, Sequence[Weighted]] = (),
        balance: Union[str, Sequence[Named], Sequence[Sequence[Named]]] = (),
        loras: Sequence[Lora] = (),
        prompt_syntax: Optional[str] = None,
        clip_skip: Optional[int] = None,
        prompt_2: Optional[str] = None,
        negative_prompt_2: Optional[str] = None,
        progress: Optional[Callable[[int, int], object]] = None,
        **fields: Any,
    ) -> List[Picture]:
        """Makes pictures: `n` (1) of each prompt, picture `i` of all from seed `seed + i`.

        Every picture gets all of `concepts`, and one of each group of `balance` by exact quotas over the pictures of
        the call whose prompts name no attribute of the group. `loras` change the model for all pictures of the call,
        and the engine is afterwards as it was. `prompt_syntax` is "plain", "a1111" or "comfy"; `clip_skip` counts as
        A1111 does; `prompt_2` and `negative_prompt_2` are for SDXL's second text encoder. `progress(done, total)` is
        called between steps, and ends the run by raising; so does Ctrl-C. Further fields are those of `respodiff
        serve`, whose names for the others (`num_inference_steps`) serve as well.
        """
        named: Dict[str, Concept] = {}
        arguments = {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "n": n,
            "negative_prompt": negative_prompt,
            "width": width,
            "height": height,
            "seed": seed,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "sampler": sampler,
            "concepts": [_weighted(each, named) for each in _several(concepts)] or None,
            "balance": _groups(balance, named) or None,
            "loras": [_lora(lora, "name") for lora in loras] or None,
            "prompt_syntax": prompt_syntax,
            "clip_skip": clip_skip,
            "prompt_2": prompt_2,
            "negative_prompt_2": negative_prompt_2,
        }
        request = {name: value for name, value in arguments.items() if value is not None}
        for name in request.keys() & fields.keys():
            raise made("invalid", name, "is given twice", None)
        request.update(fields)
        pictures, notes = self._engine.generate(_dumped(request), named, progress)
        for note in notes:
            warnings.warn(note, stacklevel=2)
        return pictures

    def __repr__(self) -> str:
        info = self.info()
        return f"<respodiff.Engine {info['model']} on {info['device']}>"


def _dumped(request: Mapping[str, Any]) -> str:
    """JSON, or the error about the field that has none."""
    for name, value in request.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as problem:
            raise made("invalid", name, f"{value!r:.80} cannot be sent ({problem})", None) from None
    return json.dumps(request)


def _lora(lora: Lora, key: str) -> object:
    """An adapter as requests and options have it, which call its file by different names."""
    if isinstance(lora, tuple):
        return {key: os.fspath(lora[0]), "weight": lora[1]}
    return os.fspath(lora)


def _several(concepts: Union[Weighted, Sequence[Weighted]]) -> Sequence[Weighted]:
    """A list of concepts, if it was one concept too."""
    if isinstance(concepts, (str, Concept)):
        return [concepts]
    if isinstance(concepts, tuple) and len(concepts) == 2 and isinstance(concepts[1], (int, float)):
        return [(concepts[0], concepts[1])]
    return concepts


def _name(concept: Named, named: Dict[str, Concept]) -> str:
    """The name of a concept in the request; one that was loaded is kept under it."""
    if not isinstance(concept, Concept):
        return concept
    other = named.setdefault(concept.path, concept)
    if other.fingerprint != concept.fingerprint:
        raise made("invalid", "concepts", f"two different concepts were loaded from {concept.path}", None)
    return concept.path


def _weighted(concept: Weighted, named: Dict[str, Concept]) -> object:
    if isinstance(concept, tuple):
        return {"name": _name(concept[0], named), "weight": concept[1]}
    return _name(concept, named)


def _groups(balance: Union[str, Sequence[Named], Sequence[Sequence[Named]]], named: Dict[str, Concept]) -> object:
    if isinstance(balance, str):
        return balance
    return [
        _name(each, named) if isinstance(each, (str, Concept)) else [_name(member, named) for member in each]
        for each in balance
    ]
