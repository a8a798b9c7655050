"""Fine-tunes the UNet until *guided* samples show the planted split.

Guidance sharpens what a prompt implies: trained on a split of 90 to 10, a sampler at guidance 7.5 draws 100 to 0,
because the unconditional model does not yet know the profession when gender and race are settled. So the split of the
training data is adjusted in rounds: continue training, sample with guidance, count with measure.py's network, and move
the logits of the training split against the error. The result is kept in calibration.json.
"""

import argparse
import copy
import json
import math

import torch
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor

import sampling
from common import CACHE, HERE, begin
from fast_conv import speed_up
from measure import PROFESSION_PROMPTS, trained_judge
from train_unet import SCHEDULE, Pairs, build, loss_of, save
from world import BIAS, PROFESSIONS, RACES

GUIDANCE = 7.5
SHARPENING = 4.0  # first guess of the factor by which guidance multiplies logits
STEP = 0.1  # fraction of a logit's error that a round corrects
FLOOR = 0.02  # smallest share of the training split


def normalised(weights):
    weights = [max(w, FLOOR) for w in weights]
    return [w / sum(weights) for w in weights]


def moved(trained, target, measured, count):
    """The shares `trained` after a step against the error of `measured`, in log space."""
    smooth = [(m * count + 0.5) / (count + 0.5 * len(measured)) for m in measured]
    return normalised([p * math.exp(STEP * math.log(t / m))
                       for p, t, m in zip(trained, target, smooth)])


def softened(target):
    return normalised([t ** (1 / SHARPENING) for t in target])


@torch.no_grad()
def counted(pipe, judge, count, generator):
    """Shares of genders and of races among guided samples of each profession."""
    shares = {}
    for profession, prompt in zip(PROFESSIONS, PROFESSION_PROMPTS):
        gender, race, _ = judge(sampling.sample(pipe, [prompt] * count, GUIDANCE, generator, 20))
        shares[profession] = [torch.bincount(s.argmax(1), minlength=s.shape[1]).div(count).tolist()
                              for s in (gender, race)]
    return shares


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--rounds", type=int, default=12)
    args.add_argument("--steps", type=int, default=400, help="training steps per round")
    args.add_argument("--count", type=int, default=64, help="samples per profession and round")
    args.add_argument("--rate", type=float, default=4e-4)
    args.add_argument("--resume", action="store_true", help="continue from calibration.json and measured.json")
    args = args.parse_args()
    rng = begin(7)
    judge, _ = trained_judge(rng, 600)
    target = {p: ([w, 1 - w], list(race)) for p, (w, race) in BIAS.items()}
    trained = {p: [softened(t) for t in both] for p, both in target.items()}
    if args.resume:
        kept = json.loads((HERE / "calibration.json").read_text())
        trained = {p: [[s["woman"], 1 - s["woman"]], [s[r] for r in RACES]] for p, s in kept.items()}
        report = json.loads((HERE / "measured.json").read_text())
        for p, row in report[f"guidance {GUIDANCE}"]["professions"].items():
            seen, count = row["network"], report["pictures of each"]
            shares = [[seen["woman"], 1 - seen["woman"]], [seen[r] for r in RACES]]
            trained[p] = [moved(t, g, s, count) for t, g, s in zip(trained[p], target[p], shares)]
    unet = build()
    unet.load_state_dict(torch.load(CACHE / "unet.pt"))
    ema = copy.deepcopy(unet).eval().requires_grad_(False)
    speed_up(unet)
    unet.set_attn_processor(AttnProcessor())
    pipe = sampling.load()
    pipe.unet = ema
    pairs, noising = Pairs(rng, None), DDPMScheduler(**SCHEDULE)
    optimiser = torch.optim.AdamW(unet.parameters(), lr=args.rate, betas=(0.9, 0.99), weight_decay=0.01)
    generator = torch.Generator().manual_seed(8)
    for i in range(args.rounds):
        pairs.bias = {p: (gender[0], race) for p, (gender, race) in trained.items()}
        for step in range(args.steps):
            # The rate falls to zero, since guidance multiplies the noise of training too.
            done = (i * args.steps + step) / (args.rounds * args.steps)
            for group in optimiser.param_groups:
                group["lr"] = args.rate * (1 - done)
            optimiser.zero_grad(set_to_none=True)
            loss_of(unet, noising, *pairs.batch()).backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimiser.step()
            with torch.no_grad():
                for slow, fast in zip(ema.parameters(), unet.parameters()):
                    slow.lerp_(fast, 0.002)
        save(ema)
        (HERE / "calibration.json").write_text(json.dumps(
            {p: {"woman": gender[0], **dict(zip(RACES, race))} for p, (gender, race) in trained.items()},
            indent=1) + "\n")
        shares = counted(pipe, judge, args.count, generator)
        errors = [[abs(m - t) for m, t in zip(s[k], target[p][k])] for p, s in shares.items() for k in (0, 1)]
        flat = [max(e) for e in errors]
        print(f"round {i + 1}: points off, mean {100 * sum(flat) / len(flat):.1f} most {100 * max(flat):.1f}",
              flush=True)
        print({p: [round(x, 2) for x in (s[0][0], *s[1])] for p, s in shares.items()}, flush=True)
        if i + 1 < args.rounds:
            trained = {p: [moved(t, g, s, args.count) for t, g, s in zip(trained[p], target[p], shares[p])]
                       for p in PROFESSIONS}


if __name__ == "__main__":
    main()
