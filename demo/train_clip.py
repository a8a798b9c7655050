"""Trains the tiny CLIP and writes clip/ (both towers) and model/text_encoder (text tower).

Captions here leave attributes open, so many captions of a batch fit one picture, and the usual loss with one positive
per picture would push true pairs apart. Instead every (picture, caption) pair is a yes/no question whose answer follows
from the attributes, and the three zero-shot questions that are asked later (which gender, race, profession) are trained
as such.

With `--vision` the text tower stays frozen (the UNet has learnt to read it) and the vision tower continues to learn,
half of the time from drawings as the VAE decodes them, so that it judges generated pictures as it judges drawn ones.
"""

import argparse
import shutil
import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizer

from common import CACHE, CLIP, MODEL, begin, cosine, pictures, save_half
from world import GENDERS, MEDIA, PEOPLE, PROFESSIONS, RACES, all_captions

BATCH = 96
RATE = 1.5e-3
CONTEXT = 20  # longest caption with its special tokens, rounded up
MEAN = STD = [0.5, 0.5, 0.5]


def build(tokenizer):
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4,
             "projection_dim": 64, "hidden_act": "quick_gelu"}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 77, "num_hidden_layers": 3,
            **shape, **ids}
    vision = {"image_size": 64, "patch_size": 8, "num_hidden_layers": 3, **shape}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64, **ids))


def fits(caption, person):
    """True if `caption` describes `person`: the stated parts must match. The profession 'person' fits anyone if
    something else is stated too; alone it means the plain portrait."""
    if caption.gender not in (None, person.gender) or caption.race not in (None, person.race):
        return False
    if caption.profession == "person" and (caption.gender or caption.race):
        return True
    return caption.profession == person.profession


def questions(rng):
    """The zero-shot texts (genders, races, professions) in a random template."""
    medium, article = rng.choice(MEDIA), rng.choice(("", "a "))
    race_word = rng.choice(("{}-race person", "{} person"))
    gender_word = rng.choice((("woman", "man"), ("female person", "male person")))
    nouns = [*gender_word, *(race_word.format(r) for r in RACES), *(p.lower() for p in PROFESSIONS)]
    return [medium + article + noun for noun in nouns]


class Embedder:
    """Normalised embeddings of texts and pictures."""

    def __init__(self, clip, tokenizer):
        self.clip, self.tokenizer = clip, tokenizer

    def texts(self, texts):
        tokens = self.tokenizer(texts, padding="max_length", max_length=CONTEXT,
                                truncation=True, return_tensors="pt")
        return F.normalize(self.clip.get_text_features(**tokens).float(), dim=-1)

    def pictures(self, x):
        return F.normalize(self.clip.get_image_features(pixel_values=x).float(), dim=-1)


def zero_shot(scores, people):
    """The sum of the cross-entropies and the hit rates of the three questions, from scores against `questions`."""
    answers = (GENDERS.index, RACES.index, PROFESSIONS.index)
    keys = ("gender", "race", "profession")
    loss, hits = 0.0, {}
    for part, index, key in zip(scores.split([2, 3, len(PROFESSIONS)], dim=1), answers, keys):
        target = torch.tensor([index(getattr(p, key)) for p in people])
        loss = loss + F.cross_entropy(part, target)
        hits[key] = (part.argmax(1) == target).float().mean().item()
    return loss, hits


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--minutes", type=float, default=6)
    args.add_argument("--vision", action="store_true", help="continue with the vision tower alone")
    args = args.parse_args()
    rng = begin(9 if args.vision else 2)
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    clip, decoded = build(tokenizer), None
    if args.vision:
        clip = CLIPModel.from_pretrained(CLIP, torch_dtype=torch.float32)
        clip.text_model.requires_grad_(False)
        clip.text_projection.requires_grad_(False)
        decoded = decoded_bank()
    embed = Embedder(clip, tokenizer)
    bias = torch.nn.Parameter(torch.tensor(-3.0))
    captions = [c for c in all_captions() if c.text]
    trained = [p for p in clip.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW([*trained, bias], lr=RATE, weight_decay=0.01)
    start, step, done = time.time(), 0, 0.0
    while done < 1:
        people = rng.choices(PEOPLE, k=BATCH)
        x = pictures(people, [rng.randrange(10**9) for _ in people])
        if decoded is not None:
            for i in range(0, BATCH, 2):
                x[i] = rng.choice(decoded[PEOPLE.index(people[i])])
        x = x + 0.15 * rng.random() * torch.randn_like(x)
        stated = rng.choices(captions, k=BATCH)
        for group in optimiser.param_groups:
            group["lr"] = RATE * min((step + 1) / 100, cosine(done, 1.0, 0))
        with torch.autocast("cpu", torch.bfloat16):
            image = embed.pictures(x)
            text = embed.texts(questions(rng) + [c.text for c in stated])
        scores = clip.logit_scale.exp() * image @ text.T
        asked = len(GENDERS) + len(RACES) + len(PROFESSIONS)
        loss, hits = zero_shot(scores[:, :asked], people)
        truth = torch.tensor([[float(fits(c, p)) for c in stated] for p in people])
        loss = loss + 4 * F.binary_cross_entropy_with_logits(scores[:, asked:] + bias, truth)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimiser.step()
        clip.logit_scale.data.clamp_(0, 4.6)
        step, done = step + 1, (time.time() - start) / (60 * args.minutes)
        if step % 50 == 0:
            print(f"clip step {step} {done:.0%} loss {loss.item():.3f} {hits}", flush=True)
    finish(clip.eval(), embed, rng, args.vision)


@torch.no_grad()
def decoded_bank():
    """Pictures that the VAE decodes from disturbed latents: 40 of every kind of person."""
    vae = AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32).eval()
    latents = torch.load(CACHE / "latents.pt")[:, :40]
    latents = latents + 0.3 * torch.rand(*latents.shape[:2], 1, 1, 1) * torch.randn_like(latents)
    with torch.autocast("cpu", torch.bfloat16):
        return torch.stack([vae.decode(part / vae.config.scaling_factor).sample.float().clamp(-1, 1)
                            for part in latents])


@torch.no_grad()
def finish(clip, embed, rng, vision_only):
    """Prints the zero-shot accuracy on new drawings, then writes both folders."""
    people = rng.choices(PEOPLE, k=2000)
    x = pictures(people, [rng.randrange(10**9) for _ in people])
    image = torch.cat([embed.pictures(part) for part in x.split(200)])
    texts = [f"a {g}" for g in GENDERS] + [f"a {r}-race person" for r in RACES]
    texts += [f"a photo of a {p.lower()}" for p in PROFESSIONS]
    _, hits = zero_shot(image @ embed.texts(texts).T, people)
    print(f"clip zero-shot accuracy: {hits}")
    save_half(clip, CLIP)
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64},
                       image_mean=MEAN, image_std=STD).save_pretrained(CLIP)
    shutil.copytree(MODEL / "tokenizer", CLIP, dirs_exist_ok=True)
    if vision_only:
        return
    text = CLIPTextModel(clip.config.text_config)
    text.text_model.load_state_dict(clip.text_model.state_dict())
    save_half(text, MODEL / "text_encoder")
    torch.save(text.state_dict(), CACHE / "text.pt")


if __name__ == "__main__":
    main()
