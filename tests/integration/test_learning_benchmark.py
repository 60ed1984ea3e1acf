"""The learning experiment: its captions, folds, arms and statistics, and a tiny run of it that is killed and goes on.

What it measures is not judged here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.learning import plan
from benchmarks.learning_analysis import Rows, common_cells, compare, difference, estimate
from benchmarks.learning_data import assign_folds, template_caption
from benchmarks.learning_run import ARMS, EXPLORATORY, Run, train_config
from data_prep.captions.decompose import make_decomposer
from data_prep.config import RulesDecomposer
from data_prep.schema import Aspect
from pretrain.evaluation.methods.retrieval import retrieval_metrics, retrieval_ranks

REPOSITORY = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------------------------------------- captions and folds


def _row(**columns: str) -> dict[str, str]:
    absent = dict.fromkeys(("site", "age", "sex", "fitzpatrick"), "")
    return {"modality": "dermoscopy", "dx_confirm": "histo", "label": "nevus", "filename": "a.jpg"} | absent | columns


def test_every_wording_of_a_template_is_cut_into_the_aspects_of_its_columns() -> None:
    decomposer = make_decomposer(RulesDecomposer(), Path("unused"), lambda text: True)
    labels = ("nevus", "vascular lesion", "squamous cell carcinoma", "seborrheic keratosis")
    sites = ("", "unknown", "back", "upper extremity", "genital", "nose")
    people = (
        ("", "", ""),
        ("45.0", "male", ""),
        ("8", "", "2.0"),
        ("", "female", "3"),
        ("", "", "1.0"),
        ("94", "", ""),
    )
    modalities = ("dermoscopy", "clinical (background masked black)")
    confirmations = ("histo", "follow_up", "consensus", "confocal", "clinical consensus", "biopsy")
    captions = set()
    for label, site, (age, sex, skin), modality, how in product(labels, sites, people, modalities, confirmations):
        for name in "abcdefgh":  # of which every wording is the hash of one
            columns = {"label": label, "site": site, "age": age, "sex": sex, "fitzpatrick": skin}
            row = _row(**columns, modality=modality, dx_confirm=how, filename=name)
            caption = template_caption(row)
            expected = [Aspect.IMPRESSION]
            expected += [Aspect.BODY_SITE] if site not in ("", "unknown") else []
            expected += [Aspect.DEMOGRAPHICS] if sex or skin or (age and float(age) < 90) else []
            expected += [Aspect.INVESTIGATION, Aspect.INVESTIGATION]
            found = [subcaption.aspect for subcaption in decomposer.decompose(caption).subcaptions]
            assert found == expected, caption
            captions.add(caption)
    assert len(captions) > 3 * len(labels) * len(sites)


def test_a_caption_says_what_the_columns_hold_and_nothing_else() -> None:
    row = _row(label="melanoma", site="genital", age="81.0", sex="male", fitzpatrick="2.0", dx_confirm="follow_up")
    wordings = {template_caption(row | {"filename": name}) for name in "abcdefgh"}
    assert len(wordings) == 3
    for caption in wordings:
        for word in ("melanoma", "genital area", "81", "Fitzpatrick", "dermoscopy", "follow-up"):
            assert word in caption
        assert "ale" in caption and "A 81" not in caption and "a 81" not in caption
    bare = template_caption(_row(modality="", dx_confirm="", label="nevus", sex="unknown", site="unknown"))
    assert bare.count(".") == 1 and "nevus" in bare


def test_no_group_is_in_two_folds_and_labels_are_spread() -> None:
    random = np.random.default_rng(0)
    labels = random.choice(["nevus", "melanoma", "dermatofibroma"], size=600, p=[0.7, 0.2, 0.1])
    rows = [{"label": str(label), "group_id": f"g{i // 2}"} for i, label in enumerate(labels)]
    folds = np.array(assign_folds(rows, 5))
    assert sorted(set(folds)) == [0, 1, 2, 3, 4]
    assert all(folds[i] == folds[i + 1] for i in range(0, 600, 2))
    for label in set(labels):
        counts = np.bincount(folds[labels == label], minlength=5)
        assert counts.min() >= 0.75 * counts.mean() and counts.max() <= 1.25 * counts.mean(), label


# ---------------------------------------------------------------------------------------------- arms


def test_arms_differ_in_their_objectives_alone() -> None:
    configs = {arm: train_config(Run(Path("out"), arm, 1, 2)) for arm in ARMS | EXPLORATORY}
    rest = {
        arm: config.model_dump(exclude={"objectives": True, "run_dir": True, "model": {"name"}})
        for arm, config in configs.items()
    }
    assert all(each == rest["clip"] for each in rest.values())
    assert len({config.model_dump_json(include={"objectives"}) for config in configs.values()}) == len(configs) == 11
    kinds = [[objective.kind for objective in configs[arm].objectives] for arm in ARMS]
    assert kinds[0] == ["clip"] and kinds[1] == kinds[2] == ["multi_aspect"]
    assert kinds[4] == kinds[5] == ["multi_aspect", "local_alignment", "masked_latent"]


def test_the_plan_is_paired_from_the_first_run_on() -> None:
    whole, quick = plan(Path("out"), "whole"), plan(Path("out"), "quick")
    assert len(whole) == len(set(whole)) == 3 * 5 * 6 + 5 * 5 and whole[:12] == quick
    assert [run.arm for run in whole[:6]] == list(ARMS)
    assert len({(run.fold, run.seed) for run in whole[:30]}) == 5  # five whole cells, not thirty begun ones


# ---------------------------------------------------------------------------------------------- statistics


def _result(arm: str, fold: int, seed: int, predicted: list[int], hits: list[float]) -> dict[str, Any]:
    return {
        **{"arm": arm, "fold": fold, "seed": seed, "label": [0, 0, 0, 1], "group": ["a", "a", "b", "c"]},
        **{"predicted": predicted, "predicted_own_wording": [0, 0, 0, 0]},
        **{"image_hit": hits, "text_hit": hits, "num_owners": [2, 2, 1, 1]},
    }


def test_differences_are_those_of_the_same_images() -> None:
    cells = [(0, 0), (1, 0), (0, 1)]
    first = {cell: _result("a", *cell, predicted=[0, 0, 1, 0], hits=[0.0, 0.0, 0.0, 1.0]) for cell in cells}
    second = {cell: _result("b", *cell, predicted=[0, 0, 1, 1], hits=[1.0, 1.0, 0.0, 0.0]) for cell in cells}
    second[0, 1] = _result("b", 0, 1, predicted=[0, 0, 1, 0], hits=[0.0, 0.0, 0.0, 1.0])  # seed 1 gains nothing
    a, b = Rows.of(first, cells), Rows.of(second, cells)
    assert estimate(a, "zero_shot").value == pytest.approx(1 / 3)
    found = difference(a, b, "zero_shot")
    # class 1 is right in two of three cells more, class 0 as before; both classes weigh half
    assert found.interval.value == pytest.approx(1 / 3) and found.by_seed == pytest.approx((0.5, 0.0))
    assert found.interval.low < found.interval.value < found.interval.high
    recall = difference(a, b, "mean_recall")
    # images: 2/4 against 1/4 in two cells; captions, the shared one counting once: 1/3 against 1/3
    assert recall.by_seed[0] == pytest.approx((0.25 + 0.0) / 2)
    assert not found.is_resolved  # seed 1 gains nothing
    same = difference(a, a, "zero_shot")
    assert (same.interval.value, same.interval.low, same.interval.high) == (0.0, 0.0, 0.0) and not same.is_resolved
    with pytest.raises(ValueError, match="same images"):
        difference(a, Rows.of(second, cells[:2]), "zero_shot")


def test_a_difference_is_resolved_by_many_patients_and_two_seeds() -> None:
    cells = [(fold, seed) for seed in range(2) for fold in range(12)]
    first = {cell: _result("a", *cell, predicted=[0, 0, 1, 0], hits=[0.0, 0.0, 0.0, 1.0]) for cell in cells}
    second = {cell: _result("b", *cell, predicted=[0, 0, 1, 1], hits=[1.0, 1.0, 0.0, 0.0]) for cell in cells}
    assert difference(Rows.of(first, cells), Rows.of(second, cells), "zero_shot").is_resolved
    one_seed = difference(Rows.of(first, cells[:12]), Rows.of(second, cells[:12]), "zero_shot")
    assert one_seed.interval.low > 0 and not one_seed.is_resolved


def test_only_cells_of_all_arms_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    perfect = {cell: _result("b", *cell, predicted=[0, 0, 0, 1], hits=[1.0] * 4) for cell in [(0, 0), (1, 0)]}
    wrong = {cell: _result("a", *cell, predicted=[1, 1, 1, 0], hits=[0.0] * 4) for cell in [(1, 0), (0, 1)]}
    results = {"a": wrong, "b": perfect}
    assert common_cells(results, ["a", "b"]) == [(1, 0)] and common_cells(results, ["a", "b", "none"]) == []
    numbers = compare(results, ["a", "b"], {"b": ["a"]})
    assert numbers["num_cells"] == 1 and numbers["arms"]["b"]["zero_shot"]["vs_a"] == [1.0, 1.0, 1.0]
    assert "vs a +1.0000 [+1.0000, +1.0000]  (+1.000)" in capsys.readouterr().out
    assert compare(results, ["a", "none"], {}) == {}


def test_mean_recall_is_that_of_the_evaluation() -> None:
    random = np.random.default_rng(1)
    owner = np.array([0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    image, text = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (random.normal(size=(n, 4)) for n in (15, 12)))
    image = image + text[owner]
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    image_rank, text_rank = retrieval_ranks(image, text, owner)
    run = {
        **{"label": [0] * 15, "group": [str(i) for i in range(15)], "predicted": [0] * 15},
        **{"predicted_own_wording": [0] * 15, "num_owners": np.bincount(owner)[owner].tolist()},
        "image_hit": np.mean([image_rank < k for k in (1, 5, 10)], axis=0).tolist(),
        "text_hit": np.mean([text_rank < k for k in (1, 5, 10)], axis=0)[owner].tolist(),
    }
    expected = retrieval_metrics(image, text, owner, num_resamples=2, ks=(1, 5, 10))["mean_recall"].value
    assert 0.1 < expected < 0.99
    assert estimate(Rows.of({(0, 0): run}, [(0, 0)]), "mean_recall").value == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------- a tiny run


@pytest.mark.long
@pytest.mark.skipif("DERMVLP_DATA" not in os.environ, reason="needs the real images: export DERMVLP_DATA")
def test_a_tiny_run_goes_on_after_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.learning", "--out", str(tmp_path / "out")]
    results = tmp_path / "out" / "results"
    with (tmp_path / "first.log").open("wb") as log:
        first = subprocess.Popen([*command, "--tiny"], cwd=REPOSITORY, stdout=log, stderr=log)
        while first.poll() is None and not list(results.glob("*.json")):
            time.sleep(0.05)
        children = psutil.Process(first.pid).children(recursive=True)
        first.send_signal(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL, (tmp_path / "first.log").read_text()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive  # a run whose parent is gone would disturb the next one's
    before = {path.name: path.stat().st_mtime_ns for path in results.glob("*.json")}
    assert 1 <= len(before) < 6

    done = subprocess.run([*command, "--tiny"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    after = {path.name: path.stat().st_mtime_ns for path in results.glob("*.json")}
    assert len(after) == 6 and {name: after[name] for name in before} == before
    assert not any((tmp_path / "out" / "runs").iterdir())  # no checkpoint is left
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert numbers["size"] == "tiny" and numbers["main"]["num_cells"] == 1
    assert set(numbers["main"]["arms"]) == set(ARMS)
    for values in numbers["main"]["arms"].values():
        for metric in ("zero_shot", "mean_recall", "zero_shot_own_wording"):
            value, low, high = values[metric]["value"]
            assert 0 <= low <= value <= high <= 1

    again = subprocess.run([*command, "--report"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert json.loads(again.stdout.splitlines()[-1])["main"] == numbers["main"]
    damaged = next(results.glob("clip-*.json"))
    damaged.write_text(json.dumps(json.loads(damaged.read_text()) | {"specification": "another"}))
    refused = subprocess.run([*command, "--tiny"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert refused.returncode != 0 and "other settings" in refused.stderr
