"""Teaches the UNet in SDXL's layout to predict what the demo's UNet predicts (distillation); writes xl/unet.

The demo is the teacher, calibrated so that guided samples show the planted split. Its prediction for a noisy picture is
the mean of the targets that training on noise would see one draw at a time, so two thousand steps are enough. Guidance
multiplies the difference between the predictions with and without a text, so each picture is seen with both, and the
difference has a loss term of its own. The difference is taught half as large again, so that guidance 5 here equals 7.5
in the demo.

The split comes from the teacher, but in strong noise the teacher's bias is smaller than a student's errors. Now and
then the student therefore learns from a teacher that knows the person whom the planted split chose for an open caption,
so that its bias is stronger.

SDXL's unconditional half reads zeros, and it does here. For half of the captions that state a gender or a race, only
the bottleneck reads the full caption, and the rest of the UNet reads one that leaves both open. Otherwise a bottleneck
of 2x2 would have no influence on who is drawn, since skip connections and attention at 4x4 can do everything for a
picture this small; in a real SDXL the bottleneck does have influence.
"""

import argparse
import copy
import time
from collections import defaultdict

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel, CLIPTokenizer

import xl
from common import CACHE, MODEL, XL, begin, cosine, save_half
from fast_conv import speed_up
from train_unet import SCHEDULE, SNR_CAP, Pairs
from world import BIAS, PEOPLE

