"""The synthetic data set: reproducible, varied, texts that agree with the pictures, classes that can be learnt."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from sklearn.ensemble import RandomForestClassifier

from data_prep.config import PrepareConfig, SyntheticSource
from data_prep.config_file import load_config
from data_prep.sources import open_source
from data_prep.sources.base import SourceRow
from data_prep.sources.synthetic import KINDS, attributes, draw, write_caption

ROOT = Path(__file__).parents[3]


def digest(seed: int) -> str:
    return hashlib.sha256(draw(seed, 48).tobytes() + write_caption(seed).encode()).hexdigest()


def rows_of(config: SyntheticSource) -> list[SourceRow]:
    return [row for row in open_source(config).rows() if isinstance(row, SourceRow)]


def test_same_in_another_process() -> None:
    code = (
        "import hashlib; from data_prep.sources.synthetic import draw, write_caption\n"
        "for s in (7, 0, 3):\n"
        "    print(hashlib.sha256(draw(s, 48).tobytes() + write_caption(s).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "99", "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.split() == [digest(7), digest(0), digest(3)]


@pytest.mark.parametrize("px", [32, 96, 130])
def test_size_and_mode(px: int) -> None:
    image = draw(5, px)
    assert (image.size, image.mode) == ((px, px), "RGB")
    assert np.asarray(image).std() > 5


def test_seeds_draw_different_images() -> None:
    assert len({draw(seed, 32).tobytes() for seed in range(200)}) == 200


def test_rows_of_the_shipped_configuration() -> None:
    config = load_config(ROOT / "configs" / "data" / "synthetic.yaml", [], PrepareConfig)
    assert isinstance(config.source, SyntheticSource)
    assert config.ontology_path is None
    rows = rows_of(config.source)
    assert Counter(row.split for row in rows) == {"train": 2400, "val": 480}
    assert [row.row for row in rows] == list(range(1, 2881))
    assert len({row.group for row in rows}) == len({row.image.synthetic_seed for row in rows}) == 2880
    assert len({row.image.name for row in rows}) == 2880
    assert {row.caption_origin for row in rows} == {"template"}
    assert open_source(config.source).files == ()
    per_class = Counter(row.diagnosis for row in rows)
    assert len(per_class) == len(KINDS) >= 12
    assert min(per_class.values()) > 140
    for row in rows:
        assert row.diagnosis == row.diagnosis_path[-1]
        assert (
            row.demographics.age_years
            and row.demographics.age_band
            and row.demographics.sex
            and row.demographics.fitzpatrick
        )
        assert row.concepts and row.body_site


def test_another_seed_draws_others() -> None:
    first, second = (rows_of(SyntheticSource(num_train=50, num_val=1, seed=seed)) for seed in (0, 1))
    assert not {row.image.synthetic_seed for row in first} & {row.image.synthetic_seed for row in second}


def test_captions_are_long_and_varied() -> None:
    captions = [write_caption(seed) for seed in range(1500)]
    num_words = [len(caption.split()) for caption in captions]
    assert min(num_words) >= 45 and max(num_words) <= 90
    num_sentences = [caption.count(". ") + 1 for caption in captions]
    assert min(num_sentences) >= 4 and max(num_sentences) <= 7
    assert len(set(captions)) == 1500
    assert not any("synthetic" in caption.lower() for caption in captions)
    named = sum(attributes(seed).kind.name in caption.lower() for seed, caption in enumerate(captions))
    assert 0.85 < named / 1500 < 0.95
    assert " a 8" not in " ".join(captions) and " a 11-" not in " ".join(captions)


def test_captions_speak_of_what_is_drawn() -> None:
    for seed in range(300):
        look, caption = attributes(seed), write_caption(seed)
        for age in [int(word.split("-")[0]) for word in caption.split() if word.endswith("-year-old")]:
            assert age == look.age_years
        assert look.site in caption
        roman = ("I", "II", "III", "IV", "V", "VI")[look.fitzpatrick - 1]
        if " type " in caption:
            assert caption.split(" type ")[1].startswith((f"{roman}.", f"{roman},"))


def test_attributes_are_visible() -> None:
    seeds = range(600)
    brightness = np.array([np.asarray(draw(seed, 48)).mean() for seed in seeds])
    tone = np.array([attributes(seed).fitzpatrick for seed in seeds])
    assert brightness[tone == 1].mean() > brightness[tone == 4].mean() + 25 > brightness[tone == 6].mean() + 50
    nevi = [s for s in range(2500) if attributes(s).kind.name == "melanocytic nevus" and attributes(s).site == "face"]
    fair = [seed for seed in nevi if attributes(seed).fitzpatrick <= 3]
    area = [_lesion_area(draw(seed, 96)) for seed in fair]
    assert len(fair) > 15
    assert np.corrcoef(area, [attributes(seed).scale for seed in fair])[0, 1] > 0.5


def _lesion_area(image: Image.Image) -> float:
    """Share of pixels at least half as dark, against a plane fitted to the picture's rim, as the darkest spot."""
    grey = np.asarray(image.convert("L").filter(ImageFilter.BoxBlur(2)), np.float64)
    y, x = np.indices(grey.shape)
    rim = (np.minimum(x, y) < 8) | (np.maximum(x, y) >= len(grey) - 8)
    plane = np.stack([x, y, np.ones_like(x)], axis=-1)
    weights, *_ = np.linalg.lstsq(plane[rim].astype(np.float64), grey[rim], rcond=None)
    darker = plane @ weights - grey
    return float((darker > darker.max() / 2).mean())


def test_classes_are_learnable_and_not_trivial() -> None:
    """16 x 16 pixels and a forest are far above chance (0.07) and far from perfect."""
    rows = rows_of(SyntheticSource(num_train=1000, num_val=300))
    features = np.stack([np.asarray(_small(row), np.float32).ravel() for row in rows])
    labels = np.array([row.diagnosis for row in rows])
    forest = RandomForestClassifier(100, random_state=0).fit(features[:1000], labels[:1000])
    assert 0.35 < forest.score(features[1000:], labels[1000:]) < 0.85


def _small(row: SourceRow) -> Image.Image:
    assert row.image.synthetic_seed is not None
    return draw(row.image.synthetic_seed, 96).resize((16, 16), Image.Resampling.BOX)


@pytest.mark.skipif("DERMVLP_DATA" not in os.environ, reason="DERMVLP_DATA is not set")
def test_concepts_belong_to_the_published_vocabulary() -> None:
    terms = json.loads((Path(os.environ["DERMVLP_DATA"]) / "text" / "ConceptTerms.json").read_text(encoding="utf-8"))
    assert {concept for kind in KINDS for concept in kind.concepts} <= set(terms)
