"""From a source to shards: `dermvlp prepare CONFIG`, in five stages.

    scan      every distinct image, decoded once: facts, hashes, the JPEG for the shard      (job arrays: --part i/n)
    plan      copies, leakage, splits: every row's fate, and why
    captions  models are asked for reports and sub-captions; nothing to do for rules         (job arrays: --part i/n)
    shards    consecutive rows of a split to one tar each                                     (job arrays: --part i/n)
    merge     index, manifest, ledgers, report

Each stage is a function of what the stages before it left on disk, writes whole files or none, and does again only what
is missing or was made from other inputs. So a killed preparation goes on where it was.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

from data_prep.captions.describe import Undescribed
from data_prep.captions.ledger import merge_ledgers
from data_prep.captions.tokens import TokenCounter
from data_prep.config import PrepareConfig, dump_yaml
from data_prep.errors import InputError
from data_prep.files import full_disk_is_input_error, lock, write_atomically
from data_prep.images import scan
from data_prep.images.scan import ALL, Part
from data_prep.job import Job
from data_prep.planning.rows import SourceState, iter_survivors, read_rows
from data_prep.planning.stage import Planned, evaluation_images, load, plan_stage
from data_prep.progress import Progress
from data_prep.schema import ShardManifest, text_hash
from data_prep.shards.report import write_preparation_report
from data_prep.shards.stage import merge_stage, shard_stage
from data_prep.sources.base import SourceRow

if TYPE_CHECKING:
    from data_prep.captions.asking import AskSummary
    from data_prep.captions.llm import LLMSplitter

log = logging.getLogger(__name__)
STAGES = ("scan", "plan", "captions", "shards", "merge")


def prepare(
    config: PrepareConfig, *, stage: str | None = None, part: Part = ALL, accept_changes: bool = False
) -> dict[str, ShardManifest]:
    """All stages, or the one named; returns the manifests by split where the stage `merge` ran.

    Raises InputError where the source cannot be read, changed since the last run (unless `accept_changes`), gives no
    sample at all, or another process works on the same part.
    """
    job = Job(config, part)
    if part.count > 1 and stage not in ("scan", "captions", "shards"):
        raise InputError(f"{part}: give --stage scan, captions or shards with it; plan and merge are one job each")
    job.work_dir.mkdir(parents=True, exist_ok=True)
    manifests: dict[str, ShardManifest] = {}
    stages = STAGES if stage is None else (stage,)
    with full_disk_is_input_error(job.out_dir), _locked(job, stages):
        _check_source(job, accept_changes)
        write_atomically(job.out_dir / "prepare.yaml", dump_yaml(config).encode())
        for name in stages:
            log.info("%s: stage %s, %s", config.name, name, part)
            match name:
                case "scan":
                    _scan_stage(job)
                case "plan":
                    plan_stage(job, accept_changes=accept_changes)
                case "captions":
                    _caption_stage(job, load(job))
                case "shards":
                    _gather_answers(job)
                    with Progress("writing shards", unit="rows") as progress:
                        shard_stage(job, load(job), progress.advance)
                case "merge":
                    planned = load(job)
                    manifests, records = merge_stage(job, planned)
                    write_preparation_report(job, planned, manifests, records)
    return manifests


def _locked(job: Job, stages: tuple[str, ...]) -> AbstractContextManager[None]:
    """One process a part and stage. Stages of different parts run at once, and write no file of each other's."""
    what = stages[0] if len(stages) == 1 else "all"
    name = f".{what}-{job.part.index}-of-{job.part.count}.lock"
    return lock(job.work_dir / name, f"a preparation (stage {what}, {job.part})")


def _check_source(job: Job, accept_changes: bool) -> None:
    state = SourceState(job.work_dir)
    if accept_changes:
        state.forget_files()
    state.check(job.source, job.source_settings, lambda: read_rows(job.source, job.config.name, job.salt))


def _scan_stage(job: Job) -> None:
    rows = (row for row in job.source.rows() if isinstance(row, SourceRow))
    with Progress("scanning images", unit="images") as progress:
        scan.scan(
            scan.distinct(row.image for row in rows),
            job.scan_dir,
            job.config,
            job.part,
            progress.advance,
        )
    for each in job.config.duplicates.against:
        images = evaluation_images(each)
        if images is None:
            continue
        with Progress(f"scanning evaluation set {each.name}", unit="images") as progress:
            scan.scan(images, job.against_dir(each.name), job.config, job.part, progress.advance)


# ---------------------------------------------------------------------------------------------- captions


def undescribed(job: Job, planned: Planned) -> Iterator[Undescribed]:
    """The part's images of surviving rows that have no caption."""
    for position, row in iter_survivors(job.source, planned.fate):
        if row.caption is None and job.part.has(text_hash(row.image.name)):
            fact = planned.facts[planned.rows["image"][position]]
            yield Undescribed(
                fact["sha256"].tobytes().hex(), partial(scan.read_jpeg, job.scan_dir, fact), row.diagnosis
            )


def captions(job: Job, planned: Planned) -> Iterator[str]:
    """The part's whole captions of surviving rows that a decomposer is to split, the describer's reports among them."""
    describer = job.asking_tools.describer
    for position, row in iter_survivors(job.source, planned.fate):
        if row.subcaptions:
            continue
        if row.caption is not None:
            if job.part.has(text_hash(row.caption)):
                yield row.caption
        elif describer is not None and job.part.has(text_hash(row.image.name)):  # as in `undescribed`
            fact = planned.facts[planned.rows["image"][position]]
            report = describer.report(fact["sha256"].tobytes().hex(), row.diagnosis)
            if not isinstance(report, str):
                yield report.text


@dataclass(frozen=True)
class AskOptions:
    """What a run may ask, beyond the configuration."""

    limit: int | None = None  # a pilot: so many questions at most
    max_usd: float | None = None
    retry_failed: bool = False


def ask_stage(job: Job, planned: Planned, options: AskOptions = AskOptions()) -> list[AskSummary]:
    """Reports, then sub-captions: what has no answer yet. Empty where no model is configured."""
    if job.part.count > 1 and job.ledger_path.is_file() and not job.part_ledger_path.is_file():
        merge_ledgers(job.part_ledger_path, [job.ledger_path])  # what is answered is not asked by a part again
    TokenCounter(job.config.tokenizer).load()  # a wrong name shows before anything is paid
    tools, how = job.asking_tools, asdict(options)
    summaries = []
    if tools.describer is not None:
        summaries.append(tools.describer.prepare(undescribed(job, planned), **how))
    if job.config.decomposer.kind == "llm":
        summaries.append(cast("LLMSplitter", tools.decomposer).prepare(captions(job, planned), **how))
    return summaries


def _caption_stage(job: Job, planned: Planned) -> None:
    if job.config.describer is None and job.config.decomposer.kind != "llm":
        return
    for summary in ask_stage(job, planned):
        if summary.stopped_by is not None:
            raise InputError(
                f"{summary.task}: stopped by {summary.stopped_by} with {summary.num_left} questions left ({summary}); "
                "raise it and run again: what is answered is kept"
            )


def _gather_answers(job: Job) -> None:
    """Answers of a job array's parts into one ledger; the shards read that one."""
    if parts := sorted(job.work_dir.glob("answers.part-*.sqlite")):
        with lock(job.work_dir / ".answers.lock", "another gathering of answers", wait_s=600):
            for part in parts:
                if part.is_file():  # another job of the array may have been first
                    merge_ledgers(job.ledger_path, [part])
                    part.unlink()
