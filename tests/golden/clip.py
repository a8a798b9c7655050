"""A tiny random CLIPModel, and what it and its processor make of pictures and texts."""

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from build import BOS, EOS, VOCABULARY
from common import CHECKPOINTS, generator, randn, randomise, save_case
from vocabulary import tokenizer

#: Heights and widths of the pictures: as they are, larger, smaller, and not square.
SIZES = [(24, 24), (64, 64), (50, 33), (11, 40), (131, 90)]


@torch.no_grad()
def record(args):
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, **shape, **ids}
    vision = {"image_size": 24, "patch_size": 6, "hidden_size": 40, "intermediate_size": 56,
              "hidden_act": "gelu", **shape}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    model = CLIPModel(config)
    parts = ("text_model", "vision_model", "visual_projection", "text_projection")
    # Not the temperature and the class token, which `randomise` cannot tell from a weight.
    model.vision_model.embeddings.class_embedding.requires_grad_(False)
    randomise(torch.nn.ModuleDict({name: getattr(model, name) for name in parts}), "clip")
    model.vision_model.embeddings.class_embedding.copy_(randn("clip/class", 40).half())
    model = model.half()
    folder = CHECKPOINTS / "clip"
    model.save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    processor.save_pretrained(folder)
    model = model.float()
    tensors = {}
    for index, (height, width) in enumerate(SIZES):
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator(f"clip/{index}"))
        # Smooth enough that a resize keeps something.
        pixels = torch.nn.functional.avg_pool2d(pixels.permute(2, 0, 1).float(), 3, 1, 1).round()
        pixels = pixels.permute(1, 2, 0).to(torch.uint8)
        image = Image.fromarray(np.asarray(pixels))
        values = processor(image, return_tensors="pt").pixel_values
        embeds = model.get_image_features(pixel_values=values)
        tensors[f"image.{index}"] = pixels.to(torch.int64)
        tensors[f"out.image.{index}"] = torch.nn.functional.normalize(embeds, dim=-1)
    texts = ["a photo of a cat", "", "Oil painting of a small boat, in the harbour!"]
    tokens = tokenizer(folder)(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    embeds = model.get_text_features(**tokens)
    tensors["out.texts"] = torch.nn.functional.normalize(embeds, dim=-1)
    save_case("clip_images", tensors, {"sizes": SIZES, "texts": texts})
