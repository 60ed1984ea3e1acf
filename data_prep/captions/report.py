"""What the decomposer makes of real captions: `python -m data_prep.captions.report --derm1m-dir DIR`.

The folder holds `Derm1M_v2_*.csv`. Prints figures and random examples; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.captions.decompose import Decomposer, Decomposition, make_decomposer
from data_prep.config import PrepareConfig, RulesDecomposer
from data_prep.config_file import load_config
from data_prep.errors import InputError
from data_prep.schema import SUBCAPTION_ASPECTS, Aspect

if TYPE_CHECKING:
    from data_prep.captions.asking import AskSummary

_WORD = re.compile(r"[^\W_]+")


def read_captions(derm1m_dir: Path) -> list[str]:
    """Column `caption` of every `Derm1M_v2_*.csv` in the folder, empty ones left out.

    Raises InputError for a folder without such tables or a table without the column.
    """
    paths = sorted(derm1m_dir.glob("Derm1M_v2_*.csv"))
    if not paths:
        raise InputError(f"{derm1m_dir}: no Derm1M_v2_*.csv here; give the folder of the downloaded tables")
    captions: list[str] = []
    for path in paths:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            if "caption" not in (table.fieldnames or ()):
                raise InputError(f"{path}: no column 'caption'; its columns are {', '.join(table.fieldnames or ())}")
            captions += [row["caption"] for row in table if (row["caption"] or "").strip()]
    if not captions:
        raise InputError(f"{derm1m_dir}: its tables hold no caption")
    return captions


def covered_words(caption: str, decomposition: Decomposition) -> tuple[int, int]:
    """How many of the caption's words its sub-captions hold (each counted as often as in the caption), and all."""
    words = Counter(_WORD.findall(caption.lower()))
    held = Counter(word for sub in decomposition.subcaptions for word in _WORD.findall(sub.text.lower()))
    return (words & held).total(), words.total()


def measure(captions: Sequence[str], decompositions: Sequence[Decomposition], elapsed_s: float) -> dict[str, object]:
    """Figures over all captions. `elapsed_s` is the time that all decompositions took, in seconds."""
    aspects = Counter(sub.aspect for decomposition in decompositions for sub in decomposition.subcaptions)
    num_subcaptions = aspects.total()
    num_words = [covered_words(*pair) for pair in zip(captions, decompositions, strict=True)]
    reasons = Counter(dropped.kind for decomposition in decompositions for dropped in decomposition.dropped)
    return {
        "num_captions": len(captions),
        "share_two_or_more": round(sum(len(d.subcaptions) >= 2 for d in decompositions) / len(captions), 4),
        "mean_num_subcaptions": round(num_subcaptions / len(captions), 3),
        "num_by_aspect": {str(aspect): aspects[aspect] for aspect in SUBCAPTION_ASPECTS},
        "share_words_covered": round(
            sum(held for held, _ in num_words) / max(1, sum(total for _, total in num_words)), 4
        ),
        "share_other": round(aspects[Aspect.OTHER] / max(1, num_subcaptions), 4),
        "num_dropped_by_reason": dict(reasons),
        "num_unusable_answers": sum(d.failure is not None for d in decompositions),
        "ms_per_caption": round(1000 * elapsed_s / len(captions), 3),
    }


def _prepared(
    config_path: Path | None, ledger_path: Path, captions: Sequence[str]
) -> tuple[Decomposer, AskSummary | None]:
    """The decomposer, and what came of asking where it is a model's."""
    config = RulesDecomposer() if config_path is None else load_config(config_path, [], PrepareConfig).decomposer
    if config.kind != "llm":
        return make_decomposer(config, ledger_path), None
    from data_prep.captions.llm import LLMSplitter

    splitter = LLMSplitter(config, ledger_path)
    return splitter, splitter.prepare(captions)


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--derm1m-dir", type=Path, required=True, help="folder with Derm1M_v2_*.csv")
    parser.add_argument("--num-examples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, help="a data preparation YAML whose decomposer is used; default: rules")
    parser.add_argument("--ledger", type=Path, help="SQLite file that keeps a model's answers; default: they are lost")


def print_report(arguments: argparse.Namespace) -> int:
    """Figures, examples and, last, one JSON object. Raises InputError for unusable input; returns 0."""
    captions = read_captions(arguments.derm1m_dir)
    with tempfile.TemporaryDirectory() as folder:
        decomposer, summary = _prepared(arguments.config, arguments.ledger or Path(folder) / "l.sqlite", captions)
        start_s = time.perf_counter()
        decompositions = [decomposer.decompose(caption) for caption in captions]
        elapsed_s = time.perf_counter() - start_s
    figures = measure(captions, decompositions, elapsed_s)
    chosen = random.Random(arguments.seed).sample(range(len(captions)), min(arguments.num_examples, len(captions)))
    for index in chosen:
        print(f"\n{captions[index]}")
        for sub in decompositions[index].subcaptions:
            print(f"  {sub.aspect:14} {sub.text}")
        for dropped in decompositions[index].dropped:
            print(f"  (dropped: {dropped.reason}) {dropped.text}")
    print(f"\ndecomposer {decomposer.name}")
    if summary is not None:
        print(f"asked: {summary}")
    for name, value in figures.items():
        print(f"{name:24} {value}")
    print(json.dumps({"decomposer": decomposer.name, **figures}))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status: 0, or 2 for unusable input."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.captions.report", description=__doc__)
    add_report_arguments(parser)
    try:
        return print_report(parser.parse_args(argv))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