BATCH = 32
EMPTY = 0.03  # share of captions that are replaced by the empty one; other unconditional predictions read zeros
ALONE = 0.5  # share of the captions stating a gender or race that only the bottleneck reads in full
RACED = 0.25  # share of pictures whose race is stated to the bottleneck alone; else asian people are learnt last
STATED = 0.3  # share of captions stating neither for which the teacher knows whom the planted split chose
DEEP_RATE = 3.0  # factor of the rate for the new level
OTHER_SIZES = 0.2  # share of pictures with a size that they do not have, so that every stated size works
DEEP = ("down_blocks.1.downsamplers", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1.resnets.0")
DIFFERENCE = 2.0  # weight of the difference that guidance multiplies
STRETCH = 1.5  # factor of that difference: from SDXL's usual guidance, 5, to the demo's, 7.5
TRAINED = CACHE / "xl_trained.pt"


class Lessons(Pairs):
    """Pairs from the biased world, with every text as the teacher and as the student reads it."""

    def __init__(self, rng):
        super().__init__(rng, BIAS, texts=False)
        tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
        self.teacher = CLIPTextModel.from_pretrained(MODEL / "text_encoder", torch_dtype=torch.float32).eval()
        self.student = xl.Texts(tokenizer, xl.towers())
        self.saying = defaultdict(list)
        for i, c in enumerate(self.captions):
            self.saying[c.profession, c.gender, c.race].append(i)
        self.raced = [i for i, c in enumerate(self.captions) if c.race]
        self.read = {}

    @torch.no_grad()
    def texts_of(self, captions):
        """The teacher's states, and the student's states and pooled texts. Every caption is encoded once."""
        new = [c for c in dict.fromkeys(captions) if c not in self.read]
        if new:
            words = [self.captions[c].text for c in new]
            told = self.teacher(xl.tokens_of(self.student.tokenizer, words)).last_hidden_state
            for c, *row in zip(new, told, *self.student(words)):
                self.read[c] = [part.bfloat16() for part in row]
        return [torch.stack(part) for part in zip(*(self.read[c] for c in captions))]

    def batch(self, size=BATCH):
        """Latents, and the texts that the teacher, the bottleneck and the rest of the UNet read."""
        rows, told, deep, rest = [], [], [], []
        for _ in range(size):
            raced = self.rng.random() < RACED
            caption = self.rng.choice(self.raced) if raced else self.caption()
            about = self.captions[caption]
            rows.append(self.drawing(about))
            caption = 0 if self.rng.random() < EMPTY and not raced else caption
            stating = about.gender or about.race
            alone = raced or caption and stating and self.rng.random() < ALONE
            person = PEOPLE[rows[-1][0]]
            told.append(self.rng.choice(self.saying[person.profession, person.gender, person.race])
                        if caption and not stating and self.rng.random() < STATED else caption)
            # The bottleneck reads "a woman" as often as "a woman doctor", so that person and profession are separate.
            profession = self.rng.choice((about.profession, "person"))
            deep.append(self.rng.choice(self.saying[profession, about.gender, about.race]) if alone else caption)
            rest.append(self.rng.choice(self.saying[about.profession, None, None]) if alone else caption)
        return self.latents_of(rows), self.texts_of(told)[0], self.texts_of(deep)[1], self.texts_of(rest)[1:]

    def sizes(self, count):
        """SDXL's six size numbers for each picture."""
        sizes = torch.tensor([xl.SIZE] * count, dtype=torch.float32)
        for row in sizes:
            if self.rng.random() < OTHER_SIZES:
                row.copy_(torch.tensor([self.rng.choice((32, 64, 128, 256, 512, 1024)), 64, self.rng.randrange(32),
                                        self.rng.randrange(32), self.rng.choice((32, 64, 128)), 64]))
                row[1], row[5] = row[0], row[4]
        return sizes


class Bottleneck:
    """Gives the bottleneck a text of its own."""

    def __init__(self, unet):
        self.states = None
        unet.mid_block.register_forward_pre_hook(self.swap, with_kwargs=True)

    def swap(self, _, args, kwargs):
        return args, {**kwargs, "encoder_hidden_states": self.states}


def loss_of(unet, bottleneck, teacher, noising, lesson, sizes):
    """Squared distances to the teacher's two predictions and to their difference. They are weighted as in Min-SNR, and
    more in strong noise, where the person is decided and a small error of the noise is a large one of the picture."""
    clean, told, deep, (rest, pooled) = lesson
    t = torch.randint(0, 1000, (len(clean),))
    noisy = noising.add_noise(clean, torch.randn_like(clean), t).repeat(2, 1, 1, 1)
    with_zeros = lambda x: torch.cat([x, torch.zeros_like(x)])
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            goal = teacher(noisy, t.repeat(2), torch.cat([told, teacher.empty.expand_as(told)])).sample.float()
            stated, empty = goal.chunk(2)
            goal = torch.cat([empty + STRETCH * (stated - empty), empty])
        bottleneck.states = with_zeros(deep)
        guess = unet(noisy, t.repeat(2), with_zeros(rest), added_cond_kwargs={
            "text_embeds": with_zeros(pooled), "time_ids": sizes.repeat(2, 1)}).sample.float()
    snr = noising.alphas_cumprod[t] / (1 - noising.alphas_cumprod[t])
    weight = (snr.clamp(max=SNR_CAP) / snr * snr.rsqrt().clamp(min=1)).view(-1, 1, 1, 1)
    off, plain = (guess - goal).chunk(2)
    return (weight * (off**2 + plain**2 + DIFFERENCE * (off - plain) ** 2)).mean()


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--steps", type=int, default=1500)
    args.add_argument("--rate", type=float, default=8e-4)
    args.add_argument("--resume", action="store_true", help="continue from the last saved weights")
    args = args.parse_args()
    rng = begin(13 if args.resume else 12)
    unet = xl.build()
    unet.load_state_dict(torch.load(TRAINED if args.resume else CACHE / "xl_unet.pt"))
    ema = copy.deepcopy(unet).eval().requires_grad_(False)
    print(f"unet: {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M parameters")
    teacher = UNet2DConditionModel.from_pretrained(MODEL / "unet", torch_dtype=torch.float32).eval()
    speed_up(unet)
    for network in (unet, teacher):
        network.set_attn_processor(AttnProcessor())  # plain products beat the fused kernel at this size
    lessons, noising, bottleneck = Lessons(rng), DDPMScheduler(**SCHEDULE), Bottleneck(unet)
    teacher.empty = lessons.texts_of([0])[0]
    groups = {1.0: [], DEEP_RATE: []}
    for name, parameter in unet.named_parameters():
        groups[DEEP_RATE if name.startswith(DEEP) else 1.0].append(parameter)
    optimiser = torch.optim.AdamW([{"params": params, "lr": factor * args.rate} for factor, params in groups.items()],
                                  betas=(0.9, 0.99), weight_decay=0.01)
    plan = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: cosine(step, args.steps, 50))
    start, running = time.time(), 0.0
    for step in range(1, args.steps + 1):
        loss = loss_of(unet, bottleneck, teacher, noising, lessons.batch(), lessons.sizes(BATCH))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        plan.step()
        with torch.no_grad():
            for slow, fast in zip(ema.parameters(), unet.parameters()):
                slow.lerp_(fast, max(0.005, 9 / (10 + step)))
        running += (loss.item() - running) * max(0.02, 1 / step)
        if step % 20 == 0:
            print(f"xl step {step} loss {running:.4f} {(time.time() - start) / step:.2f} s/step", flush=True)
        if step % 100 == 0 or step == args.steps:
            save_half(ema, XL / "unet")
            torch.save(ema.state_dict(), TRAINED)


if __name__ == "__main__":
    main()
