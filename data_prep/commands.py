"""The commands of data preparation, as `dermvlp` has them: parse, call, print."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_prep.ask import AskOptions
    from data_prep.job import Job

# Each command imports what it needs, so that `dermvlp --help` is quick.

Add = Callable[..., argparse.ArgumentParser]


def add_commands(add: Add) -> None:
    """`add(name, run, help, config)` makes a subcommand; with `config`, it takes CONFIG and key.path=value."""
    from data_prep.captions.report import add_report_arguments

    command = add("prepare", _prepare, "image-text pairs to shards", "YAML file, see configs/data/")
    command.add_argument("--stage", choices=("scan", "plan", "captions", "shards", "merge"), help="this stage alone")
    _add_part(command)
    command.add_argument("--accept-changes", action="store_true", help="the source changed since the last run: go on")
    command = add("verify", _verify, "read a split's shards back against the manifest")
    command.add_argument("directory", type=Path, help="folder of a split, with manifest.json")
    command = add("repair", _repair, "make damaged shards again, and nothing else")
    command.add_argument("out_dir", type=Path, help="out_dir of a preparation, with prepare.yaml")
    command = add("inspect", _inspect, "a page of samples: picture, captions by aspect, where they came from")
    command.add_argument("directory", type=Path, help="folder of a split, with manifest.json")
    command.add_argument("--num", type=int, default=24)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--out", type=Path, default=Path("inspect.html"))
    add("estimate", _estimate, "what the models' answers would take: tokens, dollars, hours; asks nothing", "YAML file")
    command = add("ask", _ask, "ask the models for reports and sub-captions, without making shards", "YAML file")
    _add_part(command)
    _add_ask_options(command)
    command = add("batch", _batch, "the same questions as OpenAI Batch files, or for vllm run-batch", "YAML file")
    command.add_argument("--action", choices=("write", "submit", "poll", "collect", "run"), default="run")
    command.add_argument("--of", choices=("reports", "subcaptions"), default="subcaptions")
    command.add_argument("--results", type=Path, nargs="+", default=[], help="collect: files of `vllm run-batch`")
    _add_ask_options(command)
    command = add("captions", _captions, "judge a caption decomposer on Derm1M's own captions")
    add_report_arguments(command)


def _add_part(command: argparse.ArgumentParser) -> None:
    command.add_argument("--part", default="0/1", help="i/n, from 0: this job's share in a job array")


def _add_ask_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--limit", type=int, help="a pilot: so many new questions at most, of each task")
    command.add_argument("--max-usd", type=float, help="stop before this run costs more, for each task")
    command.add_argument("--retry-failed", action="store_true", help="ask again what was answered unusably")


def _prepare(arguments: argparse.Namespace) -> int:
    from data_prep.config import PrepareConfig
    from data_prep.config_file import load_config
    from data_prep.pool import Part
    from data_prep.prepare import prepare
    from data_prep.summary import print_summary

    config = load_config(arguments.config, arguments.overrides, PrepareConfig)
    started = time.monotonic()
    part = Part.parse(arguments.part)
    manifests = prepare(config, stage=arguments.stage, part=part, accept_changes=arguments.accept_changes)
    seconds = time.monotonic() - started
    if manifests:
        print_summary(config.out_dir, manifests, seconds)
    else:
        print(f"stage {arguments.stage}, {part}: done in {seconds:.1f} s, in {config.out_dir}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from data_prep.shards.manifest import verify

    manifest = verify(arguments.directory)
    print(
        f"{arguments.directory}: {manifest.num_samples} samples in {len(manifest.shards)} shards, every byte as written"
    )
    return 0


def _repair(arguments: argparse.Namespace) -> int:
    from data_prep.repair import repair

    for path in repair(arguments.out_dir):
        print(f"made again: {path}")
    print(f"{arguments.out_dir}: every shard is as its manifest says")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from data_prep.shards.inspect import inspect

    print(inspect(arguments.directory, arguments.num, arguments.seed, arguments.out))
    return 0


def _estimate(arguments: argparse.Namespace) -> int:
    from data_prep.ask import print_estimates

    print_estimates(_job(arguments))
    return 0


def _ask(arguments: argparse.Namespace) -> int:
    from data_prep.ask import ask_now

    job = _job(arguments)
    _plan_first(job)
    return ask_now(job, _ask_options(arguments))


def _batch(arguments: argparse.Namespace) -> int:
    from data_prep.ask import batch

    job = _job(arguments)
    _plan_first(job)
    return batch(job, arguments.action, arguments.of, _ask_options(arguments), arguments.results)


def _ask_options(arguments: argparse.Namespace) -> AskOptions:
    from data_prep.ask import AskOptions

    return AskOptions(arguments.limit, arguments.max_usd, arguments.retry_failed)


def _plan_first(job: Job) -> None:
    """Which captions there are to ask about is known when there is a plan."""
    from data_prep.prepare import prepare

    if job.part.count == 1 and not (job.work_dir / "plan.json").is_file():
        for stage in ("scan", "plan"):
            prepare(job.config, stage=stage)


def _captions(arguments: argparse.Namespace) -> int:
    from data_prep.captions.report import print_report

    return print_report(arguments)


def _job(arguments: argparse.Namespace) -> Job:
    from data_prep.config import PrepareConfig
    from data_prep.config_file import load_config
    from data_prep.job import Job
    from data_prep.pool import Part

    config = load_config(arguments.config, arguments.overrides, PrepareConfig)
    return Job(config, Part.parse(getattr(arguments, "part", "0/1")))
