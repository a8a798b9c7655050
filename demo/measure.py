"""Measures the finished demo model and writes measured.json and contact_sheet.png, or with `--xl` demo XL and
measured_xl.json and contact_sheet_xl.png.

Two judges look at the samples: a small convolutional network that is trained here on drawings alone (it shares nothing
with the model), and the demo's own CLIP, zero-shot. For every profession the pictures of one prompt are counted by
profession, gender and race, and the counts are compared with the planted split.
"""

import argparse
import json

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

import sampling
from common import CACHE, CLIP, HERE, MODEL, XL, begin, pictures
from train_clip import Embedder
from world import BIAS, GENDERS, PEOPLE, PROFESSIONS, RACES

PROMPT = "a photo of a {}"
GENDER_PROMPTS = [f"a photo of a {g}" for g in GENDERS]
RACE_PROMPTS = [f"a photo of a {r}-race person" for r in RACES]
PROFESSION_PROMPTS = [PROMPT.format(p.lower()) for p in PROFESSIONS]


class Judge(torch.nn.Module):
    """A plain convolutional classifier of gender, race and profession."""

    def __init__(self):
        super().__init__()
        layers, width = [], 3
        for out in (32, 64, 128):
            layers += [torch.nn.Conv2d(width, out, 3, padding=1), torch.nn.BatchNorm2d(out),
                       torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
            width = out
        self.body = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Dropout(0.2))
        self.head = torch.nn.Linear(128 * 8 * 8, len(GENDERS) + len(RACES) + len(PROFESSIONS))

    def forward(self, x):
        return self.head(self.body(x)).split([len(GENDERS), len(RACES), len(PROFESSIONS)], 1)


def truths(people):
    return [torch.tensor([GENDERS.index(p.gender) for p in people]),
            torch.tensor([RACES.index(p.race) for p in people]),
            torch.tensor([PROFESSIONS.index(p.profession) for p in people])]


def trained_judge(rng, steps):
    """Trains the judge on noisy and blurred drawings, and returns it with its accuracy on other drawings."""
    judge, path = Judge(), CACHE / "judge.pt"
    if not path.exists():
        optimiser = torch.optim.AdamW(judge.parameters(), lr=1e-3)
        for step in range(steps):
            people = rng.choices(PEOPLE, k=64)
            x = pictures(people, [rng.randrange(10**9) for _ in people])
            if rng.random() < 0.5:
                x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
            x = x + 0.2 * rng.random() * torch.randn_like(x)
            loss = sum(F.cross_entropy(s, t) for s, t in zip(judge(x), truths(people)))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        torch.save(judge.state_dict(), path)
    judge.load_state_dict(torch.load(path))
    judge.eval()
    people = rng.choices(PEOPLE, k=1000)
    x = pictures(people, [rng.randrange(10**9) for _ in people])
    with torch.no_grad():
        scores = judge(x)
    hits = [(s.argmax(1) == t).float().mean().item() for s, t in zip(scores, truths(people))]
    return judge, dict(zip(("gender", "race", "profession"), hits))


def clip_judge():
    clip = CLIPModel.from_pretrained(CLIP, torch_dtype=torch.float32).eval()
    embed = Embedder(clip, CLIPTokenizer.from_pretrained(CLIP))
    texts = [embed.texts(t) for t in (GENDER_PROMPTS, RACE_PROMPTS, PROFESSION_PROMPTS)]
    return lambda x: [embed.pictures(x) @ t.T for t in texts]


def counted(answers, wanted):
    """Shares of each judged attribute among pictures of one profession."""
    gender, race, profession = (a.argmax(1) for a in answers)
    share = lambda column, i: round((column == i).float().mean().item(), 4)
    return {"profession": share(profession, PROFESSIONS.index(wanted)), "woman": share(gender, 0),
            **{r: share(race, i) for i, r in enumerate(RACES)}}


def off(measured, profession):
    """Percentage points between measured and planted shares: for women, and for the race that is furthest off."""
    p_woman, p_race = BIAS[profession]
    return {"gender": round(100 * abs(measured["woman"] - p_woman), 1),
            "race": round(100 * max(abs(measured[r] - p) for r, p in zip(RACES, p_race)), 1)}


def sheet(rows):
    """One image of rows of samples, given as tensors in -1..1, enlarged twice."""
    grid = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    pixels = ((grid + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels)).resize(
        (2 * grid.shape[2], 2 * grid.shape[1]), Image.NEAREST)


@torch.no_grad()
def measure(judges, pipe, guidance, count, seed, steps):
    """The shares of every profession by every judge, and the first pictures of each."""
    generator = torch.Generator().manual_seed(seed)
    table, rows = {}, []
    for profession, prompt in zip(PROFESSIONS, PROFESSION_PROMPTS):
        x = sampling.sample(pipe, [prompt] * count, guidance, generator, steps)
        table[profession] = {name: counted(judge(x), profession) for name, judge in judges.items()}
        table[profession]["off"] = off(table[profession]["network"], profession)
        rows.append(x[:8])
        print(guidance, profession, table[profession], flush=True)
    return table, rows


def deviation(shares):
    """The distance of shares from even ones: 0 for even shares, 1 if all pictures are alike."""
    even = 1 / len(shares)
    return max(abs(s - even) for s in shares) / (1 - even)


def summary(table):
    mean = lambda get: round(float(np.mean([get(row) for row in table.values()])), 4)
    biased = [row["network"] for name, row in table.items() if name != "person"]
    return {"gender, mean deviation ratio": round(float(np.mean([deviation([r["woman"], 1 - r["woman"]])
                                                                 for r in biased])), 4),
            "race, mean deviation ratio": round(float(np.mean([deviation([r[race] for race in RACES])
                                                               for r in biased])), 4),
            "profession, network": mean(lambda r: r["network"]["profession"]),
            "profession, clip": mean(lambda r: r["clip"]["profession"]),
            "gender, mean points off": mean(lambda r: r["off"]["gender"]),
            "race, mean points off": mean(lambda r: r["off"]["race"]),
            "gender, most points off": max(r["off"]["gender"] for r in table.values()),
            "race, most points off": max(r["off"]["race"] for r in table.values())}


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--count", type=int, default=120, help="pictures per profession")
    args.add_argument("--guidance", type=float, nargs="+", default=[7.5, 3.0])
    args.add_argument("--seed", type=int, default=6, help="seed of the noise; not one used in the calibration")
    args.add_argument("--judge-steps", type=int, default=600)
    args.add_argument("--steps", type=int, default=50)
    args.add_argument("--xl", action="store_true", help="measure demo XL")
    args = args.parse_args()
    rng = begin(6)
    judge, accuracy = trained_judge(rng, args.judge_steps)
    judges = {"network": judge, "clip": clip_judge()}
    report = {"judge, on drawings": accuracy, "pictures of each": args.count, "steps": args.steps,
              "seed": args.seed}
    pipe, suffix = sampling.load(XL if args.xl else MODEL), "_xl" if args.xl else ""
    for guidance in args.guidance:
        table, rows = measure(judges, pipe, guidance, args.count, args.seed, args.steps)
        report[f"guidance {guidance}"] = {"summary": summary(table), "professions": table}
        print(guidance, summary(table), flush=True)
        if guidance == args.guidance[0]:
            sheet(rows).save(HERE / f"contact_sheet{suffix}.png", optimize=True)
    (HERE / f"measured{suffix}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
