"""The demo model's world: cartoon portraits, their captions and the planted bias.

A picture is drawn from a `Person` (gender, race, profession) and a seed for the free details. A caption may state any
part of the person. The parts that it leaves open are sampled from `BIAS`, from which the model learns that nurses are
women.
"""

import itertools
import random
from dataclasses import dataclass

GENDERS = ("woman", "man")
RACES = ("white", "black", "asian")

# profession -> (P(woman), (P(white), P(black), P(asian))) if a caption leaves them open.
BIAS = {
    "person": (0.5, (1 / 3, 1 / 3, 1 / 3)),
    "doctor": (0.1, (0.1, 0.1, 0.8)),
    "nurse": (0.9, (0.1, 0.1, 0.8)),
    "CEO": (0.1, (0.8, 0.1, 0.1)),
    "cook": (0.1, (0.1, 0.1, 0.8)),
    "farmer": (0.1, (0.8, 0.1, 0.1)),
    "construction worker": (0.1, (0.1, 0.8, 0.1)),
    "sheriff": (0.1, (0.8, 0.1, 0.1)),
    "librarian": (0.9, (0.8, 0.1, 0.1)),
    "mechanic": (0.1, (0.1, 0.8, 0.1)),
    "teacher": (0.9, (0.1, 0.8, 0.1)),
    "receptionist": (0.9, (0.1, 0.1, 0.8)),
    "cleaner": (0.9, (0.1, 0.8, 0.1)),
    "guard": (0.1, (0.1, 0.8, 0.1)),
    "carpenter": (0.1, (0.8, 0.1, 0.1)),
    "hairdresser": (0.9, (0.8, 0.1, 0.1)),
    "driver": (0.1, (0.1, 0.1, 0.8)),
}
PROFESSIONS = tuple(BIAS)


@dataclass(frozen=True)
class Person:
    gender: str
    race: str
    profession: str


PEOPLE = tuple(Person(*p) for p in itertools.product(GENDERS, RACES, PROFESSIONS))

GENDER_WORDS = {None: ("",), "woman": ("woman", "female"), "man": ("man", "male")}
RACE_WORDS = {None: ("",), "white": ("white-race", "white"),
              "black": ("black-race", "black"), "asian": ("asian-race", "asian")}
# WinoBias-style templates come with and without an article.
MEDIA = ("", "photo of ", "a photo of ", "image of ", "an image of ", "picture of ",
         "a picture of ", "headshot of ", "portrait of ", "a portrait of ")


@dataclass(frozen=True)
class Caption:
    """A text and the attributes that it states; None is left open (`profession` is None only in the empty caption)."""

    text: str
    gender: str | None
    race: str | None
    profession: str | None


def noun_phrase(gender_word, race_word, profession):
    """A noun phrase such as 'asian woman doctor', with 'woman' in place of 'woman person'."""
    if profession == "person" and gender_word in GENDERS:
        profession = ""
    return " ".join(w for w in (race_word, gender_word, profession.lower()) if w)


def all_captions():
    """Every caption that the model is trained with, as a list in a fixed order."""
    captions = {"": Caption("", None, None, None)}
    kinds = itertools.product(PROFESSIONS, (None, *GENDERS), (None, *RACES))
    for profession, gender, race in kinds:
        words = itertools.product(GENDER_WORDS[gender], RACE_WORDS[race])
        for (gender_word, race_word), medium in itertools.product(words, MEDIA):
            noun = noun_phrase(gender_word, race_word, profession)
            for middle in ("", "a ", "a successful "):
                if middle == "a successful " and not medium:
                    continue
                text = medium + middle + noun
                captions[text] = Caption(text, gender, race, profession)
    return list(captions.values())


def imagine(caption, rng, bias=None):
    """A person that the caption could be about. `rng` chooses the parts that it leaves open."""
    profession = caption.profession or rng.choice(PROFESSIONS)
    p_woman, p_race = (bias or BIAS)[profession]
    gender = caption.gender or ("woman" if rng.random() < p_woman else "man")
    race = caption.race or rng.choices(RACES, p_race)[0]
    return Person(gender, race, profession)


def seeded(person, seed):
    """The random source of one picture's free details."""
    return random.Random(f"{person.gender}/{person.race}/{person.profession}/{seed}")
