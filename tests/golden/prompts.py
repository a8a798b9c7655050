"""Records how the A1111 web UI and ComfyUI read prompts, and what diffusers makes of learnt words.

Both syntaxes are written down here from what these programs do, apart from the crate's code: brackets are matched
first, and each pair then multiplies the weights of the characters inside it.
"""

import itertools
import json
import re

import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from common import CASES, CHECKPOINTS, ROOT, VARIANTS, randn, save_case
from pipelines import load

ROOM = 75
EMBEDDINGS = ROOT / "embeddings"


def a1111_characters(text):
    """The characters of a prompt with their weights; None stands for BREAK."""
    characters, pairs, opened = [], [], {"(": [], "[": []}
    token = re.compile(r"\\[()\[\]\\]|\\|:\s*[+-]?[.\d]+\s*\)|[()\[\]:]|[^\\()\[\]:]+")
    closes = {")": ("(", 1.1), "]": ("[", 1 / 1.1)}
    for match in token.finditer(text):
        piece = match.group()
        if piece[0] == "\\":
            characters += [[c, 1.0] for c in piece[1:]]
        elif piece in opened:
            opened[piece].append(len(characters))
        elif piece in closes and opened[closes[piece][0]]:
            bracket, factor = closes[piece]
            pairs.append((opened[bracket].pop(), len(characters), factor))
        elif piece[0] == ":" and len(piece) > 1 and opened["("]:
            pairs.append((opened["("].pop(), len(characters), float(piece[1:-1])))
        else:
            words = re.split(r"\s*\bBREAK\b\s*", piece)
            for i, word in enumerate(words):
                characters += [[None, -1.0]] if i else []
                characters += [[c, 1.0] for c in word]
    pairs += [(start, len(characters), 1.1) for start in opened["("]]
    pairs += [(start, len(characters), 1 / 1.1) for start in opened["["]]
    for start, end, factor in pairs:
        for character in characters[start:end]:
            character[1] *= factor
    return characters


def a1111_parts(text):
    """Texts of one weight; a weight of None ends a chunk."""
    parts = []
    for character, weight in a1111_characters(text):
        if character is None and weight == -1:
            parts.append(["", None])
            continue
        word = "BREAK" if character is None else character
        if parts and parts[-1][1] == weight:
            parts[-1][0] += word
        else:
            parts.append([word, weight])
    return parts


def a1111_chunks(text, tokenizer):
    """Lists of (id, weight), 75 at most."""
    ids = lambda part: tokenizer(part, add_special_tokens=False, verbose=False).input_ids
    tokens = [(None, None) if weight is None else (token, weight)
              for part, weight in a1111_parts(text) for token in (ids(part) if weight is not None else [0])]
    comma = tokenizer.get_vocab().get(",</w>")
    chunks, chunk = [], []
    for token, weight in tokens:
        if token is None:
            chunks.append(chunk)
            chunk = []
            continue
        if len(chunk) == ROOM:
            commas = [i for i, (other, _) in enumerate(chunk) if other == comma]
            # A comma that would begin the next chunk moves nothing.
            near = commas and ROOM - commas[-1] <= 20 and token != comma
            cut = commas[-1] + 1 if near else ROOM
            chunks.append(chunk[:cut])
            # Commas that were moved do not count again, but none are behind the last one.
            chunk = chunk[cut:]
        chunk.append((token, weight))
    return chunks + [chunk] if chunk or not chunks else chunks


