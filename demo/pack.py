"""Writes the remaining files of a checkpoint: those of the demo and world.json, or with `--xl` those of demo XL."""

import argparse
import json
import shutil

from common import HERE, MODEL, XL
from world import BIAS, GENDERS, RACES

VERSION = "0.35.2"
NOISING = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
           "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
           "trained_betas": None}
SCHEDULER = {"_class_name": "PNDMScheduler", "_diffusers_version": VERSION, **NOISING}
INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": VERSION,
    "feature_extractor": [None, None], "requires_safety_checker": False,
    "safety_checker": [None, None], "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
}
XL_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler", "_diffusers_version": VERSION, **NOISING,
    "interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0,
    "timestep_spacing": "leading", "use_karras_sigmas": False,
}
XL_INDEX = {
    "_class_name": "StableDiffusionXLPipeline", "_diffusers_version": VERSION,
    "add_watermarker": None, "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def finish(folder, scheduler, index):
    write(folder / "scheduler" / "scheduler_config.json", scheduler)
    write(folder / "model_index.json", index)
    # The folder that a part was loaded from does not belong in the checkpoint.
    for config in folder.glob("*/config.json"):
        fields = json.loads(config.read_text())
        fields.pop("_name_or_path", None)
        write(config, fields)


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--xl", action="store_true")
    if args.parse_args().xl:
        for own, demo in (("tokenizer", "tokenizer"), ("tokenizer_2", "tokenizer"), ("vae", "vae")):
            shutil.copytree(MODEL / demo, XL / own, dirs_exist_ok=True)
        finish(XL, XL_SCHEDULER, XL_INDEX)
        return
    finish(MODEL, SCHEDULER, INDEX)
    planted = {profession: {"woman": p_woman, **dict(zip(RACES, (round(p, 4) for p in p_race)))}
               for profession, (p_woman, p_race) in BIAS.items()}
    write(HERE / "world.json", {"genders": GENDERS, "races": RACES, "planted": planted})


if __name__ == "__main__":
    main()
