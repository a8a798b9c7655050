"""The module as programs use it. The demo's pictures are small, so that all of it takes seconds."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Iterator, List

import numpy as np
import PIL.Image
import pytest

import respodiff

ROOT = Path(__file__).parents[2]
CONCEPTS = ROOT / "demo" / "concepts"


@pytest.fixture(scope="module")
def engine() -> respodiff.Engine:
    return respodiff.Engine("demo", device="cpu", max_batch=4)


@pytest.fixture(scope="module")
def program() -> str:
    """The command, which was built before."""
    found = os.environ.get("RESPODIFF")
    if found is None:
        pytest.skip("RESPODIFF does not name the command to compare with")
    return found


def sampled(program: str, folder: Path, *arguments: str) -> List[bytes]:
    """The files of `respodiff sample`."""
    command = [program, "sample", "--device", "cpu", "-q", "--out", str(folder / "{i}.png"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Path(name).read_bytes() for name in done.stdout.split("\n") if name.endswith(".png")]


def test_files_are_those_of_the_command(engine: respodiff.Engine, program: str, tmp_path: Path) -> None:
    made = engine.generate(["a photo of a doctor"] * 4, balance=["woman", "man"], steps=5, guidance=6.5, seed=1)
    flags = ["a photo of a doctor", "--batch", "4", "--balance", "woman,man", "--steps", "5", "--guidance", "6.5"]
    assert [p.png for p in made] == sampled(program, tmp_path / "a", *flags, "--seed", "1")
    assert [p.seed for p in made] == [1, 2, 3, 4]
    assert sorted(name for p in made for name in p.concepts) == ["a man", "a man", "a woman", "a woman"]
    # Everything that a request may say, more pictures than are made at once, and a concept that was loaded.
    woman = str(CONCEPTS / "woman.safetensors")
    made = engine.generate(
        "a cook", n=5, negative_prompt="a hat", width=72, height=80, seed=9, steps=4, sampler="Euler a",
        concepts=[(respodiff.Concept.load(woman), 0.5), "black"],
    )
    flags = ["a cook", "-n", "a hat", "-W", "72", "-H", "80", "--seed", "9", "--steps", "4", "--sampler", "Euler a"]
    flags += ["--concept", f"{woman}:0.5", "--concept", "black", "--images", "5"]
    assert [p.png for p in made] == sampled(program, tmp_path / "b", *flags)


def test_options_of_the_engine_are_in_the_files(program: str, tmp_path: Path) -> None:
    folder = ROOT / "tests" / "golden" / "checkpoints" / "sd1"
    made = respodiff.Engine(folder, device="cpu", tokenizer="slow").generate("a dog", seed=3, steps=2)
    flags = ["a dog", "--model", str(folder), "--tokenizer", "slow", "--seed", "3", "--steps", "2"]
    assert [made[0].png] == sampled(program, tmp_path / "a", *flags)
    lora, vae = ROOT / "tests" / "golden" / "adapters" / "sd1_kohya.safetensors", folder / "vae"
    other = respodiff.Engine(folder, device="cpu", vae=vae, loras=[(lora, 0.5)]).generate("a dog", seed=3, steps=2)
    assert other[0].rgb != made[0].rgb
    flags = ["a dog", "--model", str(folder), "--vae", str(vae), "--lora", f"{lora}:0.5", "--seed", "3", "--steps", "2"]
    assert [other[0].png] == sampled(program, tmp_path / "b", *flags)
    with pytest.raises(respodiff.Error) as caught:
        respodiff.Engine(device="cpu", loras=[tmp_path / "none.safetensors"])
    assert caught.value.kind == "not_found"


def test_prompts_and_adapters_of_calls_are_those_of_the_command(program: str, tmp_path: Path) -> None:
    golden = ROOT / "tests" / "golden"
    folder, loras = golden / "checkpoints" / "sd1", golden / "adapters"
    words = golden / "embeddings" / "a1111-toy.pt"
    engine = respodiff.Engine(folder, device="cpu", lora_folder=loras, embeddings=[words])
    before = engine.generate("a dog", seed=3, steps=2)[0].png
    prompt = "a (dog:1.3), " + "word, " * 80 + "a1111-toy <lora:sd1_loha:0.5>"
    made = engine.generate(
        prompt, seed=3, steps=2, prompt_syntax="a1111", clip_skip=2, loras=[(loras / "sd1_kohya.safetensors", 0.5)]
    )
    flags = [prompt, "--model", str(folder), "--seed", "3", "--steps", "2", "--prompt-syntax", "a1111"]
    flags += ["--clip-skip", "2", "--embedding", str(words), "--lora-folder", str(loras)]
    flags += ["--lora", str(loras / "sd1_kohya.safetensors") + ":0.5"]
    assert [made[0].png] == sampled(program, tmp_path / "a", *flags)
    assert [used["name"] for used in made[0].info["adapters"]] == ["sd1_kohya", "sd1_loha"]
    assert engine.generate("a dog", seed=3, steps=2)[0].png == before


def test_pictures_are_arrays_and_images(engine: respodiff.Engine, tmp_path: Path) -> None:
    picture = engine.generate("a nurse", width=72, height=64, seed=4, steps=2)[0]
    array = np.asarray(picture)
    assert array.shape == (64, 72, 3) and array.dtype == np.uint8 and not array.flags.writeable
    assert array.ctypes.data == picture.__array_interface__["data"][0]
    assert array.tobytes() == picture.rgb
    # A file's pixels are the picture's, by another decoder.
    assert np.array_equal(np.asarray(PIL.Image.open(io.BytesIO(picture.png))), array)
    assert picture.image.size == (72, 64) and np.array_equal(np.asarray(picture.to_pil()), array)
    assert json.loads(PIL.Image.open(io.BytesIO(picture.png)).info["respodiff"]) == picture.info
    assert picture.info["prompt"] == "a nurse" and picture.concepts == []
    assert repr(picture) == "<respodiff.Picture 72x64, seed 4>"
    picture.save(tmp_path / "nurse.png")
    assert (tmp_path / "nurse.png").read_bytes() == picture.png
    with pytest.raises(OSError):
        picture.save(tmp_path / "nowhere" / "nurse.png")
    again = pickle.loads(pickle.dumps(picture))
    assert again.png == picture.png and again.rgb == picture.rgb


def test_an_array_outlives_its_picture_and_engine() -> None:
    engine = respodiff.Engine(device="cpu")
    array = np.asarray(engine.generate("a nurse", seed=4, steps=2)[0])
    before = array.copy()
    del engine
    for _ in range(20):
        bytearray(array.nbytes)
    assert np.array_equal(array, before) and array.max() > 0


def test_pictures_of_other_sizes_are_refused() -> None:
    record = respodiff.Engine(device="cpu").generate("x", steps=1)[0].info
    for width, height in [(2, 2), (0, 0), (2**32 - 1, 2**32 - 1)]:
        with pytest.raises(ValueError):
            respodiff.Picture(width, height, b"12345", json.dumps(record))
    with pytest.raises(ValueError):
        respodiff.Picture(1, 1, b"123", "{}")


def test_info(engine: respodiff.Engine) -> None:
    info = engine.info()
    assert info["model"] == "respodiff-demo" and (info["width"], info["height"]) == (64, 64)
    assert "DDIM" in info["samplers"] and "woman" in info["concepts"] and info["max_batch"] == 4
    assert info["version"] == respodiff.__version__
    assert "respodiff-demo" in repr(engine)


def test_concepts() -> None:
    woman = respodiff.Concept.load(CONCEPTS / "woman.safetensors")
    assert woman.name == "a woman" and len(woman.fingerprint) == 32 and woman.path.endswith("woman.safetensors")
    assert respodiff.Concept.load("woman").fingerprint == woman.fingerprint
    assert pickle.loads(pickle.dumps(woman)).fingerprint == woman.fingerprint
    assert "a woman" in repr(woman)


def test_concepts_in_every_form(engine: respodiff.Engine) -> None:
    woman, man = respodiff.Concept.load("woman"), respodiff.Concept.load("man")
    forms: List[Any] = ["woman", ["woman"], woman, [woman], ("woman", 1.0), [(woman, 1.0)]]
    pictures = [engine.generate("a doctor", seed=1, steps=2, concepts=form)[0] for form in forms]
    assert len({p.png for p in pictures}) == 1
    forms = ["woman,man", ["woman", "man"], [["woman", "man"]], [woman, man], [[woman, man]], "woman,man=0.5,0.5"]
    assert len({tuple(p.png for p in engine.generate("a cook", n=2, seed=1, steps=2, balance=f)) for f in forms}) == 1


def test_quotas_run_over_all_prompts_of_a_call(engine: respodiff.Engine) -> None:
    prompts = ["a doctor", "a nurse", "a cook", "a guard"]
    pictures = engine.generate(prompts, n=2, balance="woman,man", seed=3, steps=1)
    assert [p.info["prompt"] for p in pictures] == [prompt for prompt in prompts for _ in range(2)]
    assert sum(p.concepts == ["a woman"] for p in pictures) == 4
    with pytest.warns(UserWarning, match="`woman`"):
        pictures = engine.generate(["a woman", "a doctor", "a cook"], balance="woman,man", seed=3, steps=1)
    assert pictures[0].concepts == [] and sorted(pictures[1].concepts + pictures[2].concepts) == ["a man", "a woman"]


def test_warnings(engine: respodiff.Engine) -> None:
    with pytest.warns(UserWarning, match="not used: .*last"):
        engine.generate("word " * 90 + "last", steps=1)


@pytest.mark.parametrize(
    "arguments, kind, subject, words",
    [
        ({"width": 63}, "invalid", "size", "63"),
        ({"width": 10**30}, "invalid", "width", "a whole number"),
        ({"width": 800000, "height": 8}, "invalid", "size", "8192"),
        ({"steps": 0}, "invalid", "steps", "steps"),
        ({"steps": 2.5}, "invalid", "steps", "a whole number"),
        ({"guidance": float("nan")}, "invalid", "guidance", "nan"),
        ({"guidance": float("inf")}, "invalid", "guidance", "inf"),
        ({"seed": -2}, "invalid", "seed", "-1"),
        ({"seed": 2**64 - 1, "n": 2}, "invalid", "seed", "smaller"),
        ({"n": 0}, "invalid", "n", "1 or more"),
        ({"n": 10**9}, "invalid", "n", "10000"),
        ({"sampler": "best"}, "invalid", "sampler", "best"),
        ({"prompt": []}, "invalid", "prompt", "empty"),
        ({"prompt": "a\0b"}, "invalid", "prompt", "NUL"),
        ({"prompt": ["a", 3]}, "invalid", "prompt", "a list of texts"),
        ({"prompt": "\ud800"}, "invalid", None, "JSON"),
        ({"negativ_prompt": "x"}, "invalid", None, "`negative_prompt`"),
        ({"model": "x"}, "invalid", None, "not known"),
        ({"negative_prompt": b"x"}, "invalid", "negative_prompt", "bytes"),
        ({"concepts": "womann"}, "not_found", "womann", "woman"),
        ({"concepts": "/dev/null"}, "damaged", "/dev/null", "safetensors"),
        ({"concepts": [("woman", float("inf"))]}, "invalid", "concepts", "inf"),
        ({"balance": ["woman"]}, "invalid", "balance", "two concepts"),
        ({"prompt_syntax": "invoke"}, "invalid", "prompt_syntax", "a1111"),
        ({"prompt": "a AND b", "prompt_syntax": "a1111"}, "unsupported", "prompt", "lower case"),
        ({"clip_skip": 0}, "invalid", "clip_skip", "give 1"),
        ({"prompt_2": "y"}, "invalid", "prompt_2", "leave it out"),
        ({"loras": ["none.safetensors"]}, "not_found", "none.safetensors", ""),
        ({"balance": "woman,man=1"}, "invalid", "balance", "share"),
        ({"width": 8192, "height": 8192, "n": 4}, "out_of_memory", None, "GiB"),
    ],
)
def test_errors(engine: respodiff.Engine, arguments: Any, kind: str, subject: Any, words: str) -> None:
    with pytest.raises(respodiff.Error) as caught:
        engine.generate(**{"prompt": "x", **arguments})
    assert (caught.value.kind, caught.value.subject) == (kind, subject)
    assert words in str(caught.value)
    natural = {"invalid": ValueError, "not_found": FileNotFoundError, "out_of_memory": MemoryError}
    assert isinstance(caught.value, natural.get(kind, respodiff.Error))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.kind) == (type(caught.value), str(caught.value), kind)


def test_engines_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give the folder"):
        respodiff.Engine(tmp_path)
    with pytest.raises(respodiff.NotFoundError):
        respodiff.Engine(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="auto, cpu, cuda"):
        respodiff.Engine(device="tpu")
    with pytest.raises(ValueError, match="max_batch"):
        respodiff.Engine(device="cpu", max_batch=0)
    with pytest.raises(FileNotFoundError):
        respodiff.Concept.load(tmp_path / "a.safetensors")
    with pytest.raises(TypeError):
        respodiff.Engine(3)  # type: ignore[arg-type]


def test_progress(engine: respodiff.Engine) -> None:
    seen: List[Any] = []
    engine.generate("x", n=2, steps=3, sampler="DDIM", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 6), (2, 6), (4, 6), (6, 6)]


def test_an_exception_of_the_callback_ends_the_run(engine: respodiff.Engine) -> None:
    before = engine.generate("a cook", seed=1, steps=3)[0].png
    calls: List[int] = []

    def raising(done: int, total: int) -> None:
        calls.append(done)
        if done == 2:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        engine.generate("x", steps=900, progress=raising)
    assert calls == [0, 1, 2]
    with pytest.raises(TypeError):
        engine.generate("x", steps=900, progress=lambda: None)  # type: ignore[misc, arg-type]
    assert engine.generate("a cook", seed=1, steps=3)[0].png == before


@pytest.fixture
def interrupt() -> Iterator[None]:
    # A job in the background of a shell ignores the signal, and Python then leaves it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    yield
    timer.join()
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_the_run_within_a_step(engine: respodiff.Engine, interrupt: None) -> None:
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(1000):
            engine.generate("x", n=4, steps=900)
    assert time.monotonic() - began < 5


def test_threads(engine: respodiff.Engine) -> None:
    arguments: List[Any] = [
        {"prompt": "a doctor", "seed": 1, "steps": 6, "concepts": "woman"},
        {"prompt": "a cook", "seed": 2, "steps": 4, "n": 3},
        {"prompt": "a guard", "seed": 3, "steps": 5, "width": 80},
        {"prompt": "a nurse", "seed": 4, "steps": 3, "guidance": 1.0},
    ]
    alone = [[p.png for p in engine.generate(**each)] for each in arguments]
    together: List[Any] = [None] * len(arguments)
    ticks = 0

    def work(i: int) -> None:
        together[i] = [[p.png for p in engine.generate(**arguments[i])] for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(arguments))]
    for thread in threads:
        thread.start()
    # This thread runs meanwhile: the interpreter's lock is not held.
    while any(thread.is_alive() for thread in threads):
        ticks += 1
        time.sleep(0.001)
    assert ticks > 10
    assert together == [[each] * 3 for each in alone]


def _in_a_child(queue: Any) -> None:
    try:
        respodiff.Engine(device="cpu").generate("x", steps=1)
        queue.put("a picture")
    except respodiff.Error as error:
        queue.put((error.kind, str(error)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children(engine: respodiff.Engine, method: Any) -> None:
    engine.generate("x", steps=1)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(queue,))
    child.start()
    answer = queue.get(timeout=60)
    child.join()
    assert answer == "a picture" if method == "spawn" else answer[0] == "unsupported" and "forked" in answer[1]
