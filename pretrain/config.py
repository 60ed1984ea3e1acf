"""Everything a training run can be told, typed, with its defaults: the one place to look them up.

A run is `TrainConfig`, read from YAML by `data_prep.config_file.load_config` with `key.path=value` overrides.
The resolved configuration is written to `RUN_DIR/config.yaml`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from data_prep.schema import SUBCAPTION_ASPECTS, Aspect, Frozen
from pretrain.deepspeed_options import refused_option

ALL_ASPECTS: tuple[Aspect, ...] = tuple(Aspect)

# ---------------------------------------------------------------------------------------------- data


class AugmentationConfig(Frozen):
    """Seeded by (seed, epoch, sample), so a sample's view does not depend on workers or ranks."""

    crop_scale_min: float = Field(default=0.6, gt=0, le=1)  # smallest share of the image's area in a random crop
    horizontal_flip: bool = True
    vertical_flip: bool = True  # lesions have no up or down
    color_jitter: float = Field(default=0.1, ge=0, le=1)  # brightness, contrast, saturation; hue a tenth of it


class StreamConfig(Frozen):
    """Shards read one after another through the webdataset library, where no random access is to be had.

    `data.train_dir` names a folder with copies of manifest.json and index.npy; the tars come from `url`. The order
    depends on the numbers of ranks and of reader processes (docs/reading.md).
    """

    #: `http://HOST/PATH/` in front of a shard's name, `pipe:aws s3 cp s3://BUCKET/PATH/{} -` with its name for {}, or
    #: a folder. It is written to config.yaml and to checkpoints: a command takes its keys from the environment
    url: str
    shuffle_buffer: PositiveInt = 2048  # encoded samples of one reader process

    @field_validator("url")
    @classmethod
    def _can_be_opened(cls, url: str) -> str:
        parts = urlsplit(url)
        if url.startswith("pipe:"):
            if url.count("{}") != 1:
                raise ValueError(f"{url!r}: a pipe needs one {{}}, where the shard's name goes")
        elif parts.scheme in ("http", "https"):
            if parts.username or parts.password:
                raise ValueError(
                    "a password in the url would stand in every log; use pipe: with a key file or variable"
                )
            if not url.endswith("/") or parts.query or parts.fragment:
                raise ValueError(
                    f"{url!r}: must end with /, as a shard's name follows; for a query use pipe:curl ...{{}}"
                )
        elif "://" in url:
            raise ValueError(f"{url!r}: no http, https or folder; use pipe:, for example `pipe:aws s3 cp {url}{{}} -`")
        return url


class DataConfig(Frozen):
    train_dir: Path  # folder with manifest.json
    num_workers: int = Field(default=1, ge=0)  # reader processes per rank; no effect on the sample order
    prefetch_batches: PositiveInt = 2  # by each reader process
    #: a folder on the node's own disk: train_dir is copied there first, once a node, and found again by later runs
    stage_dir: Path | None = None
    #: share of the distinct samples seen (taken as 10,000 or more) that may be damaged, and replaced (damaged.jsonl),
    #: before the run ends: 0.001 lets ten pass at any time, 0 none
    max_damaged_fraction: float = Field(default=0.001, ge=0, le=1)
    stream: StreamConfig | None = None  # None: random access by the manifest's offsets, exact resume
    shards_per_block: PositiveInt = 16  # how many shards a window of the shuffle spans
    augmentation: AugmentationConfig = AugmentationConfig()
    #: upper edges of the token-length buckets; None: those that pad the fewest tokens on a fixed sample of the data
    text_bucket_edges: tuple[PositiveInt, ...] | None = None
    num_text_buckets: PositiveInt = 8  # forwards of the text tower in a step; 4 pad a tenth more tokens

    @model_validator(mode="after")
    def _one_way_to_the_shards(self) -> Self:
        if self.stream is not None and self.stage_dir is not None:
            raise ValueError("stage_dir copies shards for random access, which stream does without; set one of them")
        return self


# ---------------------------------------------------------------------------------------------- model


