"""`dermvlp publish RUN --repo ORG/NAME`: model, numbers and limits in one step."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip

from data_prep.errors import InputError
from data_prep.files import write_atomically
from pretrain.config import TrainConfig
from pretrain.evaluation.encoding.encoders import find_checkpoint, load_encoder
from pretrain.evaluation.results import RESULT_NAME, EvaluationResult, read_result
from pretrain.models.build import image_px
from pretrain.models.open_clip_config import CONFIG_NAME, holds_text_tower
from pretrain.publish.clip_model import CLIP_FILES, lacks_clip_shape, write_clip_model
from pretrain.publish.export import METRICS_NAME, TRAINING_CONFIG_NAME, WEIGHTS_NAME, export
from pretrain.publish.hub import (
    CARD_NAME,
    Destination,
    check_repo_name,
    describe_folder,
    list_files,
    token_from_environment,
    upload,
)
from pretrain.publish.licences import WeightsLicence, weights_licence
from pretrain.publish.load import load_folder
from pretrain.publish.model_card import CardFacts, ModelFacts, model_card
from pretrain.publish.private import check_private
from pretrain.publish.run_facts import read_run
from pretrain.train.checkpoint import checkpoint_config

EVALUATIONS_DIR = "evaluations"

#: all that a publication can hold: what of it is not made now, an earlier one may have left on the Hub
_OURS = (CONFIG_NAME, WEIGHTS_NAME, TRAINING_CONFIG_NAME, METRICS_NAME, CARD_NAME, *CLIP_FILES)
_TOKENIZER_FILES = (
    *("vocab.txt", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "chat_template.jinja"),
)


@dataclass(frozen=True)
class Publication:
    """A folder ready to be sent, or sent."""

    folder: Path
    files: dict[str, int]  # bytes by name
    licence: WeightsLicence
    model: ModelFacts
    url: str | None = None  # of the commit; None: not sent


def publish(
    run_or_checkpoint: Path,
    repo: str,
    *,
    out_dir: Path | None = None,
    evaluations: Sequence[Path] = (),
    data_dir: Path | None = None,
    datasets: Sequence[str] = (),
    licence: str | None = None,
    allow_no_derivatives: bool = False,
    dry_run: bool = False,
    is_public: bool = False,
    is_gated: bool = False,
) -> Publication:
    """Writes the folder of a published model, then sends it to the Hub unless `dry_run`.

    Args:
        repo: ORG/NAME on the Hub.
        out_dir: the folder; by default RUN/published. Written anew.
        evaluations: evaluation.json files or their folders; by default those of these
            weights under RUN/evaluations.
        data_dir: the training split, where it is not where the run read it.
        datasets: ids on the Hub of the training data, for the card.
        licence, allow_no_derivatives: see `licences.weights_licence`.

    Raises InputError, before anything is sent, for data whose licences do not allow it, for a model that cannot be
    exported, for a missing token and for a file that names a path of this machine.
    """
    check_repo_name(repo)
    if not dry_run:
        token_from_environment()
    checkpoint = find_checkpoint(run_or_checkpoint).resolve()
    run_dir = checkpoint.parent.parent
    run = read_run(checkpoint, data_dir)
    chosen = weights_licence(run.manifest.samples_by_licence, licence, allow_no_derivatives)
    results = _results(checkpoint, evaluations or _evaluations_of(checkpoint), repo)
    folder = _fresh_folder(out_dir or run_dir / "published")
    export(checkpoint, folder, hub_name=repo)
    card = CardFacts(
        repo=repo,
        run=run,
        licence=chosen,
        model=_write_clip_model(folder),
        evaluations=tuple(results.values()),
        datasets=tuple(datasets),
        is_gated=is_gated,
    )
    for name, result in results.items():
        (folder / EVALUATIONS_DIR).mkdir(exist_ok=True)
        write_atomically(folder / EVALUATIONS_DIR / f"{name}.json", result.model_dump_json(indent=1).encode())
    write_atomically(folder / CARD_NAME, model_card(card).encode())
    files = list_files(folder)
    known_paths = [run_dir, folder, *_paths_of(checkpoint_config(checkpoint)), *([data_dir] if data_dir else [])]
    check_private([folder / name for name in files], known_paths)
    url = None
    if not dry_run:
        to = Destination(repo, "model", is_public, is_gated)
        obsolete = (*_OURS, *_TOKENIZER_FILES, f"{EVALUATIONS_DIR}/*.json")
        url = upload(folder, tuple(files), to, f"Checkpoint of step {run.step}", obsolete)
    return Publication(folder, files, chosen, card.model, url)


def _paths_of(config: TrainConfig) -> list[Path]:
    """Where the run read and wrote."""
    val_dir = None if config.validation is None else config.validation.val_dir
    paths = (config.run_dir, config.data.train_dir, config.data.stage_dir, val_dir)
    return [path for path in paths if path is not None]


def _write_clip_model(folder: Path) -> ModelFacts:
    """The CLIPModel beside open_clip's files, where the model has its shape; what the card says of the model."""
    model, _, _ = load_folder(folder)  # as its users will have it
    model_cfg = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["model_cfg"]
    reason = lacks_clip_shape(model, model_cfg)
    return ModelFacts(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        image_px=image_px(model.visual),
        embed_dim=int(model_cfg["embed_dim"]),
        context_length=int(model_cfg["text_cfg"].get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)),
        has_own_text_tower=holds_text_tower(folder),
        clip_difference=None if reason is not None else write_clip_model(model, model_cfg, folder),
        no_clip_model=reason or "",
    )


