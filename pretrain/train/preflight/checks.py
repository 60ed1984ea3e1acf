"""Everything that cannot work in a run, all of it at once, each with its key and its remedy.

Towers are built on the meta device and nothing is downloaded: what would have to be is named as not checked.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder

from data_prep.errors import InputError
from pretrain.config import TrainConfig
from pretrain.data.manifest import ShardedDataset, read_manifest
from pretrain.data.reader import check_enough_samples, check_shared_evenly
from pretrain.data.streaming import check_stream
from pretrain.data.tokenize import TextTokenizer
from pretrain.distributed import comm
from pretrain.distributed.engine_deepspeed import check_further_options
from pretrain.models.build import build_tokenizer, check_quick_gelu
from pretrain.models.open_clip_config import resolved_spec
from pretrain.models.weights import needs_download, weights_file
from pretrain.prompts import TEMPLATES_PATH, load_templates
from pretrain.train.checkpoint import find_resumable
from pretrain.train.preflight.towers import Towers, build_towers, is_at_hand, tower_weights
from pretrain.train.state import aspects_read, check_bucket_edges, check_soft_targets, num_parts, with_num_steps
from pretrain.train.trackers import check_trackers

_MAX_NAMES = 5  # of shards in a message


@dataclass
class Findings:
    """What was looked at on the way, for a plan to go on from, and what was found."""

    num_ranks: int
    problems: list[str] = field(default_factory=list)  # the run cannot work
    warnings: list[str] = field(default_factory=list)  # not on this machine, or not as one may think
    not_checked: list[str] = field(default_factory=list)  # would need a download
    data: ShardedDataset | None = None
    towers: Towers | None = None
    tokenizer: TextTokenizer | None = None
    context_length: int = 0
    config: TrainConfig | None = None  # with num_steps, where it can be told

    def refuse(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    def tried(self, check: Callable[[], object]) -> bool:
        """Whether a check passes; if not, its message is among the problems."""
        try:
            check()
        except InputError as error:
            self.refuse(str(error))
            return False
        return True

    def raise_if_any(self) -> None:
        if len(self.problems) == 1:
            raise InputError(self.problems[0])
        if self.problems:
            raise InputError(f"{len(self.problems)} problems:\n" + "\n".join(f"  - {text}" for text in self.problems))


def ranks_of(config: TrainConfig) -> int:
    """As the launcher says, or the config."""
    return comm.world_size() if "RANK" in os.environ else config.launch.num_ranks


def refuse_what_cannot_work(config: TrainConfig, num_ranks: int) -> None:
    """For the process that starts the ranks: one InputError with all problems; warnings go to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        found = check_run(config, num_ranks, Path(folder))
    found.raise_if_any()
    for warning in found.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def check_run(config: TrainConfig, num_ranks: int, folder: Path) -> Findings:
    """Looks at data, batch, towers, weights, tokenizer, trackers and run_dir, without stopping at the first problem.

    Args:
        folder: an empty one, to be kept as long as the findings are used.
    """
    found = Findings(num_ranks)
    _check_data(config, found)
    _check_batch(config, found)
    found.towers = build_towers(config, found.num_ranks, folder, found.refuse)
    _check_weights(config, found)
    _check_texts(config, found)
    _check_trackers(config, found)
    _check_run_dir(config, found)
    found.tried(lambda: check_soft_targets(config))
    found.tried(lambda: check_further_options(config.optimizer, config.engine))
    _check_device(config, found)
    return found


# ---------------------------------------------------------------------------------------------- data and batch


def _check_data(config: TrainConfig, found: Findings) -> None:
    found.data = _open_split(config.data.train_dir, "data.train_dir", found, with_tars=config.data.stream is None)
    if config.validation is not None:
        templates = config.validation.templates
        _open_split(config.validation.val_dir, "validation.val_dir", found)
        try:
            load_templates(TEMPLATES_PATH, templates)
        except InputError as error:
            found.refuse(f"validation.templates: {error}")
    if config.data.stream is not None and found.data is not None:
        data = found.data
        found.tried(lambda: check_stream(data, config.data, config.global_batch_size, found.num_ranks))


def _open_split(directory: Path, key: str, found: Findings, with_tars: bool = True) -> ShardedDataset | None:
    try:
        return ShardedDataset(directory, with_tars)
    except (InputError, OSError) as error:
        found.refuse(_bad_shards(directory, key) or f"{key}: {error}")
    return None


def _bad_shards(directory: Path, key: str) -> str:
    """All that are missing or short, where that is the trouble."""
    try:
        shards = read_manifest(directory).shards
    except (InputError, OSError):
        return ""
    paths = {shard.name: (directory / shard.name, shard.num_bytes) for shard in shards}
    bad = [name for name, (path, size) in paths.items() if not path.is_file() or path.stat().st_size != size]
    if len(bad) < 2:  # the data set's own message names the one
        return ""
    some = ", ".join(bad[:_MAX_NAMES]) + (" ..." if len(bad) > _MAX_NAMES else "")
    return (
        f"{key}: {directory}: {len(bad)} of {len(shards)} shards are missing or not of the size in manifest.json "
        f"({some}); run `dermvlp prepare` again"
    )


