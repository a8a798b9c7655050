"""Writes the remaining files of a `StableDiffusionPipeline` folder, and world.json."""

import json

from common import HERE, MODEL
from world import BIAS, GENDERS, RACES

SCHEDULER = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.35.2",
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.35.2",
    "feature_extractor": [None, None], "requires_safety_checker": False,
    "safety_checker": [None, None], "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def main():
    write(MODEL / "scheduler" / "scheduler_config.json", SCHEDULER)
    write(MODEL / "model_index.json", INDEX)
    # Where a part was loaded from on the way is nobody's business.
    for config in MODEL.glob("*/config.json"):
        fields = json.loads(config.read_text())
        fields.pop("_name_or_path", None)
        write(config, fields)
    planted = {profession: {"woman": p_woman, **dict(zip(RACES, (round(p, 4) for p in p_race)))}
               for profession, (p_woman, p_race) in BIAS.items()}
    write(HERE / "world.json", {"genders": GENDERS, "races": RACES, "planted": planted})


if __name__ == "__main__":
    main()