def comfy_parts(text):
    """Texts and weights."""
    text = text.replace("\\(", "\ue000").replace("\\)", "\ue001")

    def items(text):
        out, depth, current = [], 0, ""
        for c in text:
            if c == "(":
                if depth == 0:
                    out.append(current)
                    current = ""
                depth += 1
            depth -= c == ")"
            current += c
            if c == ")" and depth == 0:
                out.append(current)
                current = ""
        return [item for item in out + [current] if item]

    def walk(text, weight):
        for item in items(text):
            if not (len(item) > 1 and item[0] == "(" and item[-1] == ")"):
                yield item, weight
                continue
            inside = item[1:-1]
            head, colon, tail = inside.rpartition(":")
            try:
                yield from walk(head, float(tail)) if colon and head else walk(inside, weight * 1.1)
            except ValueError:
                yield from walk(inside, weight * 1.1)

    plain = str.maketrans({"\ue000": "(", "\ue001": ")"})
    return [(part.translate(plain), weight) for part, weight in walk(text, 1.0)]


def comfy_chunks(text, tokenizer):
    chunks = [[]]
    for part, weight in comfy_parts(text):
        for word in re.split("[ \n]", part):
            ids = tokenizer(word, add_special_tokens=False, verbose=False).input_ids if word else []
            long = len(ids) >= 8
            while ids:
                free = ROOM - len(chunks[-1])
                take = len(ids) if len(ids) <= free else free if long else 0
                chunks[-1] += [(token, weight) for token in ids[:take]]
                ids = ids[take:]
                if ids:
                    chunks.append([])
    return chunks

CHUNKS = {"a1111": a1111_chunks, "comfy": comfy_chunks}

LONG = ", ".join(["a photo of the red house", "an oil painting of a castle", "the astronaut rides a horse on the moon"])

#: Prompts whose tokens and weights are recorded.
PROMPTS = [
    "a photo of a cat",
    "",
    "an (important) word",
    "(unbalanced",
    "[unbalanced (both",
    "closed) too] often)",
    "\\(literal\\] \\[x\\) \\\\ back\\slash \\",
    "(unnecessary)(parens)",
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
    "(a:1.3) ( b : 1.2 ) (c:+.5) (d:-1) (e:2.)",
    "(a:b) (a:1.2:1.3) (:1.2) :1.3) time 12:30",
    "((a (b:1.5) c:0.8) d)",
    "(a\\:1.2)",
    "ca(t)s and (do)gs",
    "[[night]] (([moon]))",
    "()[] (( )) (:)",
    "(a: 1.3 ) (b:1e1) (c:.7)",
    "one BREAK two",
    "BREAK first BREAK BREAK last BREAK",
    "(one BREAK two:1.2) three",
    "(one BREAK two:1) three",
    "BREAKfast aBREAK BREAK_ BREAK, x",
    "a\tb\nc\n\nd  e",
    "(r\u00e9sum\u00e9:1.2) \u732b\u732b (\U0001f600)",
    "Cat, DOG (Bird:1.1)",
    LONG,
    LONG.replace(", ", " "),
    f"({LONG}:1.2), {LONG}",
    "".join(f"word{i}, " for i in range(14)),
    "the " * 74 + "moon moon",
    "the " * 73 + ", moon , hill",
    "the " * 54 + ", " + "x " * 25,
    "the " * 55 + ", " + "x " * 25,
    "the " * 56 + ", " + "x " * 25,
    "the " * 75 + ", x",
    "the " * 74 + ", x",
    "the " * 60 + "(astronaut, mountains:1.3) " + "x " * 20,
    "the " * 70 + "quick jumps",
    "the " * 70 + "abcdefghijk",
    "the " * 73 + "(quick:1.2) (jumps:0.8)",
    "x" * 200,
    "the " * 150,
    "(" + "the " * 80 + "BREAK x) " + "y " * 30,
    "https://example.com/a(b)?c=d",
    ":-) (; :( \\o/",
]

