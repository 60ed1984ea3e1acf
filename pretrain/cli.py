"""The command `dermvlp`: parse, call, print. Bad input ends with one message and exit status 2."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.commands import add_commands
from data_prep.errors import InputError
from pretrain.evaluation.commands import add_commands as add_evaluation_commands
from pretrain.publish.commands import add_commands as add_publishing_commands
from pretrain.train.signals import hold

# Each command imports what it needs: `dermvlp prepare` runs on a machine without torch.


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if (
        argv is None and arguments.run is _train and not arguments.plan
    ):  # a process of its own; its imports take seconds
        hold()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return int(arguments.run(arguments) or 0)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dermvlp", description="Dermatology vision-language pretraining.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run: object, text: str, config: str | None = None) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        if config is not None:
            command.add_argument("config", help=config)
            command.add_argument("overrides", nargs="*", metavar="key.path=value")
        return command

    add_commands(add)
    text = "pretrain; goes on with the run in run_dir, if there is one"
    train = add("train", _train, text, "YAML, see configs/pretrain/")
    train.add_argument("--plan", action="store_true", help="print what the run will be and need, and train nothing")
    train.add_argument("--json", action="store_true", help="with --plan: as one JSON object")
    train.add_argument("--nnodes", type=int, default=1, help="nodes; each runs this command")
    train.add_argument("--nproc-per-node", type=int, help="ranks of this node; by default launch.num_ranks")
    train.add_argument("--rdzv-endpoint", help="HOST:PORT: the first node's name and a free port, for all the same")
    train.add_argument("--rdzv-id", default=os.environ.get("SLURM_JOB_ID", "dermvlp"), help="of this run")
    add_evaluation_commands(add)
    add_publishing_commands(add)
    demo = add("demo", _demo, "the whole way: prepare, evaluate, train, evaluate, export, report")
    demo.add_argument("--source", default="configs/data/synthetic.yaml", help="data config")
    demo.add_argument("--recipe", help="training config; by default the demo's for synthetic or for real images")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"))
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from pretrain.train.launch import Nodes, launch

    if arguments.plan:
        return _plan(arguments)
    if arguments.json:
        raise InputError("--json belongs to --plan")
    nodes = Nodes(arguments.nnodes, arguments.rdzv_endpoint, arguments.rdzv_id, arguments.nproc_per_node)
    return launch(arguments.config, arguments.overrides, nodes)


def _plan(arguments: argparse.Namespace) -> int:
    from pretrain.train.__main__ import load_training_config
    from pretrain.train.preflight.report import print_plan

    config = load_training_config(arguments.config, arguments.overrides)
    num_ranks = None if arguments.nproc_per_node is None else arguments.nnodes * arguments.nproc_per_node
    return print_plan(config, num_ranks, as_json=arguments.json)


def _demo(arguments: argparse.Namespace) -> int:
    from pretrain.demo import demo

    return demo(arguments.source, arguments.recipe, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
