"""FID, CMMD and CLIP score of small pictures, by clean-fid, the CMMD paper's formula and torchmetrics.

The Inception is that of pytorch-fid, built of its own classes, with a sixteenth of the channels and random weights.
"""

import json
import shutil

import numpy as np
import pytorch_fid.inception
import torch
import torchvision
from cleanfid import fid as cleanfid
from cleanfid.resize import build_resizer
from PIL import Image, PngImagePlugin
from pytorch_fid.inception import FIDInceptionA, FIDInceptionC, FIDInceptionE_1, FIDInceptionE_2
from safetensors.torch import save
from torchmetrics.functional.multimodal.clip_score import _clip_score_update
from torchmetrics.multimodal import CLIPScore
from torchvision.models import inception
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor

from common import CHECKPOINTS, ROOT, generator, randn, save_case, sorted_header
from vocabulary import tokenizer

FOLDER = ROOT / "pictures"
#: Pictures that are measured, and those that they are compared with.
COUNTS = {"images": 24, "reference": 27}
SLIM = 16
CAPTIONS = ["a photo of a cat", "Oil painting of a small boat, in the harbour!", "two dogs\nand a bird", "a red house"]


def build(divisor):
    """pytorch-fid's Inception with every number of channels divided, but for the picture's three."""
    def part(cls):
        return lambda *args, **kwargs: cls(*args, **{**kwargs, "conv_block": block})

    def block(inputs, outputs, **kwargs):
        return inception.BasicConv2d(inputs if inputs == 3 else inputs // divisor, outputs // divisor, **kwargs)

    parts = [part(getattr(inception, f"Inception{letter}")) for letter in "ABCDE"]
    model = inception.Inception3(1008, aux_logits=False, init_weights=False,
                                 inception_blocks=[block, *parts, None])
    kinds = {"5b": FIDInceptionA, "5c": FIDInceptionA, "5d": FIDInceptionA, "6b": FIDInceptionC, "6c": FIDInceptionC,
             "6d": FIDInceptionC, "6e": FIDInceptionC, "7b": FIDInceptionE_1, "7c": FIDInceptionE_2}
    for name, kind in kinds.items():
        getattr(model, f"Mixed_{name}").__class__ = kind
    model.fc = torch.nn.Linear(2048 // divisor, 1008 // divisor)
    return model


@torch.no_grad()
def fill(model, label, pictures):
    """Random weights. The batch norms' means and variances are those of these pictures, as after a training, for else
    features would hardly differ from picture to picture. Everything is rounded to fp16."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            values = randn(f"{label}/{name}", *tensor.shape)
            if tensor.ndim > 1:
                values *= (2 / tensor[0].numel()) ** 0.5
            else:
                values = float(not name.endswith("bias")) + 0.2 * values.clamp(-3, 3)
            tensor.copy_(values.half())
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    extractor(model.train())(pictures)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.half())
    return model.eval()


def extractor(model):
    """The function from clean-fid's batches to features, through pytorch-fid's forward pass."""
    pytorch_fid.inception.fid_inception_v3 = lambda: model
    network = pytorch_fid.inception.InceptionV3(resize_input=False, normalize_input=False)

    def run(batch):
        with torch.no_grad():
            # clean-fid's wrapper normalises so.
            return network((batch - 128) / 128)[0][:, :, 0, 0]
    return run


def picture(label, height, width, channels=3):
    """Smooth noise, since nothing is left of white noise when it is made smaller."""
    coarse = torch.rand(1, channels, 2 + height // 9, 2 + width // 9, generator=generator(label))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return (fine[0].permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def write_pictures(prompts):
    """PNG files of odd sizes and all kinds of colour, some wide, some high, with their prompts as A1111 or we write
    them."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    for folder, count in COUNTS.items():
        (FOLDER / folder).mkdir(parents=True)
        sizes = torch.randint(17, 64, (count, 2), generator=generator(f"quality/{folder}")).tolist()
        for i, (height, width) in enumerate(sizes):
            label = f"quality/{folder}/{i}"
            if i % 6 == 3:
                image = Image.fromarray(picture(label, height, width, 1)[:, :, 0])
            elif i % 6 == 4:
                image = Image.fromarray(picture(label, height, width, 4))
            elif i % 6 == 5:
                image = Image.fromarray(picture(label, height, width)).quantize(40)
            else:
                image = Image.fromarray(picture(label, height, width))
            if folder == "reference":
                # Other pictures than those that are compared with them: darker, with more contrast.
                image = image.convert("RGB").point(lambda x: max(0, 2 * x - 160))
            text = PngImagePlugin.PngInfo()
            name = f"{i:02}.png"
            if folder == "images":
                prompt = prompts[i]
                settings = f"Steps: 20, Sampler: DDIM, Seed: {i}"
                record = {"prompt": prompt, "steps": 20, "sampler": "DDIM", "spacing": "Automatic", "guidance": 7.5,
                          "seed": i, "rng": "torch-cpu", "width": width, "height": height, "model": "m", "version": "0"}
                if i % 3 == 0:
                    text.add_text("respodiff", json.dumps(record))
                else:
                    negative = "Negative prompt: x\n" if i % 2 else ""
                    text.add_itxt("parameters", f"{prompt}\n{negative}{settings}")
            image.save(FOLDER / folder / name, pnginfo=text, optimize=True)
    return prompts


def write_decoded():
    """JPEG and WebP files, and what Pillow reads in them, as PNG."""
    folder = FOLDER / "decoded"
    folder.mkdir()
    kinds = {"420.jpg": {"quality": 90, "subsampling": 2}, "422.jpg": {"quality": 80, "subsampling": 1},
             "444.jpg": {"quality": 95, "subsampling": 0}, "progressive.jpg": {"quality": 75, "progressive": True},
             "grey.jpeg": {"quality": 90}, "lossless.webp": {"lossless": True}, "lossy.webp": {"quality": 80},
             "alpha.webp": {"lossless": True, "exact": True}}
    for i, (name, options) in enumerate(kinds.items()):
        channels = {"grey.jpeg": 1, "alpha.webp": 4}.get(name, 3)
        pixels = picture(f"quality/{name}", 61 + i, 83 - i, channels)
        Image.fromarray(pixels.squeeze()).save(folder / name, **options)
        Image.open(folder / name).convert("RGB").save(folder / f"{name}.png", optimize=True)


def frechet(a, b):
    """The Frechet distance in float64, by an eigendecomposition that is exact for singular covariances too."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    (x, y) = (a - a.mean(0), b - b.mean(0))
    # The singular values of x y^T are the square roots of the eigenvalues of C1 C2, up to the factors.
    root = np.linalg.svd(x @ y.T / np.sqrt((len(a) - 1) * (len(b) - 1)), compute_uv=False).sum()
    trace = (x ** 2).sum() / (len(a) - 1) + (y ** 2).sum() / (len(b) - 1)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + trace - 2 * root)


def cmmd(x, y):
    """Equation 5 of Gretton et al. with the kernel of the CMMD paper, pair by pair."""
    x, y = x.astype(np.float64), y.astype(np.float64)

    def kernel(a, b):
        return np.exp(-((a[:, None, :] - b[None, :, :]) ** 2).sum(-1) / (2 * 10 ** 2)).mean()
    return float(1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)))


def square(image, size):
    """As the authors of CMMD read pictures."""
    side = min(image.size)
    left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.BICUBIC)


@torch.no_grad()
def embeddings(model, processor, files):
    rows = []
    for file in files:
        image = square(Image.open(file).convert("RGB"), model.config.vision_config.image_size)
        values = processor(image, do_resize=False, do_center_crop=False, return_tensors="pt").pixel_values
        rows.append(torch.nn.functional.normalize(model.get_image_features(pixel_values=values), dim=-1))
    return torch.cat(rows)


@torch.no_grad()
def record(args):
    clip = CLIPModel.from_pretrained(CHECKPOINTS / "clip").float().eval()
    images = CLIPImageProcessor.from_pretrained(CHECKPOINTS / "clip")
    processor = CLIPProcessor(images, tokenizer(CHECKPOINTS / "clip"))

    def scores(file, texts):
        pixels = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)
        return _clip_score_update([pixels] * len(texts), texts, clip, processor)[0].tolist()
    # Of 32 captions each picture gets the nearest, but every eighth picture the furthest, with a cosine below 0.
    candidates = [[f"{caption} {j} of {i}" for caption in CAPTIONS for j in range(8)] for i in range(COUNTS["images"])]
    write_pictures([texts[0] for texts in candidates])
    files = {name: sorted((FOLDER / name).iterdir()) for name in COUNTS}
    prompts = []
    for i, (file, texts) in enumerate(zip(files["images"], candidates)):
        ranked = [text for _, text in sorted(zip(scores(file, texts), texts))]
        prompts.append(ranked[0 if i % 8 == 3 else -1])
    write_pictures(prompts)
    write_decoded()
    # Both of the published files' formats: torch.save's old one, and safetensors.
    resize = build_resizer("clean")
    resized = [resize(np.array(Image.open(file).convert("RGB"))) for file in files["images"] + files["reference"]]
    model = fill(build(SLIM), "inception", torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)).half()
    folder = CHECKPOINTS / "inception"
    folder.mkdir(exist_ok=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").write_bytes(sorted_header(save(state)))
    run = extractor(model.float())
    options = {"mode": "clean", "num_workers": 0, "batch_size": 8, "device": torch.device("cpu")}
    features = {name: cleanfid.get_folder_features(str(FOLDER / name), run, verbose=False, **options)
                for name in COUNTS}
    score = cleanfid.compute_fid(*(str(FOLDER / name) for name in COUNTS), custom_feat_extractor=run, verbose=False,
                                 **options)
    # The same network in float64, to tell rounding from faults.
    split = len(files["images"])
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
    exact = extractor(model.double())(pixels.double()).float().split([split, len(resized) - split])
    # As pytorch-fid saves statistics.
    np.savez_compressed(FOLDER / "reference.npz", mu=np.mean(features["reference"], axis=0),
                        sigma=np.cov(features["reference"], rowvar=False))

    embeds = {name: embeddings(clip, images, files[name]) for name in COUNTS}
    metric = CLIPScore(model_name_or_path=lambda: (clip, processor))
    for file, prompt in zip(files["images"], prompts):
        metric.update(torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1), prompt)
    pairs = [scores(file, [prompt])[0] for file, prompt in zip(files["images"], prompts)]
    table = "".join(f"{file.name}\t{' '.join(text.split())}\n" for file, text in zip(files["images"], prompts))
    (FOLDER / "captions.tsv").write_text(table)

    # Covariances of full rank, where the root of the product is well conditioned.
    rows = {side: (randn(f"quality/{side}", count, 40) @ randn(f"quality/{side}/mix", 40, 40) * 0.2 + shift)
            for side, count, shift in (("a", 200, 0.0), ("b", 300, 0.3))}
    doubles = [side.double().numpy() for side in rows.values()]
    moments = [(np.mean(x, axis=0), np.cov(x, rowvar=False)) for x in doubles]
    tensors = {f"out.features.{name}": torch.from_numpy(features[name]) for name in COUNTS}
    tensors |= {f"out.exact.{name}": rows64 for name, rows64 in zip(COUNTS, exact)}
    tensors |= {f"out.embeds.{name}": embeds[name] for name in COUNTS}
    save_case("quality", {**tensors, **rows}, {
        "fid_cleanfid": float(score), "fid_float64": frechet(features["images"], features["reference"]),
        "frechet_cleanfid": float(cleanfid.frechet_distance(*moments[0], *moments[1])),
        "frechet_float64": frechet(rows["a"].numpy(), rows["b"].numpy()),
        "cmmd": cmmd(embeds["images"].numpy(), embeds["reference"].numpy()),
        "clip_pairs": pairs, "clip_score": float(metric.compute()), "prompts": prompts})