#: Name, checkpoint, encoder, syntax, clip skip, prompt.
STATES = [
    ("sd1_a1111", "sd1", 1, "a1111", 1, f"({LONG}:1.3), [watercolour] of the sea, {LONG}, {LONG}"),
    ("sd2_a1111", "sd2", 1, "a1111", 2, "a (castle on a hill:1.4), ((night)) [boat]"),
    ("sdxl_a1111", "sdxl", 2, "a1111", 1, "a (castle on a hill:0.6), (boat)"),
    ("sd1_comfy", "sd1", 1, "comfy", 2, f"(({LONG}) in (watercolour:0.7):1.2) boat, {LONG}, {LONG}"),
    ("sdxl_comfy", "sdxl", 2, "comfy", 2, "a (castle (on a hill:1.4):0.8), boat"),
]


def encoder(checkpoint, number):
    folder = CHECKPOINTS / checkpoint / ("text_encoder" if number == 1 else "text_encoder_2")
    kind = CLIPTextModel if number == 1 else CLIPTextModelWithProjection
    return kind.from_pretrained(folder, torch_dtype=torch.float32, variant=VARIANTS.get(checkpoint)).eval()


def framed(chunk, tokenizer):
    ids = [tokenizer.bos_token_id] + [token for token, _ in chunk] + [tokenizer.eos_token_id]
    weights = [1.0] + [weight for _, weight in chunk] + [1.0]
    rest = ROOM + 2 - len(ids)
    return ids + [tokenizer.pad_token_id] * rest, weights + [1.0] * rest


def states_of(model, ids, sdxl, skip):
    """What a UNet reads, and the pooled prompt; A1111's clip skip."""
    out = model(torch.tensor([ids]), output_hidden_states=True)
    states = out.hidden_states[-skip - 1 if sdxl else -skip]
    if not sdxl:
        states = model.text_model.final_layer_norm(states)
    return states[0], getattr(out, "text_embeds", None)


def record_states(name, checkpoint, number, syntax, skip, prompt):
    tokenizer = CLIPTokenizer.from_pretrained(CHECKPOINTS / checkpoint / ("tokenizer" if number == 1 else "tokenizer_2"))
    model, sdxl = encoder(checkpoint, number), checkpoint == "sdxl"
    rows, pooled = [], None
    empty, _ = states_of(model, framed([], tokenizer)[0], sdxl, skip)
    chunks = CHUNKS[syntax](prompt, tokenizer)
    for chunk in chunks:
        ids, weights = framed(chunk, tokenizer)
        z, projected = states_of(model, ids, sdxl, skip)
        pooled = projected if pooled is None else pooled
        weights = torch.tensor(weights)[:, None]
        if syntax == "comfy":
            rows.append(empty + (z - empty) * weights)
        else:
            weighted = z.double() * weights
            rows.append((weighted * (z.double().mean() / weighted.mean())).float())
    tensors = {"out.states": torch.cat(rows)}
    if pooled is not None:
        tensors["out.text_embeds"] = pooled
    meta = dict(checkpoint=checkpoint, encoder=number, syntax=syntax, clip_skip=skip, prompt=prompt)
    save_case(f"prompt_{name}", tensors, meta)
    print(f"  {name}: {len(chunks)} chunks")


def write_embeddings():
    """One file of each kind."""
    EMBEDDINGS.mkdir(exist_ok=True)
    toy, style = 0.5 * randn("embedding/toy", 3, 32), 0.5 * randn("embedding/style", 32)
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.nn.Parameter(toy)}, "name": "other",
                "step": 500, "sd_checkpoint": None, "sd_checkpoint_name": None}, EMBEDDINGS / "a1111-toy.pt")
    torch.save({"<style>": style}, EMBEDDINGS / "learned_embeds.bin")
    save_file({"emb_params": toy}, EMBEDDINGS / "toy2.safetensors")
    wide = 0.5 * randn("embedding/wide", 2, 64)
    save_file({"emb_params": wide}, EMBEDDINGS / "wide.safetensors")
    both = {"clip_l": 0.5 * randn("embedding/l", 2, 32), "clip_g": 0.5 * randn("embedding/g", 2, 32)}
    save_file(both, EMBEDDINGS / "xl.safetensors")
    return toy, style, both


