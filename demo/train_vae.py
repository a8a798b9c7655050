"""Trains the autoencoder (64x64x3 pictures <-> 8x8x4 latents) and writes model/vae.

Plain L1 blurs thin lines, so differences between neighbouring pixels count as well. The face is small but draws the
eye, so it counts more than the rest. The KL term is tiny: it only keeps the latents' scale in bounds for the diffusion.

With `--decoder` the encoder stays frozen and only the decoder continues to learn, from slightly disturbed latents. The
latents' meaning does not change, so this can run during or after the training of the diffusion, and it makes the
decoder tolerate the UNet's small errors.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from common import CACHE, MODEL, begin, cosine, pictures, save_half
from world import PEOPLE

BATCH = 16
RATE = 1.5e-3
KL_WEIGHT = 2e-6
DISTURBANCE = 0.06  # largest noise, as a fraction of the latents' spread
FACE = torch.ones(1, 1, 64, 64)
FACE[..., 13:44, 19:46] = 3.0


def build():
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=64,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(16, 32, 64, 128), layers_per_block=1, norm_num_groups=8)


def distance(rebuilt, picture):
    """Weighted differences of pixels, and of the steps between neighbouring pixels."""
    off = rebuilt - picture
    pixel = (FACE * (off.abs() + off**2)).mean()
    across = (FACE[..., :, 1:] * (off[..., :, 1:] - off[..., :, :-1]).abs()).mean()
    down = (FACE[..., 1:, :] * (off[..., 1:, :] - off[..., :-1, :]).abs()).mean()
    return pixel + across + down


def rebuild(vae, x, decoder_only):
    """The rebuilt pictures and the KL term."""
    if not decoder_only:
        posterior = vae.encode(x).latent_dist
        return vae.decode(posterior.sample()).sample.float(), posterior.kl().mean()
    with torch.no_grad():
        latent = vae.encode(x).latent_dist.mean
        spread = DISTURBANCE / vae.config.scaling_factor
        latent = latent + spread * torch.rand(len(x), 1, 1, 1) * torch.randn_like(latent)
    return vae.decode(latent).sample.float(), torch.zeros(())


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--minutes", type=float, default=13)
    args.add_argument("--decoder", action="store_true", help="continue with the decoder alone")
    args = args.parse_args()
    rng = begin(5 if args.decoder else 1)
    vae = build()
    if args.decoder:
        vae = AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32)
        vae.load_state_dict(torch.load(CACHE / "vae.pt"))
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    print(f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters")
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.98), weight_decay=1e-3)
    start, step, done = time.time(), 0, 0.0
    while done < 1:
        people = rng.choices(PEOPLE, k=BATCH)
        x = pictures(people, [rng.randrange(10**9) for _ in people])
        for group in optimiser.param_groups:
            group["lr"] = RATE * min((step + 1) / 100, cosine(done, 1.0, 0))
        with torch.autocast("cpu", torch.bfloat16):
            rebuilt, kl = rebuild(vae, x, args.decoder)
        loss = distance(rebuilt, x) + KL_WEIGHT * kl
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        step, done = step + 1, (time.time() - start) / (60 * args.minutes)
        if step % 50 == 0:
            print(f"vae step {step} {done:.0%} loss {loss.item():.4f} "
                  f"l1 {F.l1_loss(rebuilt, x).item():.4f}", flush=True)
    if not args.decoder:
        measure_scale(vae, rng)
    save_half(vae, MODEL / "vae")
    torch.save(vae.state_dict(), CACHE / "vae.pt")


@torch.no_grad()
def measure_scale(vae, rng):
    """Sets `scaling_factor` so that scaled latents have a spread of one."""
    people = rng.choices(PEOPLE, k=512)
    x = pictures(people, [rng.randrange(10**9) for _ in people])
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(64)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    print(f"vae scaling factor {vae.config.scaling_factor}")


if __name__ == "__main__":
    main()