class Weights(Frozen):
    """Published weights of one tower, from a file that holds tensors and nothing else."""

    #: a path, `package:NAME/file` (carried by an installed Python package) or `hf-hub:ORG/NAME/file`
    source: str
    key_map: Literal["none", "openai_clip", "hf_clip", "hf_siglip", "cae", "efficientnet_lite0"] = (
        "none"  # docs/weights.md
    )
    prefix: str = ""  # only the file's keys that begin so, with it cut off ("visual.", "encoder.")
    #: share of the tower's values that may stay random; a head that the file cannot have is not counted
    max_missing: float = Field(default=0.0, ge=0, le=1)


class TowerConfig(Frozen):
    """One tower's start and which of its layers learn, how fast."""

    weights: Weights | None = None
    #: all but the projection into the joint space
    frozen: bool = False
    #: the embeddings and the first n blocks (stages, of a convolutional tower) keep their weights
    freeze_layers: int = Field(default=0, ge=0)
    #: a layer's learning rate is lr x layer_decay ** (number of layers above it); 1: all alike
    layer_decay: float = Field(default=1.0, gt=0, le=1)


class ModelConfig(Frozen):
    """`name` is an open_clip model, a JSON file in its model-config form, `hf-hub:ORG/NAME` or `local-dir:FOLDER`.

    It names the architecture alone; weights come from `pretrained`, or tower by tower.
    """

    name: str
    #: whole-model weights: an open_clip tag of `name`, `hf-hub:ORG/NAME`, `local-dir:FOLDER`, or a file
    pretrained: str | None = None
    max_missing: float = Field(default=0.0, ge=0, le=1)  # of `pretrained`, as in `Weights`
    image_size: PositiveInt | None = None  # another resolution: position embeddings are interpolated
    image: TowerConfig = TowerConfig()
    text: TowerConfig = TowerConfig()
    #: running statistics instead of the batch's: the batch's would differ between ranks, and so would the loss
    freeze_batch_norm: bool = True
    init_logit_scale: PositiveFloat | None = None  # None: of the pretrained weights, or the model config, or 1 / 0.07
    max_logit_scale: PositiveFloat | None = 100.0  # None: no clamp (SigLIP)
    init_logit_bias: float | None = None  # None: of the pretrained weights, or the model config, or -10 (SigLIP)
    activation_checkpointing: bool = False  # blocks are computed again in the backward: less memory, a third more time
    #: towers of the same structure at a width of a few dozen and two layers, random: to try a recipe out
    tiny: bool = False

    @model_validator(mode="after")
    def _statistics_of_frozen_layers(self) -> Self:
        if self.image.freeze_layers and not self.freeze_batch_norm:
            raise ValueError("freeze_batch_norm: false would move the statistics of image.freeze_layers; keep it true")
        return self


# ---------------------------------------------------------------------------------------------- objectives


class DiagnosisWeights(Frozen):
    """w = softmax(cos(diagnosis, sub-caption) / temperature), largest = 1 (MAKE)."""

    temperature: PositiveFloat = 1.0


class OntologyTargets(Frozen):
    """The diagnosis text's loss L becomes (1 - alpha) L + alpha CE(q, batch's diagnosis texts) (after O-MAKE).

    q falls with the distance of two diagnoses in the hierarchy: q ~ exp(-edges / temperature).
    """

    alpha: float = Field(default=0.2, gt=0, le=1)
    temperature: PositiveFloat = 1.0


class _Objective(Frozen):
    weight: PositiveFloat = 1.0
    name: str = ""  # in logs; by default the kind. Two entries of one kind need names

    @property
    def label(self) -> str:
        return self.name or str(self.kind)  # type: ignore[attr-defined]

    @property
    def aspects_read(self) -> frozenset[Aspect]:
        """Of the texts whose features it needs: those it contrasts, and the diagnosis that weighs them."""
        guided = getattr(self, "diagnosis_weights", None) is not None
        return frozenset(getattr(self, "aspects", ())) | ({Aspect.DIAGNOSIS} if guided else frozenset())


class _Contrastive(_Objective):
    aspects: tuple[Aspect, ...] = Field(min_length=1)
    own_captions_as_negatives: bool = False
    ontology: OntologyTargets | None = None

    @model_validator(mode="after")
    def _ontology_has_diagnoses(self) -> Self:
        if self.ontology is not None and Aspect.DIAGNOSIS not in self.aspects:
            raise ValueError("ontology needs the aspect diagnosis among `aspects`")
        return self


