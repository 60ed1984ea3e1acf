"""SYNTHETIC data set: procedurally drawn lesions, and captions written from the attributes they were drawn with.

Not medical data. Names, texts and looks imitate dermatology so that the whole pipeline, from shards to evaluation,
can be run and tested without a patient's picture; nothing learnt from it holds for skin. Everything follows from one
integer: `attributes(seed)` -> `draw(seed, px)` and `write_caption(seed)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from data_prep.config import SyntheticSource
from data_prep.sources.base import ImageReference, SourceRow
from data_prep.sources.labels import article
from data_prep.sources.synthetic_kinds import KINDS, RGB, Kind
from data_prep.sources.values import parse_person

Array = NDArray[np.float32]

# ---------------------------------------------------------------------------------------------- vocabulary

_TONES: tuple[tuple[str, RGB], ...] = (  # by Fitzpatrick type, 1 first
    ("very fair", (243, 212, 196)),
    ("fair", (233, 195, 172)),
    ("light olive", (214, 170, 140)),
    ("olive", (187, 140, 107)),
    ("brown", (147, 101, 72)),
    ("dark brown", (103, 68, 49)),
)
_ROMAN = ("I", "II", "III", "IV", "V", "VI")
#: hairs drawn, at least and at most; what the caption calls the skin there
_SITES: dict[str, tuple[int, int, str]] = {
    "scalp": (22, 40, "covered by hair"),
    "face": (0, 2, "finely porous"),
    "trunk": (0, 4, "smooth"),
    "forearm": (6, 14, "lightly haired"),
    "lower leg": (4, 10, "dry and finely cracked"),
    "palm": (0, 0, "marked by ridges"),
    "groin": (0, 5, "creased by a fold"),
}


@dataclass(frozen=True)
class Attributes:
    kind: Kind
    site: str
    fitzpatrick: int  # 1 to 6
    age_years: int
    sex: str
    colour: str  # a key of kind.colours
    scale: float  # relative size: below 0.9 is called small, above 1.12 large
    num_elements: int  # of scatter, cluster and band; else 1


def attributes(seed: int) -> Attributes:
    """Everything that image and caption share, from the seed alone."""
    rng = np.random.default_rng([seed, 0])
    kind = KINDS[rng.integers(len(KINDS))]
    many = {"scatter": (4, 10), "cluster": (6, 13), "band": (9, 18)}.get(kind.layout, (1, 2))
    return Attributes(
        kind=kind,
        site=str(rng.choice(kind.sites)),
        fitzpatrick=int(rng.choice(6, p=(0.16, 0.26, 0.24, 0.16, 0.11, 0.07))) + 1,
        age_years=int(rng.integers(*kind.ages)),
        sex=str(rng.choice(["male", "female"])),
        colour=str(rng.choice(list(kind.colours))),
        scale=float(rng.uniform(0.72, 1.3)),
        num_elements=int(rng.integers(*many)),
    )


# ---------------------------------------------------------------------------------------------- image


def draw(seed: int, px: int) -> Image.Image:
    """A synthetic lesion on synthetic skin, (px, px) RGB; the same in every process."""
    look = attributes(seed)
    rng = np.random.default_rng([seed, 1])
    tone = np.array(_TONES[look.fitzpatrick - 1][1], np.float32) + _tint(rng, 8, 3)
    image = tone * (1 + 0.045 * _noise(rng, 5, px) + 0.02 * _noise(rng, px // 3, px))[..., None]
    image = _site_texture(rng, image, look.site)
    image = _paint(rng, image, look, tone)
    x, y = _grid(px)
    angle = rng.uniform(0, 2 * np.pi)
    image *= (1 + rng.uniform(0, 0.2) * (x * np.cos(angle) + y * np.sin(angle)))[..., None] * rng.uniform(0.88, 1.08)
    image += rng.normal(0, rng.uniform(1, 6), (px, px, 1)).astype(np.float32)
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    _draw_hairs(rng, picture, look.site)
    return picture


@lru_cache(maxsize=8)
def _grid(px: int) -> tuple[Array, Array]:
    """x and y of the pixels, from -1 to 1, each (px, px)."""
    axis = np.linspace(-1, 1, px, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def _noise(rng: np.random.Generator, num_cells: int, px: int) -> Array:
    """Smooth noise (px, px), about unit variance at the cells."""
    cells = Image.fromarray(rng.standard_normal((num_cells, num_cells)).astype(np.float32))
    return np.asarray(cells.resize((px, px), Image.Resampling.BICUBIC), np.float32)


def _tint(rng: np.random.Generator, lightness: float, hue: float) -> Array:
    return (rng.normal(0, lightness) + rng.normal(0, hue, 3)).astype(np.float32)


def _site_texture(rng: np.random.Generator, image: Array, site: str) -> Array:
    px = len(image)
    x, y = _grid(px)
    angle = rng.uniform(0, np.pi)
    across = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)) + 0.15 * _noise(rng, 3, px)
    if site == "palm":
        image = image * (1 + 0.07 * np.sin(across * 42))[..., None] + np.array((8, 2, -6), np.float32)
    elif site == "face":
        image = image * (1 - 0.06 * (_noise(rng, px // 2, px) > 1.1))[..., None] + np.array((6, -3, -3), np.float32)
    elif site == "lower leg":
        image = image * (1 + 0.09 * (np.abs(_noise(rng, 11, px)) < 0.1))[..., None]
    elif site == "groin":
        image = image * (1 - 0.35 * np.exp(-(((across - rng.uniform(-0.5, 0.5)) / 0.06) ** 2)))[..., None]
    elif site == "scalp":
        image = image * np.float32(0.93)
    return image.astype(np.float32)


def _height(rng: np.random.Generator, look: Attributes, px: int) -> tuple[Array, Array]:
    """Two (px, px) fields: 1 in the middle of a lesion (or element), 0 at its border, negative outside; and the same
    for the area it encloses (which differs for rings)."""
    kind = look.kind
    x, y = _grid(px)
    cx, cy = rng.uniform(-0.22, 0.22, 2).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = (x - cx) * cos + (y - cy) * sin, (y - cy) * cos - (x - cx) * sin
    radius = kind.radius * look.scale
    if look.kind.layout in ("single", "ring"):
        stretch = np.float32(np.sqrt(rng.uniform(1, kind.stretch)))
        u, v = u / stretch, v * stretch
        theta = np.arctan2(v, u)
        outline = np.full_like(theta, radius)
        wobble = kind.wobble * rng.uniform(0.4, 1.3)
        for k in range(2, 7):
            outline += radius * wobble * rng.uniform(0, 1.6 / k) * np.cos(k * theta + rng.uniform(0, 2 * np.pi))
        inside = 1 - np.hypot(u, v) / outline
        return (1 - np.abs(inside - 0.2) / 0.2 if kind.layout == "ring" else inside), inside
    n = look.num_elements
    if kind.layout == "band":
        along, beside = np.linspace(-0.75, 0.75, n) + rng.normal(0, 0.05, n), rng.normal(0, 0.09, n)
    else:
        spread = 0.28 if kind.layout == "cluster" else 0.45
        along, beside = rng.normal(0, spread, n), rng.normal(0, spread, n)
    radii = (radius * rng.uniform(0.6, 1.25, n)).astype(np.float32)[:, None, None]
    du = u - along.astype(np.float32)[:, None, None]
    dv = v - beside.astype(np.float32)[:, None, None]
    distance = np.hypot(du, dv)
    if kind.surface == "lace":  # lichen planus: polygonal papules, here hexagons
        distance = np.maximum(np.abs(du), np.abs(du) / 2 + np.abs(dv) * np.float32(0.866))
    height = 1 - (distance / radii).min(axis=0)
    return height, height


def _paint(rng: np.random.Generator, image: Array, look: Attributes, tone: Array) -> Array:
    kind, px = look.kind, len(image)
    height, inside = _height(rng, look, px)
    first, second = (np.array(c, np.float32) + _tint(rng, 10, 6) for c in kind.colours[look.colour])
    # a lesion takes part of its colour from the skin it lies in; depigmented skin does not
    shade = 1.0 if kind.name == "vitiligo" else 0.45 + 0.55 * float(tone.mean()) / 200
    colour = (first + (second - first) * np.clip(0.5 + 0.5 * _noise(rng, 6, px), 0, 1)[..., None]) * shade
    alpha = np.clip(height / kind.softness, 0, 1)
    alpha = alpha * alpha * (3 - 2 * alpha) * rng.uniform(0.55, 0.95)
    if kind.layout == "ring":  # the centre is not quite healed
        alpha = np.maximum(alpha, 0.18 * (inside > 0.2))
    if kind.surface in ("vesicle", "honey", "crust"):  # inflamed surroundings
        image = _blend(image, (205, 85, 80), 0.45 * np.clip(1 + height / 0.9, 0, 1) * (height > -0.9))
    image = _blend(image, colour, alpha)
    # kinds overlap: some plaques have hardly any scale, some melanomas are nearly of one colour
    strength = np.float32(rng.uniform(0.1, 1))
    image = image + strength * (_add_surface(rng, image, kind.surface, height, alpha) - image)
    dy, dx = np.gradient(alpha)
    return np.asarray(image * (1 + kind.relief * np.clip(0.5 * px / 96 * (dx + dy), -0.3, 0.3))[..., None], np.float32)


def _blend(image: Array, colour: Any, alpha: Array) -> Array:
    """`colour`: RGB or (px, px, 3); `alpha` (px, px) from 0 to 1."""
    return np.asarray(image + (np.asarray(colour, np.float32) - image) * alpha[..., None], np.float32)


def _add_surface(rng: np.random.Generator, image: Array, surface: str, height: Array, alpha: Array) -> Array:
    px = len(image)
    if surface == "scale":
        image = _blend(image, (240, 236, 230), 0.75 * alpha * (_noise(rng, px // 4, px) > 0.35))
    elif surface == "crust":
        image = _blend(image, (200, 160, 90), 0.7 * alpha * (_noise(rng, px // 6, px) > 0.9))
    elif surface == "honey":
        image = _blend(image, (214, 160, 52), 0.85 * alpha * (_noise(rng, 12, px) > 0.1))
    elif surface == "mottle":
        patches = _noise(rng, 6, px)
        image = _blend(image, (28, 20, 24), 0.8 * alpha * (patches > 0.5))
        image = _blend(image, (95, 100, 125), 0.7 * alpha * (patches < -0.8))
        image = _blend(image, (150, 65, 55), 0.5 * alpha * (np.abs(patches) < 0.12))
    elif surface == "dots":
        dots = _noise(rng, px // 4, px)
        image = _blend(image, (225, 200, 160), 0.8 * alpha * (dots > 1.0))
        image = _blend(image, (45, 30, 25), 0.75 * alpha * (dots < -1.0))
    elif surface == "pearl":
        image = _blend(image, (250, 228, 220), 0.75 * ((height > 0.02) & (height < 0.25)))
        image = _blend(image, (170, 40, 45), 0.7 * alpha * (np.abs(_noise(rng, 8, px)) < 0.07))
        image = _blend(image, (95, 45, 35), 0.75 * (height > 0.72 + 0.1 * rng.uniform()))
    elif surface == "lace":
        image = _blend(image, (232, 218, 228), 0.6 * alpha * (np.abs(_noise(rng, px // 5, px)) < 0.14))
    elif surface == "vesicle":
        image = _blend(image, (240, 222, 160), 0.85 * np.clip((height - 0.25) * 4, 0, 1))
    elif surface == "dimple":
        image = _blend(image, (150, 85, 75), 0.8 * np.clip((height - 0.66) * 6, 0, 1))
    elif surface == "wheal":
        image = _blend(image, (240, 205, 192), 0.6 * np.clip((height - 0.45) * 3, 0, 1))
    return image


def _draw_hairs(rng: np.random.Generator, picture: Image.Image, site: str) -> None:
    low, high, _ = _SITES[site]
    pen, px = ImageDraw.Draw(picture), picture.width
    comb = rng.uniform(0, 2 * np.pi)
    dark = int(rng.integers(20, 90))
    for _ in range(int(rng.integers(low, high + 1))):
        start, angle = rng.uniform(0, px, 2), comb + rng.normal(0, 0.3)
        bend, length = rng.normal(0, 0.3), rng.uniform(0.15, 0.45) * px
        points = [
            (start[0] + length * t * np.cos(angle + bend * t), start[1] + length * t * np.sin(angle + bend * t))
            for t in (0.0, 0.35, 0.7, 1.0)
        ]
        pen.line(points, fill=(dark, int(dark * 0.75), int(dark * 0.6)), width=max(1, px // 96))


# ---------------------------------------------------------------------------------------------- caption

_MIN_WORDS, _MAX_WORDS = 45, 90
_DURATIONS = ("two weeks", "three months", "half a year", "about a year", "several years", "ten days")


def write_caption(seed: int) -> str:
    """Four to seven sentences, 45 to 90 words, in varied order; about nine in ten name the diagnosis."""
    look = attributes(seed)
    rng = np.random.default_rng([seed, 2])
    opening, morphology, *others = _sentences(rng, look)
    order = [others[i] for i in rng.permutation(len(others))]
    order.insert(0 if rng.random() < 0.85 else len(order), morphology)  # a few say nothing of what is seen
    num_wanted = int(rng.integers(4, 8))
    chosen = [opening]
    for sentence in order:
        num_words = sum(len(s.split()) for s in chosen)
        if len(chosen) >= num_wanted and num_words >= _MIN_WORDS:
            break
        if len(chosen) < 7 and num_words + len(sentence.split()) <= _MAX_WORDS:
            chosen.append(sentence)
    if rng.random() < 0.25:  # sometimes the diagnosis comes last, as in a case report
        chosen = [*chosen[1:], opening]
    return " ".join(chosen)


def _sentences(rng: np.random.Generator, look: Attributes) -> list[str]:
    """The opening, the morphology, then one sentence for each other aspect, each in one of several wordings."""
    kind = look.kind

    def pick(*options: str) -> str:
        return options[rng.integers(len(options))]

    name = kind.name if rng.random() < 0.9 else "a skin lesion"
    child = look.age_years < 16
    person = ("boy" if child else "man") if look.sex == "male" else ("girl" if child else "woman")
    who = f"{look.age_years}-year-old {person}"
    a_who = f"{article(who)} {who}"
    size = "small" if look.scale < 0.9 else "large" if look.scale > 1.12 else "medium-sized"
    noun, shape, border, surface = kind.primary, pick(*kind.shapes), pick(*kind.borders), pick(*kind.surfaces)
    if kind.layout in ("single", "ring"):
        morphology = pick(
            f"There is one {size}, {shape} {noun}, {look.colour}, {surface}; the border is {border}.",
            f"Examination shows a {size} {look.colour} {noun} that is {shape}, {surface}, with a {border} edge.",
            f"The {noun} is {shape} and {look.colour}, {size} for its kind, {surface}, its margin {border}.",
        )
    else:
        count = "a few" if look.num_elements < 6 else "several" if look.num_elements < 10 else "many"
        morphology = pick(
            f"There are {count} {size}, {look.colour} {noun}s in a {shape} arrangement, {surface}, {border}.",
            f"Examination shows {count} {look.colour} {noun}s, {size}, {shape}, {border} and {surface}.",
            f"The {noun}s are {shape}, {count} in number, {size} and {look.colour}, {surface}, with a {border} edge.",
        )
    tone, texture = _TONES[look.fitzpatrick - 1][0], _SITES[look.site][2]
    duration, cause = pick(*_DURATIONS), pick(*kind.causes)
    symptom, treatment = pick(*kind.symptoms), pick(*kind.treatments)
    rival = KINDS[rng.integers(len(KINDS))].name
    sentences = [
        pick(
            f"{name.capitalize()} on the {look.site} of {a_who}.",
            f"This picture shows {name} of the {look.site}.",
            f"The findings are those of {name} on the {look.site}.",
            f"Clinical photograph of {name}, {look.site}, in a {person}.",
        ),
        morphology,
        pick(
            f"The surrounding skin is {tone} and {texture}.",
            f"Around it the {look.site} is {texture}, the skin {tone}.",
        ),
        pick(
            f"The patient reports that it {symptom}.",
            f"It {symptom}, according to the history.",
            f"The area {symptom}.",
        ),
        pick(f"It began {duration} ago {cause}.", f"First noticed {cause}, it has been present for {duration}."),
        pick(
            f"The patient is {a_who} with skin type {_ROMAN[look.fitzpatrick - 1]}.",
            f"{a_who.capitalize()}, Fitzpatrick type {_ROMAN[look.fitzpatrick - 1]}, came to the clinic.",
        ),
        pick(
            f"Treatment with {treatment} was advised.", f"The plan is {treatment}.", f"It was managed by {treatment}."
        ),
        pick(*kind.tests),
    ]
    if rival != kind.name and name == kind.name:
        sentences.append(
            pick(f"{rival.capitalize()} was considered and ruled out.", f"It was first mistaken for {rival}.")
        )
    return sentences


# ---------------------------------------------------------------------------------------------- the source


class SyntheticRows:
    """The `Source` of a `SyntheticSource`: `num_train` rows, then `num_val`, each its own group."""

    def __init__(self, config: SyntheticSource) -> None:
        self.config = config

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    def rows(self) -> Iterator[SourceRow]:
        config = self.config
        for row in range(1, config.num_train + config.num_val + 1):
            seed = int(np.random.SeedSequence([config.seed, row]).generate_state(1, np.uint32)[0])
            look = attributes(seed)
            person, _ = parse_person(str(look.age_years), look.sex, str(look.fitzpatrick))
            yield SourceRow(
                row=row,
                table="synthetic",
                image=ImageReference(f"synthetic-{seed}", synthetic_seed=seed, synthetic_px=config.image_px),
                caption=write_caption(seed),
                caption_origin="template",
                diagnosis=look.kind.name,
                diagnosis_path=look.kind.path,
                concepts=look.kind.concepts,
                body_site=look.site,
                demographics=person,
                modality="synthetic",
                group=f"synthetic-{row}",
                split="train" if row <= config.num_train else "val",
                source="synthetic",
                licence="Apache-2.0",
            )