def _fresh_folder(folder: Path) -> Path:
    """Without what an earlier publication left. Raises InputError for one that holds anything else."""
    found = list(list_files(folder))
    ours = {*_OURS, *_TOKENIZER_FILES}
    foreign = [name for name in found if name not in ours and not re.fullmatch(rf"{EVALUATIONS_DIR}/[^/]+\.json", name)]
    if foreign or (found and CONFIG_NAME not in found):
        raise InputError(
            f"{folder}: holds {(foreign or found)[0]}, which no publication wrote; choose another folder with --out"
        )
    for name in found:
        (folder / name).unlink()
    if (folder / EVALUATIONS_DIR).is_dir():
        (folder / EVALUATIONS_DIR).rmdir()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _evaluations_of(checkpoint: Path) -> list[Path]:
    """Those below RUN/evaluations of these weights, the newest of each set; all where none is, to be refused by
    name."""
    found = sorted((checkpoint.parents[1] / EVALUATIONS_DIR).rglob(RESULT_NAME))
    digest = load_encoder(checkpoint).info.digest if found else ""
    own: dict[str, tuple[str, Path]] = {}
    for path in found:
        try:
            result = read_result(path)
        except InputError as error:  # perhaps of another checkpoint, and of another version of dermvlp
            print(f"not published: {error}")
            continue
        if result.model.digest == digest:
            own[result.dataset.name] = max(own.get(result.dataset.name, ("", path)), (result.created, path))
    return [path for _, path in own.values()] or found


def _results(checkpoint: Path, paths: Sequence[Path], repo: str) -> dict[str, EvaluationResult]:
    """By a name for the file. The model is named as it will be found."""
    results: dict[str, EvaluationResult] = {}
    digest = load_encoder(checkpoint).info.digest if paths else ""
    for path in paths:
        result = read_result(path)
        model = result.model.model_copy(update={"name": repo})
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", result.dataset.name).strip("-.") or "evaluation"
        if name in results:
            raise InputError(f"{path}: a second evaluation on {result.dataset.name}; choose one with --evaluation")
        # the message of an error can hold a path
        results[name] = result.model_copy(update={"model": model, "failed": dict.fromkeys(result.failed, "failed")})
        if result.model.digest != digest:
            raise InputError(
                f"{path}: of other weights ({result.model.name}, {result.model.digest}) than {checkpoint} ({digest}); "
                "evaluate this checkpoint, or name its evaluation with --evaluation"
            )
    return results


def describe(publication: Publication, to: Destination) -> str:
    """What was sent, or would be: for a reader."""
    licence = publication.licence
    clip = (
        f"no CLIPModel: {publication.model.no_clip_model}"
        if publication.model.clip_difference is None
        else f"CLIPModel, largest difference of a unit vector {publication.model.clip_difference:.1e}"
    )
    facts = [f"licence {licence.licence.id}. {' '.join(licence.reasons)}".rstrip(), clip]
    return describe_folder(publication.folder, publication.files, to, publication.url, facts)
