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
from contextlib import AbstractContextManager

from data_prep.ask import gather_answers, stage_captions
from data_prep.config import FolderSource, PrepareConfig
from data_prep.config_file import dump_yaml
from data_prep.errors import InputError
from data_prep.files import disk_errors, lock, write_atomically
from data_prep.images import scan
from data_prep.job import Job
from data_prep.planning.rows import SourceState, read_rows
from data_prep.planning.stage import evaluation_images, load, plan_stage
from data_prep.pool import ALL, Part
from data_prep.progress import Progress
from data_prep.schema import ShardManifest
from data_prep.shards.report import write_preparation_report
from data_prep.shards.stage import merge_stage, shard_stage
from data_prep.sources.base import SourceRow

log = logging.getLogger(__name__)
STAGES = ("scan", "plan", "captions", "shards", "merge")


def prepare(
    config: PrepareConfig, *, stage: str | None = None, part: Part = ALL, accept_changes: bool = False
) -> dict[str, ShardManifest]:
    """All stages, or the one named; returns the manifests by split where the stage `merge` ran.

    Raises InputError where the source cannot be read, changed since the last run or lost images (unless
    `accept_changes`), gives no sample at all, or another process works on the same part.
    """
    job = Job(config, part)
    if part.count > 1 and stage not in ("scan", "captions", "shards"):
        raise InputError(f"{part}: give --stage scan, captions or shards with it; plan and merge are one job each")
    _check_places(config)
    manifests: dict[str, ShardManifest] = {}
    stages = STAGES if stage is None else (stage,)
    with disk_errors(job.out_dir), _locked(job, stages):
        _check_source(job, accept_changes)
        for name in stages:
            log.info("%s: stage %s, %s", config.name, name, part)
            match name:
                case "scan":
                    _scan_stage(job, accept_changes)
                case "plan":
                    gather_answers(job)
                    plan_stage(job, accept_changes=accept_changes)
                case "captions":
                    stage_captions(job)
                case "shards":
                    gather_answers(job)
                    with Progress("writing shards", unit="rows") as progress:
                        shard_stage(job, load(job), progress.advance)
                case "merge":
                    planned = load(job)
                    manifests, records = merge_stage(job, planned)
                    write_atomically(job.work_dir / "prepare.yaml", dump_yaml(config).encode())
                    write_preparation_report(job, planned, manifests, records)
    return manifests


def _locked(job: Job, stages: tuple[str, ...]) -> AbstractContextManager[None]:
    """Parts of job arrays run at once, and write no file of each other's; each part once, and any other job alone."""
    job.work_dir.mkdir(parents=True, exist_ok=True)
    if job.part.count == 1:
        return lock(job.whole_lock_path, "a preparation")
    name = f".{stages[0]}-{job.part.index}-of-{job.part.count}.lock"
    return lock(job.work_dir / name, f"a preparation (stage {stages[0]}, {job.part})")


def _check_places(config: PrepareConfig) -> None:
    """What is written must not be read as a source the next time."""
    folders = [each.path for each in config.duplicates.against if not (each.path / "manifest.json").is_file()]
    if isinstance(config.source, FolderSource):
        folders.append(config.source.image_dir)
    for folder in folders:
        if config.out_dir.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"out_dir: {config.out_dir} lies in {folder}, whose files are read; write elsewhere")


def _check_source(job: Job, accept_changes: bool) -> None:
    state = SourceState(job.work_dir)
    if accept_changes:
        state.forget_files()
    state.check(job.source, job.source_settings, lambda: read_rows(job.source, job.config.name, job.salt))


def _scan_stage(job: Job, accept_changes: bool) -> None:
    rows = (row for row in job.source.rows() if isinstance(row, SourceRow))
    work = [("images", job.scan_dir, scan.distinct((row.image for row in rows), job.salt))]
    for each in job.config.duplicates.against:
        if (found := evaluation_images(each)) is not None:
            work.append((f"evaluation set {each.name}", job.against_dir(each), iter(found[0])))
    for name, directory, images in work:
        with Progress(f"scanning {name}", unit="images") as progress:
            scan.scan(images, directory, job.config, job.salt, job.part.has, progress.advance, accept_changes)
