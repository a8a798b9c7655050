"""Records what the slow CLIP tokenizer makes of awkward prompts: cases/tokenizer.json. Then fast_tokens.py adds the fast
one's ids."""

import json

from transformers import CLIPTokenizer

from common import CASES, CHECKPOINTS

PROMPTS = [
    "",
    " ",
    "a",
    "!",
    "a photo of a cat",
    "A Photo OF a CAT, ÉCLAIR STRASSE ẞ İstanbul ΣΑΣ",
    "  two  spaces\tand a tab\nand\r\na newline  ",
    "no-break\u00a0space, ideographic\u3000space, thin\u2009space, next\u0085line, line\u2028separator",
    "I don't, we'll, they're, I've, he'd, it's, I'm",
    "I DON'T 'S 'T 'tis rock'n'roll ''s don\u2019t",
    "12345 3.14 1,000,000 4k 8K x2 \u00bd \u00b2 \u2167 \u0665\u0666 \u4e8c",
    "!!! ... ?!?! --- ((masterpiece:1.2)), [best|worst], {a}, a_b, $5 & #7 @me ~ ^ `x` \\ /",
    "wow!!!cat...dog,bird;fish:horse",
    "caf\u00e9 na\u00efve \u00fcber \u0141\u00f3d\u017a",
    "cafe\u0301 nai\u0308ve u\u0308ber o\u0323\u0302",
    "\u212b \u2126 \ufb01ne \uff21\uff22\uff23 \u01c4",
    "\u1100\u1161\u11a8 \uac01 \ud55c\uad6d\uc5b4 \uadf8\ub9bc",
    "\U0001f600 smile \U0001f408\u200d\u2b1b black cat \U0001f44d\U0001f3fd \U0001f1eb\U0001f1f7 \u2764\ufe0f",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "zero\u200bwidth\u200cnon\u200djoiner \ufeffbom soft\u00adhyphen",
    "\u4e00\u53ea\u732b\u5750\u5728\u684c\u5b50\u4e0a",
    "cat\u732bcat \u732b12\u732b \U00020000 \uf900",
    "\u3053\u308c\u306f\u732b\u3067\u3059\u3002\u30ab\u30bf\u30ab\u30ca\u30fc\uff9e",
    "\u0642\u0637\u0629 \u0639\u0644\u0649 \u0627\u0644\u0637\u0627\u0648\u0644\u0629 \u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u092c\u093f\u0932\u094d\u0932\u0940",
    "\u0e41\u0e21\u0e27 \u0e19\u0e2d\u0e19",
    "\u041a\u043e\u0448\u043a\u0430 \u043d\u0430 \u0441\u0442\u043e\u043b\u0435 \u0439 \u0438\u0306",
    "\u05d7\u05ea\u05d5\u05dc \u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd",
    "html &amp; entities &lt;b&gt; &#39;x&#39; &nbsp; &eacute;",
    "<|endoftext|>",
    "a cat<|endoftext|>a dog",
    "a cat <|endoftext|> a dog <|startoftext|>",
    "a <|ENDOFTEXT|> b <|StartOfText|> c <|endoftext",
    "<|startoftext|>a cat<|endoftext|>",
    "control\u0001char\u0000nul\u007fdel\u009bcsi\u001bescape bell\u0007 \ufffd replacement",
    "tab\u000bvertical\u000cform",
    "private\ue000use \U000f0000 unassigned \u0378",
    "supercalifragilisticexpialidocious" * 6,
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "https://example.com/a?b=c&d=%20 user@example.com C:\\dir\\file.png #hashtag",
    "\u201ccurly\u201d \u2018quotes\u2019 \u2014 dash \u2026 ellipsis \u00ab\u00bb \u2022 \u2122 \u00a9 \u20ac",
    "mojibake caf\u00c3\u00a9 \u00e2\u20ac\u2122",
    "e\u0301\u0302\u0303\u0304 z\u0351\u036b\u0343 stacked",
    "x" * 100,
    " ".join(["cat"] * 75),
    " ".join(["cat"] * 76),
    ", ".join(f"word{i}" for i in range(60)),
    "\U0001f600" * 90,
    "a photo of an astronaut riding a horse on mars, highly detailed, 4k, artstation, " * 6,
]


def ids_of(tokenizer, prompt):
    """The 77 ids as diffusers asks for them, and the ids that truncation removed."""
    ids = tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
    whole = tokenizer(prompt, padding="longest", verbose=False).input_ids
    return ids, whole[76:-1]


def record(args):
    folders = {name: CHECKPOINTS / name / "tokenizer" for name in ("sd1", "sd2")}
    path = CASES / "tokenizer.json"
    cases = []
    if args.clip_tokenizer:
        folders = {"clip": args.clip_tokenizer} | folders
    elif path.exists():
        print("  no --clip-tokenizer: its cases are kept as they are")
        cases = [case for case in json.loads(path.read_text()) if case["vocabulary"] == "clip"]
    for vocabulary, folder in folders.items():
        slow = CLIPTokenizer.from_pretrained(folder)
        if slow.fix_text:
            raise SystemExit("tokenizer: ftfy is installed; without it the slow tokenizer differs")
        for prompt in PROMPTS:
            ids, beyond = ids_of(slow, prompt)
            case = dict(vocabulary=vocabulary, prompt=prompt, ids=ids, beyond=beyond)
            cases.append(case)
    lines = [json.dumps(case, separators=(",", ":")) for case in cases]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    print("  now add the fast tokenizer's ids: fast_tokens.py")
