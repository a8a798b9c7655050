#!/usr/bin/env bash
# Makes the demo and demo XL from scratch, up to measured.json and measured_xl.json: four hours on two cores. Needs
# Python 3.11 or later; everything else comes from requirements.txt and goes into ./venv.
set -euo pipefail
cd "$(dirname "$0")"
python3 -m venv venv
venv/bin/pip install --quiet -r requirements.txt
for step in tokenizer.py train_vae.py train_clip.py cache.py train_unet.py \
    "train_unet.py --resume --steps 6500" \
    "train_vae.py --decoder" "train_clip.py --vision" pack.py \
    calibrate.py measure.py "calibrate.py --resume --rounds 9 --rate 3e-4" measure.py \
    "calibrate.py --resume --rounds 3 --steps 300 --count 100 --rate 1.2e-4" \
    "measure.py --seed 106 --count 300 --guidance 7.5" \
    xl.py train_xl.py "train_xl.py --resume --steps 900 --rate 6e-4" "train_xl.py --resume --steps 800" \
    "train_xl.py --resume --steps 450 --rate 6e-4" "pack.py --xl" \
    "measure.py --xl --seed 106 --count 32 --steps 25 --guidance 5"; do
    echo "== $step"
    # shellcheck disable=SC2086
    venv/bin/python $step
done
