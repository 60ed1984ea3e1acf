"""`dermvlp evaluate`, `compare`, `embed` and `annotate`: parse, call, print."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import InputError

if TYPE_CHECKING:
    from pretrain.evaluation.config import EvaluationConfig

# Each command imports what it needs.

_MODEL = "a run, a checkpoint, an exported folder, local-dir:FOLDER, hf-hub:ORG/NAME or open_clip's NAME/WEIGHTS"
_DATA = "a description (.yaml, see configs/eval/datasets/), a split of shards, a folder of images, tars, or a table"


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    evaluate = add("evaluate", _evaluate, "a model on a data set: zero-shot, retrieval, probe, concepts, questions")
    evaluate.add_argument("model", help=_MODEL)
    evaluate.add_argument("--data", required=True, help=_DATA)
    evaluate.add_argument(
        "--out", type=Path, help="folder; by default RUN/evaluations/CHECKPOINT/DATA, or below evaluations/ here"
    )
    evaluate.add_argument("--config", type=Path, help="YAML of tasks and settings; by default all tasks")
    evaluate.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="in that config")
    _add_set_data(evaluate)
    evaluate.add_argument("--tasks", help="these only, separated by commas: zero_shot,retrieval,...")
    evaluate.add_argument(
        "--training-data",
        type=Path,
        action="append",
        help="a split that the model was trained on, to find its images in the data set; a run of ours knows its own",
    )
    evaluate.add_argument(
        "--classnames-of", type=Path, action="append", default=[], help="a split whose diagnoses are classes too"
    )
    compare = add("compare", _compare, "several evaluations on one page, with paired differences and ranks")
    compare.add_argument("folders", type=Path, nargs="+", help="folders that `dermvlp evaluate` wrote")
    compare.add_argument("--out", type=Path, default=Path("comparison.html"))
    embed = add("embed", _embed, "features of images into a table; goes on where it was interrupted")
    embed.add_argument("model", help=_MODEL)
    embed.add_argument("data", help=_DATA)
    embed.add_argument("--out", type=Path, required=True, help="FILE.parquet or FILE.npy")
    embed.add_argument("--layer", default="joint", help="joint, tower, or block.N")
    _add_reading(embed)
    annotate = add("annotate", _annotate, "scores of clinical concepts for each image, as a CSV")
    annotate.add_argument("model", help=_MODEL)
    annotate.add_argument("data", help=_DATA)
    annotate.add_argument("--out", type=Path, required=True, help="FILE.csv")
    _add_reading(annotate)
    annotate.add_argument("--terms", type=Path, help="JSON, {concept: [synonym, ...]}; see configs/eval/concepts.json")


def _add_set_data(command: argparse.ArgumentParser) -> None:
    text = "in the data set's description, also where there is no YAML: docs/evaluation_data.md"
    command.add_argument("--set-data", action="append", default=[], metavar="KEY.PATH=VALUE", help=text)


def _add_reading(command: argparse.ArgumentParser) -> None:
    _add_set_data(command)
    command.add_argument("--batch-size", type=int, default=64)
    command.add_argument("--num-workers", type=int, default=2, help="processes that decode images")


def _evaluate(arguments: argparse.Namespace) -> int:
    from data_prep.config_file import load_config, make_config
    from pretrain.evaluation.config import EvaluationConfig
    from pretrain.evaluation.datasets import open_data
    from pretrain.evaluation.encoding.encoders import load_encoder
    from pretrain.evaluation.evaluate import evaluate, print_result
    from pretrain.evaluation.reports.evaluation import REPORT_NAME

    overrides = arguments.set
    if arguments.config is None:
        config = make_config({}, overrides, EvaluationConfig, Path("the tasks"))
    else:
        config = load_config(arguments.config, overrides, EvaluationConfig)
    if arguments.tasks is not None:
        config = _only(config, arguments.tasks.split(","))
    of_splits = _classnames(arguments.data, arguments.classnames_of)
    data = open_data(arguments.data, [*of_splits, *arguments.set_data])
    out_dir = arguments.out or _out_dir(arguments.model, data.name)
    encoder = load_encoder(arguments.model)
    training_dirs = arguments.training_data or _own_training_dirs(arguments.model)
    result = evaluate(encoder, data, out_dir, config, training_dirs)
    print_result(result)
    print(f"\n{out_dir / REPORT_NAME}")
    return 2 if result.failed else 0


def _only(config: EvaluationConfig, kinds: Sequence[str]) -> EvaluationConfig:
    from pretrain.evaluation.config import TASKS, EvaluationConfig

    unknown = [kind for kind in kinds if kind not in TASKS]
    if unknown:
        raise InputError(f"--tasks: no task {', '.join(map(repr, unknown))}; there are {', '.join(TASKS)}")
    given = {task.kind: task for task in config.tasks}
    chosen = [given[kind] if kind in given else TASKS[kind]() for kind in kinds]
    return EvaluationConfig.model_validate({"tasks": chosen, "settings": config.settings})


def _classnames(data: str, others: Sequence[Path]) -> list[str]:
    """An override of the description, where other splits bring classes."""
    import json

    from pretrain.data.manifest import ShardedDataset, diagnoses

    if not others:
        return []
    return [f"classnames={json.dumps(diagnoses(*map(ShardedDataset, [Path(data), *others])))}"]


def _run_of(model: str) -> Path | None:
    """The folder of a run of ours, where the model is one of its checkpoints or the run itself."""
    from pretrain.evaluation.encoding.encoders import is_best

    path = Path(model).resolve()
    if (path / "checkpoints").is_dir():
        return path
    is_checkpoint = path.parent.name == "checkpoints" and (path / "meta.json").is_file()
    return path.parents[1] if is_checkpoint or is_best(path) else None


def _out_dir(model: str, data: str) -> Path:
    from pretrain.evaluation.encoding.encoders import find_checkpoint

    run_dir = _run_of(model)
    if run_dir is not None:
        return run_dir / "evaluations" / find_checkpoint(Path(model).resolve()).name / data
    return Path("evaluations") / re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.") / data


def _own_training_dirs(model: str) -> list[Path]:
    """The split that a run was trained on, where it is still there with its hashes; says where it is not."""
    from pretrain.data.manifest import ShardedDataset
    from pretrain.evaluation.encoding.encoders import find_checkpoint
    from pretrain.train.checkpoint import checkpoint_config
    from pretrain.train.retention import read_meta

    if _run_of(model) is None:
        return []
    checkpoint = find_checkpoint(Path(model))
    train_dir = checkpoint_config(checkpoint).data.train_dir
    if not (train_dir / "image_hashes.npy").is_file():
        print(f"not compared with the training data: {train_dir} is not there; name it with --training-data")
        return []
    if ShardedDataset(train_dir, with_tars=False).digest != read_meta(checkpoint)["data_digest"]:
        print(
            f"not compared with the training data: {train_dir} holds other samples than the run was trained on; name "
            "the right split with --training-data"
        )
        return []
    return [train_dir]


def _compare(arguments: argparse.Namespace) -> int:
    from data_prep.files import write_atomically
    from pretrain.evaluation.comparison.compare import compare
    from pretrain.evaluation.reports.comparison import write_comparison

    comparison = compare(arguments.folders)
    numbers = arguments.out.with_suffix(".json")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(numbers, comparison.model_dump_json(indent=1).encode())
    print(f"{write_comparison(arguments.out, comparison)}, {numbers}")
    return 0


def _embed(arguments: argparse.Namespace) -> int:
    from pretrain.evaluation.datasets import open_data
    from pretrain.evaluation.encoding.embed import embed, rejected_path, settings_of
    from pretrain.evaluation.encoding.encoders import load_encoder

    settings = settings_of(arguments.batch_size, arguments.num_workers)
    encoder, data = load_encoder(arguments.model), open_data(arguments.data, arguments.set_data)
    info = embed(encoder, data, arguments.out, arguments.layer, settings)
    print(f"{arguments.out}: {info.num_images} images, {info.width} features of layer {info.layer}")
    if info.num_rejected:
        print(f"{rejected_path(arguments.out)}: {info.num_rejected} rows and images that could not be used")
    return 0


def _annotate(arguments: argparse.Namespace) -> int:
    from data_prep.labels.concepts import read_terms
    from pretrain.evaluation.datasets import open_data
    from pretrain.evaluation.datasets.data import write_rejected
    from pretrain.evaluation.encoding.embed import rejected_path, settings_of
    from pretrain.evaluation.encoding.encoders import load_encoder
    from pretrain.evaluation.encoding.features import image_features
    from pretrain.evaluation.interfaces import JOINT
    from pretrain.evaluation.methods.concepts import annotate_rows

    if arguments.out.suffix != ".csv":
        raise InputError(f"--out {arguments.out}: expected a name that ends in .csv")
    if arguments.terms is not None:
        read_terms(arguments.terms)  # before hours of encoding
    encoder, data = load_encoder(arguments.model), open_data(arguments.data, arguments.set_data)
    folder = arguments.out.with_name(f"{arguments.out.name}.features")
    settings = settings_of(arguments.batch_size, arguments.num_workers)
    encoded = image_features(encoder, data, (JOINT,), folder, settings)
    data = data.without(encoded.rejected)
    annotate_rows(encoder, data.rows, encoded.by_layer[JOINT], arguments.out, arguments.terms)
    write_rejected(rejected_path(arguments.out), data.rejected)
    print(f"{arguments.out}: {len(data.rows)} images; their features are in {folder}")
    if data.rejected:
        print(f"{rejected_path(arguments.out)}: {len(data.rejected)} rows and images that could not be used")
    return 0
