"""Draws a `Person` as a 64x64 cartoon portrait.

The large, plain areas (background, clothes) show the profession, so that it settles early in the denoising. Hair and
face show gender and race.
"""

import math

from outfits import OUTFITS
from pen import BLACK, INK, WHITE, Pen, shade
from world import seeded

SKIN = {"white": (255, 220, 200), "black": (112, 70, 46), "asian": (234, 186, 134)}
HAIR = {"white": ((232, 190, 96), (158, 98, 52), (196, 92, 44)),
        "black": ((40, 28, 24),), "asian": ((24, 22, 30),)}
SHIRTS = ((214, 72, 72), (72, 120, 214), (84, 170, 96), (150, 96, 190), (90, 90, 96))


def draw(person, seed):
    """The picture number `seed` of `person`. The same arguments give the same picture."""
    rng = seeded(person, seed)
    outfit = OUTFITS[person.profession]
    light = rng.uniform(0.95, 1.05)
    pen = Pen(shade(outfit.background, light))
    outfit.scenery(pen)
    pen.dx, pen.dy = rng.uniform(-1.5, 1.5), rng.uniform(-1.0, 1.5)
    skin = shade(SKIN[person.race], rng.uniform(0.96, 1.04))
    hair = rng.choice(HAIR[person.race])
    curly = person.race == "black"
    woman = person.gender == "woman"
    length = rng.choice((42, 50)) if woman else 0
    if woman:
        _hair_behind(pen, hair, length, curly)
    pen.box(28, 36, 36, 48, shade(skin, 0.86))
    pen.box(12, 46, 52, 80, rng.choice(SHIRTS) if person.profession == "person"
            else outfit.cloth, radius=9)
    pen.oval(32, 46.5, 5, 3, shade(skin, 0.86))
    outfit.clothes(pen)
    _face(pen, skin, hair, woman, rng)
    _hair_in_front(pen, hair, woman, curly, outfit.hat is not None)
    outfit.face(pen)
    if outfit.hat:
        outfit.hat(pen)
    pen.dx = pen.dy = 0.0
    outfit.tool(pen)
    return pen.finished()


def _hair_behind(pen, hair, length, curly):
    pen.oval(32, 26, 15, 15.5, hair)
    if curly:
        for y in range(26, length, 4):
            pen.oval(19, y, 4, 4, hair)
            pen.oval(45, y, 4, 4, hair)
        pen.box(20, 26, 44, length - 4, hair)
    else:
        pen.box(17, 26, 47, length, hair, radius=4)


def _face(pen, skin, hair, woman, rng):
    pen.oval(20.8, 28, 2, 3, shade(skin, 0.9))
    pen.oval(43.2, 28, 2, 3, shade(skin, 0.9))
    pen.oval(32, 27, 11, 13, skin)
    beard = None
    if not woman:
        pen.box(22, 26, 42, 39, skin, radius=6)
        beard = rng.choice(("full", "full", "moustache", "none"))
    if beard == "full":
        pen.draw.chord(pen.corners(21, 16, 43, 41.5), 15, 165, hair)
        pen.oval(32, 31.5, 7, 3.4, skin)
    if beard in ("full", "moustache"):
        pen.box(27, 32.2, 37, 34.4, hair, radius=1)
    dark = shade(skin, 0.72)
    pen.line((32, 28), (31.4, 31), (33, 31), fill=dark, width=0.8)
    for x in (27.5, 36.5):
        pen.oval(x, 26.4, 2.1, 1.9, WHITE)
        pen.oval(x, 26.5, 1.3, 1.5, INK)
    brow = shade(hair, 0.8)
    if woman:
        for side, x in ((-1, 27.5), (1, 36.5)):
            pen.line((x - 2, 22.6), (x + 2, 22.6), fill=brow, width=0.6)
            pen.arc(x, 26.4, 2.6, 2.3, 190, 350, BLACK, 0.9)
            pen.line((x + side * 2.2, 25.6), (x + side * 3.6, 24.4), fill=BLACK, width=0.8)
            pen.oval(x + side * 1.5, 30.6, 2.0, 1.3, tuple(
                round(0.75 * s + 0.25 * r) for s, r in zip(skin, (240, 90, 110))))
        pen.oval(32, 34.6, 3.4, 1.7, (208, 44, 72))
        pen.line((28.9, 34.4), (35.1, 34.4), fill=(150, 24, 50), width=0.5)
    else:
        for x in (27.5, 36.5):
            pen.line((x - 2.8, 22.9), (x + 2.8, 22.9), fill=brow, width=1.7)
        pen.line((29, 35.4), (35, 35.4), fill=(122, 56, 50), width=0.9)


def _hair_in_front(pen, hair, woman, curly, hat):
    """Draws the hair line; under a hat, only the part that shows below the brim."""
    if woman:
        pen.poly((20, 36), (19, 18), (26, 16), (22.5, 24), (23, 36), fill=hair)
        pen.poly((44, 36), (45, 18), (38, 16), (41.5, 24), (41, 36), fill=hair)
    else:
        pen.box(20.6, 18, 22.6, 28, hair)
        pen.box(41.4, 18, 43.4, 28, hair)
    if hat:
        return
    top = 11.5 if woman else 14
    pen.draw.chord(pen.corners(20, top, 44, 33), 190, 350, hair)
    if curly:
        for i in range(7):
            angle = math.pi * (1.05 + 0.9 * i / 6)
            pen.oval(32 + 11 * math.cos(angle), 22 + 9 * math.sin(angle), 3.4, 3.4, hair)
