"""Adds the ids of transformers' fast tokenizer to cases/tokenizer.json, wherever they differ from the slow one's:
python fast_tokens.py FOLDER, with transformers 5 or later (recorded with 5.24.0) and no torch. FOLDER holds the real CLIP
vocabulary. Run it after `make.py tokenizer`, whose transformers is older."""

import json
import sys
from pathlib import Path

import transformers
from transformers import CLIPTokenizer

HERE = Path(__file__).resolve().parent


def main():
    if int(transformers.__version__.split(".")[0]) < 5:
        raise SystemExit("fast_tokens: needs transformers 5, which has no slow tokenizer")
    path = HERE / "cases" / "tokenizer.json"
    folders = {"clip": Path(sys.argv[1])} | {n: HERE / "checkpoints" / n / "tokenizer" for n in ("sd1", "sd2")}
    tokenizers = {name: CLIPTokenizer.from_pretrained(folder) for name, folder in folders.items()}
    lines = []
    for case in json.loads(path.read_text()):
        case = {key: value for key, value in case.items() if not key.startswith("fast_")}
        tokenizer, prompt = tokenizers[case["vocabulary"]], case["prompt"]
        ids = tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        beyond = tokenizer(prompt, padding="longest", verbose=False).input_ids[76:-1]
        if (ids, beyond) != (case["ids"], case["beyond"]):
            case |= dict(fast_ids=ids, fast_beyond=beyond)
        lines.append(json.dumps(case, separators=(",", ":")))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