class ClipObjective(_Contrastive):
    kind: Literal["clip"] = "clip"
    aspects: tuple[Aspect, ...] = Field(default=(Aspect.CAPTION,), min_length=1)


class MultiAspectObjective(_Contrastive):
    """Published as MKCL: every aspect of the image's knowledge, sub-captions weighted by the diagnosis."""

    kind: Literal["multi_aspect"] = "multi_aspect"
    aspects: tuple[Aspect, ...] = Field(default=ALL_ASPECTS, min_length=1)
    diagnosis_weights: DiagnosisWeights | None = DiagnosisWeights()


class SiglipObjective(_Objective):
    """Sigmoid of every image with every distinct text (Zhai et al. 2023)."""

    kind: Literal["siglip"] = "siglip"
    aspects: tuple[Aspect, ...] = Field(default=(Aspect.CAPTION,), min_length=1)


class LocalAlignmentObjective(_Objective):
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
    image_size: PositiveInt | None = None
    weights: Weights | None = None  # of its image tower
    tiny: bool = False


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


class MaskedLatentObjective(_Objective):
    kind: Literal["masked_latent"] = "masked_latent"
    #: the contrastive terms read the masked student's pass, so the whole image is never encoded by the student
    share_view: bool = False
    teacher: Annotated[FrozenTeacher | EmaTeacher, Field(discriminator="kind")] = EmaTeacher()
    mask: Annotated[BlockMask | RandomMask, Field(discriminator="kind")] = BlockMask()
    predictor_depth: PositiveInt = 4  # with the width, a sixteenth of a ViT-B/16's pass over the whole image
    predictor_width: PositiveInt = 384
    predictor_heads: PositiveInt = 6


