"""The commands that ask models without making shards: `dermvlp estimate`, `ask` and `batch`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from data_prep.errors import InputError
from data_prep.job import Job
from data_prep.planning.stage import load
from data_prep.prepare import AskOptions, ask_stage, captions, undescribed
from data_prep.sources.base import Rejection

if TYPE_CHECKING:
    from data_prep.captions.llm import LLMSplitter
    from data_prep.captions.tasks import Task

Items = Callable[[], Iterable[Any]]


def print_estimates(job: Job) -> None:
    """Tokens, dollars and hours of what is still to be asked. Before a plan exists, of all captions of the source."""
    from data_prep.captions.estimate import estimate, format_estimate
    from data_prep.captions.ledger import Ledger

    planned = (job.work_dir / "plan.json").is_file()
    if not planned:
        print("not planned yet: rows that the plan will leave out are counted, reports and their findings are not")
    ledger = Ledger(job.ledger_path) if job.ledger_path.is_file() else None
    for name, (task, items) in _tasks(job).items():
        if planned:
            print(format_estimate(estimate(task, items(), ledger)))
        elif name == "subcaptions":
            print(format_estimate(estimate(task, _all_captions(job), ledger)))


def ask_now(job: Job, limit: int | None, max_usd: float | None, retry_failed: bool) -> int:
    """Asks, prints what came of it, and makes no shard."""
    _tasks(job)
    for summary in ask_stage(job, load(job), AskOptions(limit, max_usd, retry_failed)):
        print(f"{summary.task}: {summary}")
    return 0


def batch(job: Job, action: str, of: str, results: Path | None) -> int:
    """One step of batch mode, or all of them until nothing is missing."""
    from data_prep.captions import batch_api
    from data_prep.captions.ledger import Ledger

    tasks = _tasks(job)
    if of not in tasks:
        raise InputError(f"no model is configured for {of}; there is {', '.join(tasks)}")
    task, items = tasks[of]
    folder = job.work_dir / "batches" / f"{of}-{task.prompt_hash[:12]}"
    if results is not None and action != "collect":
        raise InputError("--results: only with --action collect")
    with Ledger(job.ledger_path) as ledger:
        match action:
            case "write":
                print(batch_api.write_batches(task, items(), ledger, folder))
                print(folder)
            case "submit":
                print(batch_api.submit(task, folder))
            case "poll":
                print(batch_api.poll(task, folder))
            case "collect" if results is not None:
                print(batch_api.collect_files(task, items(), ledger, folder, [results]))
            case "collect":
                print(batch_api.collect(task, items(), ledger, folder))
            case _:
                print(batch_api.run_batches(task, items, ledger, folder))
    return 0


def _tasks(job: Job) -> dict[str, tuple[Task[Any], Items]]:
    """The questions that the configuration has models for. Raises InputError where there are none."""
    from data_prep.captions.subcaptions import worth_asking

    tasks: dict[str, tuple[Task[Any], Items]] = {}
    tools = job.tools
    if tools.describer is not None:
        tasks["reports"] = (tools.describer.task, lambda: undescribed(job, load(job)))
    if job.config.decomposer.kind == "llm":
        task = cast("LLMSplitter", tools.decomposer).task
        tasks["subcaptions"] = (task, lambda: filter(worth_asking, captions(job, load(job))))
    if not tasks:
        raise InputError("the configuration names no model: set decomposer.kind to llm, or a describer")
    return tasks


def _all_captions(job: Job) -> Iterable[str]:
    from data_prep.captions.subcaptions import worth_asking

    for row in job.source.rows():
        if not isinstance(row, Rejection) and row.caption and not row.subcaptions and worth_asking(row.caption):
            yield row.caption
