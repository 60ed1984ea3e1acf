"""Which questions a preparation has for models, and asking them: the stage `captions`, and the commands `dermvlp
estimate`, `ask` and `batch`.

    rows that the plan keeps -> reports of images without a caption -> sub-captions of whole captions -> answers.sqlite

Parts of a job array ask at once, each with a ledger of its own that begins with what the others know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from data_prep.captions.batch_state import pending_questions
from data_prep.captions.describe import Undescribed
from data_prep.captions.ledger import Ledger, merge_ledgers
from data_prep.captions.limits import cost_usd
from data_prep.captions.subcaptions import worth_asking
from data_prep.captions.tokens import TokenCounter
from data_prep.errors import InputError
from data_prep.files import lock, write_atomically
from data_prep.images import scan
from data_prep.job import Job
from data_prep.planning.rows import iter_survivors
from data_prep.planning.stage import Planned, load
from data_prep.samples import Tools
from data_prep.schema import text_hash
from data_prep.sources.base import Rejection

if TYPE_CHECKING:
    from data_prep.captions.asking import AskSummary
    from data_prep.captions.llm import LLMSplitter
    from data_prep.captions.tasks import Task

#: What is asked first comes first: findings are split from reports.
REPORTS, SUBCAPTIONS = "reports", "subcaptions"


@dataclass(frozen=True)
class AskOptions:
    """What a run may ask, beyond the configuration. `limit` and `max_usd` are for each task (reports, sub-captions)."""

    limit: int | None = None  # a pilot: so many new questions at most
    max_usd: float | None = None
    retry_failed: bool = False


# ---------------------------------------------------------------------------------------------- questions


@dataclass(frozen=True)
class Questions:
    task: Task[Any]
    items: Callable[[], Iterable[Any]]  # the same whenever it is called


def _undescribed(job: Job, planned: Planned) -> Iterator[Undescribed]:
    """The part's images of surviving rows that have no caption."""
    for position, row in iter_survivors(job.source, planned.rows, planned.fate, job.salt):
        if row.caption is not None:
            continue
        fact = planned.facts[planned.rows["image"][position]]
        if job.part.has(_number(fact)):
            jpeg = partial(scan.read_jpeg, job.scan_dir, fact)
            yield Undescribed(fact["sha256"].tobytes().hex(), jpeg, row.diagnosis)


def _captions(job: Job, planned: Planned, tools: Tools) -> Iterator[str]:
    """The part's whole captions of surviving rows that a decomposer is to split, the describer's reports among them."""
    for position, row in iter_survivors(job.source, planned.rows, planned.fate, job.salt):
        if row.subcaptions:
            continue
        text = row.caption
        if text is not None:
            mine = job.part.has(text_hash(text))
        else:
            fact = planned.facts[planned.rows["image"][position]]
            mine = job.part.has(_number(fact))  # as in `_undescribed`: this part has its report
            if mine and tools.describer is not None:
                report = tools.describer.report(fact["sha256"].tobytes().hex(), row.diagnosis)
                text = None if isinstance(report, str) else report.text
        if mine and text is not None and worth_asking(text):
            yield text


def _number(fact: np.void) -> int:
    """Equal images are one part's, whatever their names."""
    return int.from_bytes(fact["sha256"][:8].tobytes(), "little")


def questions(job: Job, tools: Tools) -> dict[str, Questions]:
    """Of each task that the configuration has a model for. Raises InputError where it has none."""
    found: dict[str, Questions] = {}
    if tools.describer is not None:
        found[REPORTS] = Questions(tools.describer.task, lambda: _undescribed(job, load(job)))
    if job.config.decomposer.kind == "llm":
        task = cast("LLMSplitter", tools.decomposer).task
        found[SUBCAPTIONS] = Questions(task, lambda: _captions(job, load(job), tools))
    if not found:
        raise InputError("the configuration names no model: set decomposer.kind to llm, or a describer")
    return found


# ---------------------------------------------------------------------------------------------- asking


def ask_all(job: Job, options: AskOptions) -> list[AskSummary]:
    """Reports, then sub-captions: what has no answer yet. Raises InputError where batches are under way."""
    from data_prep.captions.asking import ask

    TokenCounter(job.config.tokenizer).load()  # a wrong name shows before anything is paid
    _seed_ledger(job)
    summaries = []
    for name, asked in questions(job, job.asking_tools).items():
        folder = _batch_folder(job, name, asked.task)
        if num_pending := pending_questions(folder):
            raise InputError(
                f"{folder}: {num_pending} questions are under way in batches and would be paid twice; finish with "
                f"`dermvlp batch CONFIG --of {name}`, or remove the folder to give them up"
            )
        with Ledger(job.part_ledger_path) as ledger:
            max_usd = _money_left(job, asked.task, ledger, options.max_usd)
            summaries.append(
                ask(
                    asked.task,
                    asked.items(),
                    ledger,
                    retry_failed=options.retry_failed,
                    limit=options.limit,
                    max_usd=max_usd,
                )
            )
    return summaries


def _money_left(job: Job, task: Task[Any], ledger: Ledger, max_usd: float | None) -> float | None:
    """The least of what this run may spend and this part's share of what is left of the configured `max_usd`."""
    price = task.options.prices.get(task.options.model)
    if task.options.max_usd is None or price is None:
        return max_usd
    left = max(0.0, task.options.max_usd - cost_usd(price, *ledger.paid_tokens(task))) / job.part.count
    return max(1e-12, left if max_usd is None else min(left, max_usd))