def _check_batch(config: TrainConfig, found: Findings) -> None:
    if found.tried(lambda: check_shared_evenly(config.global_batch_size, found.num_ranks)):
        found.tried(lambda: num_parts(config, found.num_ranks))
    found.config = config if config.num_steps is not None else None
    data = found.data
    if data is not None and found.tried(lambda: check_enough_samples(data, config.global_batch_size)):
        try:
            found.config = with_num_steps(config, found.num_ranks)
        except InputError as error:
            found.refuse(str(error))


# ---------------------------------------------------------------------------------------------- towers and texts


def _check_weights(config: TrainConfig, found: Findings) -> None:
    found.tried(lambda: check_quick_gelu(config.model))
    for key, source, name in tower_weights(config):
        if needs_download(source, name):
            found.not_checked.append(f"{key}: {source}: needs a download")
        else:
            found.tried(lambda: weights_file(source, f"{key}: {source}", name))  # noqa: B023 (called at once)
    try:
        text_cfg = resolved_spec(config.model).model_cfg["text_cfg"]
    except InputError:  # refused with the towers
        return
    own = str(text_cfg.get("hf_model_name") or "")
    if own and not is_at_hand(own):
        if config.model.pretrained is None and text_cfg.get("hf_model_pretrained", True):
            found.not_checked.append(f"model.name: the text tower's own weights, {own}: need a download")
        if found.towers is not None and not found.towers.knows_text:
            found.not_checked.append(f"model.name: the text tower {own} itself: needs a download; it is not counted")


def _check_texts(config: TrainConfig, found: Findings) -> None:
    """Context, bucket edges and tokenizer; of a run that reads no texts nothing."""
    if found.towers is None or not aspects_read(config):
        return
    text_cfg = resolved_spec(config.model).model_cfg["text_cfg"]
    context = int(text_cfg.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH))
    found.context_length = context
    if config.data.text_bucket_edges is not None:
        edges = config.data.text_bucket_edges
        found.tried(lambda: check_bucket_edges(edges, context))
    limit = _num_positions(found.towers) if found.towers.knows_text else None
    if limit is not None and context > limit:
        found.refuse(
            f"model.name: text_cfg.context_length {context} is over the text tower's {limit} positions; lower it in "
            f"{config.model.name}"
        )
    name = str(text_cfg.get("hf_tokenizer_name") or "")
    if name and not is_at_hand(name, "tokenizer_config.json"):
        found.not_checked.append(f"model.name: the tokenizer {name}: needs a download; tokens are not counted")
        return
    text_tower = found.towers.model.text
    try:
        found.tokenizer = build_tokenizer(config.model, text_tower)
    except InputError as error:
        found.refuse(str(error))
        return
    own_limit = found.tokenizer.max_length
    if not config.model.tiny and own_limit is not None and context > own_limit:
        found.refuse(
            f"model.name: text_cfg.context_length {context} is over the {own_limit} tokens of the tokenizer {name}; "
            f"lower it in {config.model.name}"
        )


def _num_positions(towers: Towers) -> int | None:
    """Of an HF text tower with learnt positions; open_clip's own are as many as the context."""
    text = towers.model.text
    if not isinstance(text, HFTextEncoder):
        return None
    positions = getattr(getattr(text.transformer, "embeddings", None), "position_embeddings", None)
    if positions is None:  # relative ones (T5)
        return None
    # RoBERTa's positions begin after the padding's
    offset = 0 if positions.padding_idx is None else int(positions.padding_idx) + 1
    return int(positions.num_embeddings) - offset


# ---------------------------------------------------------------------------------------------- around the run


def _check_trackers(config: TrainConfig, found: Findings) -> None:
    for name in config.trackers:
        found.tried(lambda: check_trackers([name]))  # noqa: B023 (called at once)


def _check_run_dir(config: TrainConfig, found: Findings) -> None:
    existing = next(path for path in (config.run_dir, *config.run_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        found.refuse(f"run_dir: {existing} is no folder that can be written to; choose another run_dir")
        return
    if found.data is None or found.config is None:
        return
    # the edges of the text buckets depend on the tokenizer: the ranks compare them
    data = found.data
    open_edges = found.config.model_copy(
        update={"data": found.config.data.model_copy(update={"text_bucket_edges": None})}
    )
    try:
        find_resumable(open_edges, data.digest)
    except InputError as error:
        found.refuse(f"run_dir: {error}")


def _check_device(config: TrainConfig, found: Findings) -> None:
    """Of this machine, which need not be the one that trains."""
    precision = config.engine.precision
    if not torch.cuda.is_available():
        if precision == "fp16":
            found.warnings.append("engine.precision: fp16 needs a GPU, of which this machine has none")
        return
    if precision == "bf16" and not torch.cuda.is_bf16_supported():
        found.warnings.append("engine.precision: this machine's GPU has no bf16; use fp16 or fp32 here")
    if "RANK" not in os.environ and found.num_ranks > torch.cuda.device_count():
        found.warnings.append(
            f"launch.num_ranks: {found.num_ranks} ranks and {torch.cuda.device_count()} GPU(s) on this machine"
        )
