"""Learns the byte-level BPE tokenizer in CLIP's file format and writes it to model/tokenizer.

As in CLIP the vocabulary holds all 256 byte symbols, the same with `</w>`, one entry per merge and the two special
tokens, so that any text can be encoded.
"""

import json
from collections import Counter

from transformers import CLIPTokenizer
from transformers.models.clip.tokenization_clip import bytes_to_unicode

from common import HERE, MODEL
from world import all_captions

MERGES = 1200
START, END = "<|startoftext|>", "<|endoftext|>"
FOLDER = MODEL / "tokenizer"


def word_counts():
    """Counts of words. Those of captions have the largest counts, so that each becomes a single token."""
    counts = Counter()
    for caption in all_captions():
        counts.update(caption.text.lower().replace("-", " - ").split())
    for word in (HERE / "words.txt").read_text().split():
        counts[word] += 3
    return counts


def learn_merges(counts, limit):
    """Byte-pair merges by frequency. Ties go to the pair that is first in the alphabet."""
    symbols = bytes_to_unicode()
    words = {}
    for word, count in counts.items():
        letters = [symbols[b] for b in word.encode()]
        words[(*letters[:-1], letters[-1] + "</w>")] = count
    merges = []
    while len(merges) < limit:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {merged(word, best): count for word, count in words.items()}
    return merges


def merged(word, pair):
    out, i = [], 0
    while i < len(word):
        if word[i:i + 2] == pair:
            out.append(word[i] + word[i + 1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


def main():
    FOLDER.mkdir(parents=True, exist_ok=True)
    merges = learn_merges(word_counts(), MERGES)
    alphabet = list(bytes_to_unicode().values())
    entries = alphabet + [s + "</w>" for s in alphabet] + ["".join(m) for m in merges]
    entries += [START, END]
    assert len(entries) == len(set(entries)), "two merges spell the same token"
    vocab = {token: i for i, token in enumerate(entries)}
    (FOLDER / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (FOLDER / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer(FOLDER / "vocab.json", FOLDER / "merges.txt", unk_token=END,
                              bos_token=START, eos_token=END, pad_token=END,
                              model_max_length=77)
    tokenizer.save_pretrained(FOLDER)
    print(f"tokenizer: {len(vocab)} entries, {len(merges)} merges")


if __name__ == "__main__":
    main()