def stage_captions(job: Job) -> None:
    """The stage `captions`. Raises InputError where it stopped before all was asked."""
    if job.config.describer is None and job.config.decomposer.kind != "llm":
        return
    for summary in ask_all(job, AskOptions()):
        if summary.stopped_by is not None:
            raise InputError(
                f"{summary.task}: stopped by {summary.stopped_by} with {summary.num_left} questions left ({summary}); "
                "raise it and run again: what is answered is kept"
            )


def _seed_ledger(job: Job) -> None:
    """This job's ledger knows what was gathered. Raises InputError where a part would ask what others have asked."""
    if job.part.count == 1:
        gather_answers(job)
        return
    mates = f"-of-{job.part.count}.sqlite"
    merged = _merged(job)
    for path in job.work_dir.glob("answers.part-*.sqlite"):
        if not path.name.endswith(mates) and merged.get(path.name) != _fingerprint(path):
            raise InputError(
                f"{path}: answers of an array of another size, which would be asked for again; run the stage plan "
                "first, which gathers them"
            )
    # of one file that nobody writes now: ledgers of parts at work on other nodes must not be opened
    if job.ledger_path.is_file():
        merge_ledgers(job.part_ledger_path, [job.ledger_path])


def gather_answers(job: Job) -> None:
    """Answers of job arrays' parts into the one ledger that shards are made from. Parts keep theirs: they may be at
    work."""
    if not (parts := sorted(job.work_dir.glob("answers.part-*.sqlite"))):
        return
    with lock(job.work_dir / ".answers.lock", "another gathering of answers", wait_s=600):
        merged = _merged(job)
        now = {part.name: _fingerprint(part) for part in parts}
        if new := [part for part in parts if merged.get(part.name) != now[part.name]]:
            merge_ledgers(job.ledger_path, new)
            write_atomically(_merged_path(job), json.dumps(now).encode())


def _merged_path(job: Job) -> Path:
    return job.work_dir / "answers.merged.json"


def _merged(job: Job) -> dict[str, list[list[int]]]:
    """Which ledgers of parts were gathered, and how they were then."""
    path = _merged_path(job)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _fingerprint(ledger_path: Path) -> list[list[int]]:
    """Changes with every answer: of the file and its write-ahead log."""
    files = (ledger_path, ledger_path.with_name(f"{ledger_path.name}-wal"))
    return [[file.stat().st_size, file.stat().st_mtime_ns] if file.is_file() else [] for file in files]


# ---------------------------------------------------------------------------------------------- commands


def print_estimates(job: Job) -> None:
    """Tokens, dollars and hours of what is still to be asked. Before a plan exists, of all captions of the source."""
    from data_prep.captions.estimate import estimate, format_estimate

    gather_answers(job)
    planned = (job.work_dir / "plan.json").is_file()
    if not planned:
        print("not planned yet: rows that the plan will leave out are counted, images without a caption are not")
    ledger = Ledger(job.ledger_path) if job.ledger_path.is_file() else None
    for name, asked in questions(job, job.tools).items():
        if planned or name == SUBCAPTIONS:
            items = asked.items() if planned else _all_captions(job)
            print(format_estimate(estimate(asked.task, items, ledger)))
        if num_pending := pending_questions(_batch_folder(job, name, asked.task)):
            print(f"  of these, {num_pending} are under way in batches")
    if job.config.describer is not None and job.config.decomposer.kind == "llm":
        print("sub-captions of reports that are not written yet are not counted: estimate again when they are")


def _all_captions(job: Job) -> Iterator[str]:
    for row in job.source.rows():
        if not isinstance(row, Rejection) and row.caption and not row.subcaptions and worth_asking(row.caption):
            yield row.caption


def ask_now(job: Job, options: AskOptions) -> int:
    """Asks, prints what came of it, and makes no shard."""
    for summary in ask_all(job, options):
        print(f"{summary.task}: {summary}")
    return 0


def batch(job: Job, action: str, of: str, options: AskOptions, results: list[Path]) -> int:
    """One step of batch mode, or all of them until nothing is missing."""
    from data_prep.captions import batch_api

    gather_answers(job)
    tasks = questions(job, job.tools)
    if of not in tasks:
        raise InputError(f"no model is configured for {of}; there is {', '.join(tasks)}")
    asked = tasks[of]
    folder = _batch_folder(job, of, asked.task)
    if results and action != "collect":
        raise InputError("--results: only with --action collect")
    if of == SUBCAPTIONS and REPORTS in tasks:
        print("sub-captions of reports that are not written yet are left out: run `--of reports` first")
    how = {"limit": options.limit, "max_usd": options.max_usd, "retry_failed": options.retry_failed}
    with Ledger(job.ledger_path) as ledger:
        match action:
            case "write":
                print(batch_api.write_batches(asked.task, asked.items(), ledger, folder, **how))  # type: ignore[arg-type]
                print(folder)
            case "submit":
                print(batch_api.submit(asked.task, folder))
            case "poll":
                print(batch_api.poll(asked.task, folder))
            case "collect" if results:
                print(batch_api.collect_files(asked.task, asked.items(), ledger, folder, results))
            case "collect":
                print(batch_api.collect(asked.task, asked.items(), ledger, folder))
            case _:
                print(batch_api.run_batches(asked.task, asked.items, ledger, folder, **how))  # type: ignore[arg-type]
    return 0


def _batch_folder(job: Job, of: str, task: Task[Any]) -> Path:
    """One for each model and prompt."""
    named = hashlib.sha256(f"{task.options.model}\x00{task.prompt_hash}".encode()).hexdigest()[:12]
    return job.work_dir / "batches" / f"{of}-{named}"
