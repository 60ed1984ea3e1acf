"""A page of random samples of a prepared split: each picture with all that a training step can see of it."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import InputError
from data_prep.files import write_atomically
from data_prep.pages.preparation import HEAD, STYLE, environment
from data_prep.schema import INDEX_DTYPE, Aspect, Caption, Sample, ShardManifest
from data_prep.shards.manifest import read_manifest


def inspect(directory: Path, num: int, seed: int, out_path: Path) -> Path:
    """Writes one HTML page, without scripts or other files, of `num` samples of the split in `directory`.

    Equal seeds choose equal samples of the same split; all of them where it has fewer. Returns `out_path`. Raises
    InputError for a folder without a manifest, files that do not fit it, and a number below 1.
    """
    if num < 1:
        raise InputError(f"inspect: --num {num}: give 1 or more")
    manifest = read_manifest(directory)
    index = _read_index(directory, manifest)
    positions = np.sort(np.random.default_rng(seed).choice(len(index), min(num, len(index)), replace=False))
    cards = [_card(directory, manifest, index[position]) for position in positions]
    title = f"{manifest.dataset}, {manifest.split}: {len(cards)} of {manifest.num_samples} samples"
    page = environment().from_string(HEAD + _PAGE)
    content = page.render(title=title, style=STYLE + _STYLE, cards=cards, seed=seed, decomposer=manifest.decomposer)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out_path, content.encode())
    return out_path


def _read_index(directory: Path, manifest: ShardManifest) -> NDArray[np.void]:
    path = directory / "index.npy"
    try:
        index: NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run `dermvlp prepare` again") from None
    if index.dtype != INDEX_DTYPE or len(index) != manifest.num_samples:
        raise InputError(f"{path}: does not fit its manifest.json; run `dermvlp prepare` again")
    return index


def _card(directory: Path, manifest: ShardManifest, row: np.void) -> dict[str, object]:
    path = directory / manifest.shards[int(row["shard"])].name
    try:
        with path.open("rb") as file:
            file.seek(int(row["image_offset"]))
            jpeg = file.read(int(row["image_num_bytes"]))
            file.seek(int(row["json_offset"]))
            sample = Sample.model_validate_json(file.read(int(row["json_num_bytes"])))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run `dermvlp verify` on its folder") from None
    by_aspect: dict[Aspect, list[Caption]] = {}
    for caption in sample.captions:
        by_aspect.setdefault(caption.aspect, []).append(caption)
    return {
        "sample": sample,
        "image": f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}",
        "captions": {str(aspect).replace("_", " "): captions for aspect, captions in by_aspect.items()},
        "facts": {name: value for name, value in _facts(sample).items() if value},
    }


def _facts(sample: Sample) -> dict[str, str | None]:
    person = sample.demographics
    age = person.age_band
    if person.age_years is not None:
        age = "90 and more" if person.age_years == 90 else f"{person.age_years:g}"
    return {
        "diagnosis": sample.diagnosis,
        "path": " \u203a ".join(sample.diagnosis_path),
        "concepts": ", ".join(sample.concepts),
        "body site": sample.body_site,
        "age": age,
        "sex": person.sex,
        "Fitzpatrick type": None if person.fitzpatrick is None else str(person.fitzpatrick),
        "modality": sample.modality,
        "source": sample.source,
        "licence": sample.licence or "not given",
    }


_STYLE = """
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1.2rem;
  margin-top: 1rem; align-items: start; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
.card > img { width: 100%; max-height: 22rem; object-fit: contain; background: var(--line); display: block; }
.card > div { padding: .2rem .9rem 1rem; }
.card p { margin: .1rem 0 .5rem; font-size: .88rem; overflow-wrap: anywhere; }
.card h4 { font-size: .8rem; color: var(--accent); font-weight: 600; margin: .7rem 0 .1rem; }
.card small { color: var(--soft); font-size: .74rem; display: block; }
.card dl { grid-template-columns: 6.5rem 1fr; gap: .15rem .7rem; font-size: .84rem; }
.card dl div { display: contents; }
@media print { .card { break-inside: avoid; } }
"""

_PAGE = """<body>
<h1>{{ title }}</h1>
<p class="note">Drawn at random with seed {{ seed }}; under each text, what wrote it.
Sub-captions: {{ decomposer }}.</p>
<div class="gallery">
{% for card in cards %}
<article class="card">
<img src="{{ card.image }}" alt="{{ card.sample.diagnosis or "image of a sample" }}">
<div>
<h3>{{ card.sample.key }}</h3>
{% for aspect, captions in card.captions.items() %}
<h4>{{ aspect }}</h4>
{% for caption in captions %}<p>{{ caption.text }}<small>{{ caption.origin or "origin unknown" }}</small></p>
{% endfor %}
{% endfor %}
<dl>{% for name, value in card.facts.items() %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
</div>
</article>
{% endfor %}
</div>
</body>
</html>
"""