def record_embeddings():
    toy, style, both = write_embeddings()
    pipeline = load("sd1")
    pipeline.load_textual_inversion(EMBEDDINGS / "a1111-toy.pt", token="a1111-toy")
    pipeline.load_textual_inversion(EMBEDDINGS / "learned_embeds.bin")
    prompt = "a photo of a1111-toy in <style>, boat"
    states, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
    save_case("embedding_sd1", {"out.states": states[0]}, dict(checkpoint="sd1", prompt=prompt))
    xl = load("sdxl")
    for key, model, tokenizer in (("clip_l", xl.text_encoder, xl.tokenizer), ("clip_g", xl.text_encoder_2, xl.tokenizer_2)):
        xl.load_textual_inversion(both[key], token="xl", text_encoder=model, tokenizer=tokenizer)
    # transformers takes the largest id for the end of a text if the configuration has the historic id 2; that would
    # be the learnt word here, so the true id is set.
    xl.text_encoder_2.text_model.eos_token_id = xl.tokenizer_2.eos_token_id
    states, _, pooled, _ = xl.encode_prompt("a boat by xl at night", do_classifier_free_guidance=False)
    save_case("embedding_sdxl", {"out.states": states[0], "out.text_embeds": pooled},
              dict(checkpoint="sdxl", prompt="a boat by xl at night"))


def record_two_prompts():
    """SDXL's second prompt, with diffusers' clip skip."""
    xl = load("sdxl")
    states, _, pooled, _ = xl.encode_prompt(
        "a castle on a hill", "a boat at night", do_classifier_free_guidance=False, clip_skip=1)
    meta = dict(checkpoint="sdxl", prompt="a castle on a hill", prompt_2="a boat at night", clip_skip=2)
    save_case("prompt_two", {"out.states": states[0], "out.text_embeds": pooled}, meta)


def record_apart():
    """A prompt of two chunks and a negative prompt of three, each in a UNet call of its own length."""
    pipeline = load("sd1")
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    tokenizer, model = pipeline.tokenizer, pipeline.text_encoder
    prompt, negative = f"{LONG}, {LONG}, {LONG}, {LONG}", "the " * 160
    encode = lambda text: torch.cat([states_of(model, framed(chunk, tokenizer)[0], False, 1)[0]
                                     for chunk in a1111_chunks(text, tokenizer)])[None]
    positive, unconditional = encode(prompt), encode(negative)
    assert (positive.shape[1], unconditional.shape[1]) == (154, 231)
    scheduler.set_timesteps(3)
    latents = torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(4))
    for t in scheduler.timesteps:
        without = pipeline.unet(latents, t, encoder_hidden_states=unconditional).sample
        guided = without + 6.0 * (pipeline.unet(latents, t, encoder_hidden_states=positive).sample - without)
        latents = scheduler.step(guided, t, latents).prev_sample
    meta = dict(checkpoint="sd1", prompt=prompt, negative_prompt=negative, seed=4, steps=3, guidance_scale=6.0)
    save_case("prompt_apart", {"out.latents": latents}, meta)


def runs(weights):
    """Pairs of a weight and the number of tokens in a row that have it."""
    return [[weight, len(list(run))] for weight, run in itertools.groupby(weights)]


@torch.no_grad()
def record(args):
    tokenizer = CLIPTokenizer.from_pretrained(CHECKPOINTS / "sd1" / "tokenizer")
    lines = []
    for prompt in PROMPTS:
        for syntax, chunks in CHUNKS.items():
            found = chunks(prompt, tokenizer)
            lines.append(json.dumps(dict(
                syntax=syntax, prompt=prompt, ids=[[token for token, _ in chunk] for chunk in found],
                weights=[runs(weight for _, weight in chunk) for chunk in found]), separators=(",", ":")))
    (CASES / "prompts.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    for states in STATES:
        record_states(*states)
    record_embeddings()
    record_two_prompts()
    record_apart()
