"""The tiny CLIP vocabulary of the checkpoints: bytes, a few merges, two specials."""

import json
from collections import Counter

from transformers import CLIPTokenizer
from transformers.models.clip.tokenization_clip import bytes_to_unicode

#: Text the merges are learnt from; the prompts of the pipeline cases are near it.
TEXT = """a photo of a cat on the table, a photo of the red house and the green tree,
painting of a small boat in the harbour at night, an oil painting of a castle on a hill,
a portrait of an astronaut, the astronaut rides a horse on the moon, blurry photo,
low quality, bad photo, watercolour of the sea and the mountains in the morning light"""
MERGES = 88


def learn_merges():
    """Plain byte-pair encoding over TEXT; ties go to the pair that sorts first."""
    words = Counter(TEXT.replace(",", "").split())
    words = {tuple(word[:-1]) + (word[-1] + "</w>",): count for word, count in words.items()}
    merges = []
    while len(merges) < MERGES:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {merged(word, best): count for word, count in words.items()}
    return merges


def merged(word, pair):
    """The word with every occurrence of the pair joined, left to right."""
    out, at = [], 0
    while at < len(word):
        if word[at : at + 2] == pair:
            out.append(word[at] + word[at + 1])
            at += 2
        else:
            out.append(word[at])
            at += 1
    return tuple(out)


def tokenizer(folder, pad_token="<|endoftext|>"):
    """Writes vocab.json and merges.txt into the folder and loads them."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges()
    symbols = list(bytes_to_unicode().values())
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    tokens += ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2"] + [" ".join(pair) for pair in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return CLIPTokenizer(
        folder / "vocab.json",
        folder / "merges.txt",
        pad_token=pad_token,
        model_max_length=77,
    )