ObjectiveConfig = Annotated[
    ClipObjective | MultiAspectObjective | SiglipObjective | LocalAlignmentObjective | MaskedLatentObjective,
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
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # fp16: DeepSpeed on a GPU
    zero_stage: Literal[0, 1, 2, 3] = 0  # DeepSpeed only
    offload_optimizer: Literal["none", "cpu"] = "none"  # DeepSpeed at ZeRO 1 or more: its states in the host's memory
    #: any further option of DeepSpeed's own dictionary; one that this config decides (batch, precision, ...) is refused
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    collective_timeout_minutes: PositiveFloat = 30.0  # a rank that waits longer for the others ends the run

    @model_validator(mode="after")
    def _masters_in_reach(self) -> EngineConfig:
        if self.kind == "deepspeed" and self.precision != "fp32" and self.zero_stage == 0:
            raise ValueError(f"{self.precision} needs zero_stage 1 or more: at 0 the fp32 masters are out of reach")
        return self

    @model_validator(mode="after")
    def _deepspeed_alone(self) -> EngineConfig:
        if self.kind == "torch":
            for name, is_set in {
                "precision: fp16": self.precision == "fp16",
                "offload_optimizer: cpu": self.offload_optimizer == "cpu",
                "deepspeed: options": bool(self.deepspeed),
            }.items():
                if is_set:
                    raise ValueError(f"{name} needs kind: deepspeed")
        if self.offload_optimizer == "cpu" and self.zero_stage == 0:
            raise ValueError("offload_optimizer: cpu needs zero_stage 1 or more")
        return self

    @model_validator(mode="after")
    def _deepspeed_options_are_further_ones(self) -> EngineConfig:
        """What DeepSpeed itself does not know is refused when the engine is built: its import takes seconds."""
        refusal = refused_option(self.deepspeed, offloads=self.offload_optimizer != "none")
        if refusal is not None:
            raise ValueError(refusal)
        return self


class LaunchConfig(Frozen):
    """`num_ranks` is for `dermvlp train`, which starts that many on each node; another launcher decides itself."""

    num_ranks: PositiveInt = 1
    threads_per_rank: PositiveInt | None = None  # CPU threads of torch; None: torch's own choice


class CheckpointConfig(Frozen):
    every: PositiveInt = 500  # steps; the last one is always saved
    every_minutes: PositiveFloat | None = 30.0  # since the last one, whatever the step; None: off
    keep_last: PositiveInt = 2
    keep_best: bool = True  # where there is validation
    best_by: Literal["loss", "retrieval", "zero_shot"] = "loss"  # lowest, or highest mean recall / balanced accuracy
    keep_every: PositiveInt | None = None  # steps; these are never removed


class ValidationConfig(Frozen):
    """Contrastive loss, retrieval and zero-shot on a held-out split, while training goes on.

    Every image once, in equal batches of at most `global_batch_size`; a few samples that fill none are left out.
    """

    val_dir: Path  # folder with manifest.json
    every: PositiveInt = 500  # steps; and after the last
    max_num_samples: PositiveInt | None = 2048  # evenly spaced over the split; None: all
    templates: str = "dermatology"  # list in configs/eval/templates.json


class BadStepConfig(Frozen):
    """A step whose loss is not finite, or a spike: named with its samples, then handled.

    `stop` ends the run. `skip` leaves the weights as they are and costs one wait for the device in every step.
    `rollback` goes back to the newest checkpoint before it and passes over its batch. Seen at the next logged step,
    but for `skip`, and before a checkpoint is written. All that was found is in RUN_DIR/bad_steps.jsonl.

    Gradients that are not finite are a bad step, too, though no reason to skip one: they are known after the update.
    """

    action: Literal["stop", "skip", "rollback"] = "stop"
    #: a loss above this multiple of the median of the last `window` good steps is a spike, once there are so many;
    #: None: only what is not finite is bad
    spike_factor: float | None = Field(default=None, gt=1)
    window: PositiveInt = 100
    max_num: PositiveInt = 10  # bad steps of a run before it ends all the same


class TrainConfig(Frozen):
    run_dir: Path
    seed: int = Field(default=0, ge=0)
    data: DataConfig
    model: ModelConfig
    objectives: tuple[ObjectiveConfig, ...] = Field(min_length=1)
    global_batch_size: PositiveInt
    #: images of one rank in one forward; fewer than its share: cached features, so every text stays a negative
    micro_batch_size: PositiveInt | None = None
    num_steps: PositiveInt | None = None  # either this or num_epochs
    num_epochs: PositiveInt | None = None  # turned into num_steps when the data is known
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    launch: LaunchConfig = LaunchConfig()
    log_every: PositiveInt = 10
    #: beside metrics.jsonl, which is always written; wandb and trackio are extras of the package
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig | None = None
    bad_steps: BadStepConfig = BadStepConfig()
    #: try a recipe out: tiny towers without weights, a small batch, two steps (see pretrain/trial.py)
    trial: bool = False

    @model_validator(mode="after")
    def _objectives_fit(self) -> TrainConfig:
        labels = [objective.label for objective in self.objectives]
        if len(set(labels)) != len(labels):
            raise ValueError(f"objectives: {labels} are not distinct; give entries of one kind a `name` each")
        kinds = [objective.kind for objective in self.objectives]
        for kind in ("siglip", "local_alignment", "masked_latent"):
            if kinds.count(kind) > 1:
                raise ValueError(f"objectives: {kind} can appear once")
        if "masked_latent" in kinds and self.model.image.frozen:
            raise ValueError(
                "objectives: masked_latent trains the image tower, and model.image.frozen keeps it as it is"
            )
        if self.model.init_logit_bias is not None and "siglip" not in kinds:
            raise ValueError("model.init_logit_bias: only siglip has a bias")
        if "siglip" in kinds and self.model.max_logit_scale is not None:
            raise ValueError("objectives: siglip is published without a clamp; set model.max_logit_scale: null")
        return self

    @model_validator(mode="after")
    def _length_is_known(self) -> TrainConfig:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("set one of num_steps and num_epochs")
        if self.num_steps is not None and self.optimizer.warmup_steps >= self.num_steps:
            raise ValueError("optimizer.warmup_steps must be smaller than num_steps")
        return self

    @property
    def steps(self) -> int:
        """`num_steps`, once the number of epochs has been turned into it (`train.state.with_num_steps`)."""
        assert self.num_steps is not None
        return self.num_steps
