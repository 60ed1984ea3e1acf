"""`dermvlp export`, `publish` and `publish-data`: parse, call, print."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.publish.hub import Destination, RepoType

# Each command imports what it needs when it runs.


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """`add(name, run, text)` makes a command, as in `pretrain.cli`."""
    export = add("export", _export, "a folder for open_clip's local-dir:")
    export.add_argument("run_dir", type=Path)
    export.add_argument("out_dir", type=Path)
    publish = add("publish", _publish, "a run's model with its card and numbers to the Hugging Face Hub")
    publish.add_argument("run_dir", type=Path, help="a run, one of its checkpoints, or RUN/checkpoints/best")
    publish.add_argument(
        "--evaluation",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="evaluation.json or its folder; may be repeated; by default those of these weights under RUN/evaluations",
    )
    publish.add_argument("--data", type=Path, metavar="SPLIT", help="the training split, where it was moved")
    publish.add_argument(
        "--dataset", action="append", default=[], help="id on the Hub of training data; may be repeated"
    )
    publish.add_argument("--licence", metavar="ID", help="of the weights, where the data's do not decide it")
    publish.add_argument(
        "--allow-no-derivatives", action="store_true", help="publish although data may not be altered; the card says so"
    )
    publish.add_argument("--out", type=Path, metavar="FOLDER", help="by default RUN/published")
    data = add("publish-data", _publish_data, "prepared splits as a data set on the Hugging Face Hub")
    data.add_argument("split_dirs", type=Path, nargs="+", metavar="SPLIT_DIR", help="folder with manifest.json")
    data.add_argument("--captions-only", action="store_true", help="no images, whatever their licences allow")
    data.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the data set is written first")
    for command in (publish, data):
        command.add_argument("--repo", required=True, metavar="ORG/NAME")
        command.add_argument("--public", action="store_true", help="by default private")
        command.add_argument("--gated", action="store_true", help="access on request, decided by the owners")
        command.add_argument(
            "--dry-run", action="store_true", help="write the folder, say what would be sent, send nothing"
        )


def _destination(arguments: argparse.Namespace, repo_type: RepoType) -> Destination:
    from pretrain.publish.hub import Destination

    return Destination(arguments.repo, repo_type, arguments.public, arguments.gated)


def _export(arguments: argparse.Namespace) -> int:
    from pretrain.models.open_clip_config import holds_text_tower
    from pretrain.publish.export import export

    folder = export(arguments.run_dir, arguments.out_dir)
    if holds_text_tower(folder):
        print(f'pretrain.publish.load.load_folder("{folder}")')
    else:
        print(f'open_clip.create_model_and_transforms("local-dir:{folder}")')
    return 0


def _publish(arguments: argparse.Namespace) -> int:
    from pretrain.publish.publish import describe, publish

    made = publish(
        arguments.run_dir,
        arguments.repo,
        out_dir=arguments.out,
        evaluations=arguments.evaluation,
        data_dir=arguments.data,
        datasets=arguments.dataset,
        licence=arguments.licence,
        allow_no_derivatives=arguments.allow_no_derivatives,
        dry_run=arguments.dry_run,
        is_public=arguments.public,
        is_gated=arguments.gated,
    )
    print(describe(made, _destination(arguments, "model")))
    return 0


def _publish_data(arguments: argparse.Namespace) -> int:
    from pretrain.publish.data_set import describe, publish_data

    made = publish_data(
        arguments.split_dirs,
        arguments.repo,
        arguments.out,
        with_images=not arguments.captions_only,
        dry_run=arguments.dry_run,
        is_public=arguments.public,
        is_gated=arguments.gated,
    )
    print(describe(made, _destination(arguments, "dataset")))
    return 0
