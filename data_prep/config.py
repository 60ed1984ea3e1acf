"""What data preparation can be told: `PrepareConfig`, which `dermvlp prepare` reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, field_validator

from data_prep.schema import Frozen

# ---------------------------------------------------------------------------------------------- sources


class TableColumns(Frozen):
    """Which column of the table holds what. Only `image` is needed; `caption` or `caption_template` is too, unless a
    describer writes the captions."""

    image: str
    caption: str | None = None
    diagnosis: str | None = None
    concepts: str | None = None  # separated by commas or semicolons
    body_site: str | None = None
    age: str | None = None
    sex: str | None = None
    fitzpatrick: str | None = None
    modality: str | None = None
    group: str | None = None  # patient or lesion: never on both sides of a split; stored as a salted hash
    split: str | None = None
    source: str | None = None
    licence: str | None = None


class _Labelled(Frozen):
    """What sources with free labels share."""

    extra_columns: dict[str, str] = Field(
        default_factory=dict
    )  # name in templates -> column: for caption_template only
    #: Sentences with {field} places; a sentence with an absent field is left out. Used where there is no caption.
    caption_template: tuple[str, ...] = ()
    replace: dict[str, dict[str, str]] = Field(
        default_factory=dict
    )  # field -> value in the table -> value to use ("" = absent)
    #: Values that mean "not known", in any case, besides "", "unknown", "nan", "none", "n/a".
    absent: tuple[str, ...] = ()
    split_values: dict[str, Literal["train", "val"]] = Field(default={"train": "train", "val": "val"})
    licence: str | None = None  # where the table has no such column
    source: str | None = None  # where the table has no such column


class TableSource(_Labelled):
    """A table of images, labels and, perhaps, captions: .csv, .tsv, .parquet, .jsonl (by the file's ending)."""

    kind: Literal["table"] = "table"
    table_path: Path
    image_dir: Path
    #: Encoding of rows of a CSV that are not UTF-8; None: such rows are rejected.
    fallback_encoding: str | None = "cp1252"
    columns: TableColumns


class Derm1MSource(Frozen):
    """The published layout: `Derm1M_v2_pretrain.csv`, `Derm1M_v2_validation.csv`, image folders."""

    kind: Literal["derm1m"] = "derm1m"
    train_csv_path: Path
    val_csv_path: Path | None = None
    image_dir: Path
    fallback_encoding: str | None = "cp1252"
    licence: str = "CC-BY-NC-4.0"


class MakeSource(Frozen):
    """MAKE's table: sub-captions already made (`subcaption_1` ... `subcaption_8`), masks, further captions."""

    kind: Literal["make_csv"] = "make_csv"
    table_path: Path
    image_dir: Path
    path_prefix: str = "/VL_Data/"  # taken off the table's file names, which are absolute as published
    fallback_encoding: str | None = "cp1252"
    licence: str = "CC-BY-NC-4.0"


class FolderSource(_Labelled):
    """A tree of image folders whose names say something: `image_dir/LEVEL/.../file.jpg`."""

    kind: Literal["folder"] = "folder"
    image_dir: Path
    #: What the folders' names are, from the outermost; deeper folders are not told apart.
    levels: tuple[Literal["split", "diagnosis", "group", "source", "body_site", "ignore"], ...] = ("diagnosis",)


class WebDatasetSource(_Labelled):
    """Tars of samples (`KEY.jpg`, `KEY.txt`, `KEY.json`), read in place; our own shards too."""

    kind: Literal["webdataset"] = "webdataset"
    tar_dir: Path
    pattern: str = "*.tar"  # of file names in tar_dir
    image_extensions: tuple[str, ...] = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "gif", "bmp")
    caption_extension: str = "txt"
    #: Which key of KEY.json holds what ("a.b" reaches into objects); `image` and `caption` come from the members.
    columns: dict[str, str] = Field(default_factory=dict)
    #: KEY.json is a Sample of ours: all its fields and captions are taken over, and `columns` must be empty.
    json_is_sample: bool = False


class SyntheticSource(Frozen):
    """Procedurally drawn lesions and captions written from their attributes. Not medical data."""

    kind: Literal["synthetic"] = "synthetic"
    num_train: int = Field(default=2400, gt=0)
    num_val: int = Field(default=480, gt=0)
    image_px: int = Field(default=96, ge=32)
    seed: int = 0


SourceConfig = Annotated[
    TableSource | Derm1MSource | MakeSource | FolderSource | WebDatasetSource | SyntheticSource,
    Field(discriminator="kind"),
]


# ---------------------------------------------------------------------------------------------- stages


class RulesDecomposer(Frozen):
    """Sentences, clauses and clinical terms; no model, no network."""

    kind: Literal["rules"] = "rules"


class NoDecomposer(Frozen):
    """The whole caption only (sub-captions that a source brings are kept)."""

    kind: Literal["none"] = "none"


class Price(Frozen):
    """Of a model, in US dollars for a million tokens."""

    input_usd: float = Field(ge=0)
    output_usd: float = Field(ge=0)


class LLMOptions(Frozen):
    """Any OpenAI-compatible server. The key is read from the environment variable named here, never stored."""

    model_config = ConfigDict(hide_input_in_errors=True)  # a key written in the wrong place is not repeated

    model: str
    base_url: str | None = None  # None: OpenAI's own
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = Field(default=8, ge=1)  # calls in flight
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)  # prompt, estimated, plus max_output_tokens
    max_output_tokens: int = Field(default=800, ge=64)
    timeout_s: float = Field(default=60.0, gt=0)
    max_retries: int = Field(default=4, ge=0)  # the client's, for 429, 5xx and connection errors
    max_attempts: int = Field(default=2, ge=1)  # ours, for answers that cannot be used
    prices: dict[str, Price] = Field(default_factory=dict)  # model -> price, for estimate and max_usd
    #: Of all that this model is paid for one task in one out_dir, over all runs and parts. Stops cleanly before it is
    #: exceeded; needs a price of `model`.
    max_usd: float | None = Field(default=None, gt=0)
    batch_discount: float = Field(default=0.5, ge=0, le=1)  # of the price, in batch mode

    @field_validator("base_url")
    @classmethod
    def _no_password(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"https?://[^/?#@\s]+(?:[/?#].*)?", url):
            raise ValueError(
                "write it as http://host:port/v1, without user name or password, since it is written to files; "
                "give the key through api_key_env"
            )
        return url

    @field_validator("api_key_env")
    @classmethod
    def _variable_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError("not the name of an environment variable (a key itself is never written here)")
        return name

    def shared_by(self, num_jobs: int) -> Self:
        """The limits of one of several jobs that ask at once: together they keep to these. Money is shared where it is
        spent, by what is left of it."""
        rates = {"requests_per_minute": self.requests_per_minute, "tokens_per_minute": self.tokens_per_minute}
        return self.model_copy(update={name: rate and max(1, rate // num_jobs) for name, rate in rates.items()})


class LLMDecomposer(LLMOptions):
    """Sub-captions by a language model."""

    kind: Literal["llm"] = "llm"
    prompt: str = "decompose_v1"  # file in data_prep/captions/prompts/
    #: A caption that the model could not split gets the rules' sub-captions; or none, the whole caption alone; or its
    #: rows are rejected. In every case it is listed in the ledger of failures.
    on_failure: Literal["rules", "keep_whole", "reject"] = "rules"


class LLMDescriber(LLMOptions):
    """Reports of images without a caption, by a vision language model; the decomposer splits them into findings."""

    prompt: str = "describe_v1"
    give_diagnosis: bool = True  # the row's label is told to the model; False: withheld
    image_px: int = Field(default=512, ge=64)  # longer side of what is sent, at most
    detail: Literal["low", "high", "auto"] = "auto"
    #: The most tokens an image can take at this model: for limits of money and rate until answers tell. gpt-4o-mini
    #: takes up to about 8,500 at high detail.
    image_tokens: int = Field(default=9000, ge=1)


DecomposerConfig = Annotated[RulesDecomposer | NoDecomposer | LLMDecomposer, Field(discriminator="kind")]


class Tokenizer(Frozen):
    """Of the text tower to be trained: sub-captions must fit its context, and the report shows which captions do."""

    name: str = "clip"  # "clip", an open_clip model name, or hf:NAME_OR_FOLDER
    context_length: int = Field(default=77, ge=8)


class ImageOptions(Frozen):
    short_side_px: int = Field(default=224, ge=16)  # larger images are reduced to it; smaller ones are kept
    min_side_px: int = Field(default=32, ge=1)
    max_pixels: int = Field(
        default=100_000_000, gt=0, le=178_956_970
    )  # a decompression bomb is refused before it is decoded
    jpeg_quality: int = Field(default=92, ge=1, le=100)
    #: A valid JPEG that is small enough, upright and in sRGB keeps its compressed data; only metadata is taken out.
    keep_jpegs: bool = True


class EvaluationSet(Frozen):
    """Images that must not be in training: a folder of them (with all its subfolders), or a split made by `prepare`."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    path: Path


class DuplicateOptions(Frozen):
    """Exact copies have equal pixels; near copies have perceptual hashes (256 bits) at most `max_distance` apart."""

    max_distance: int = Field(default=24, ge=0, le=31)
    #: Copies of an image within the set, with other captions: all kept (on one side of a split), or the first alone.
    #: Equal pixels with an equal caption are one pair: the later ones are always rejected.
    within: Literal["keep", "drop"] = "keep"
    #: Training rows whose image or group is also in `val`, as published, or in an evaluation set.
    leakage: Literal["drop", "keep", "fail"] = "drop"
    against: tuple[EvaluationSet, ...] = ()

    @field_validator("against")
    @classmethod
    def _have_names_of_their_own(cls, against: tuple[EvaluationSet, ...]) -> tuple[EvaluationSet, ...]:
        if len({each.name for each in against}) < len(against):
            raise ValueError("two evaluation sets have the same name")
        return against


class PrepareConfig(Frozen):
    """`dermvlp prepare CONFIG`: from a source to shards."""

    name: str = Field(pattern=r"^[A-Za-z0-9_]+$")  # of the dataset; begins every sample's key
    source: SourceConfig
    ontology_path: Path | None = None  # disease hierarchy; None: the label alone is the diagnosis caption
    ontology_min_similarity: float = Field(default=0.88, gt=0, le=1)  # of a fuzzy match; 1: none
    concepts_path: Path | None = None  # {term: [synonym, ...]}: visual concepts are put into its terms
    describer: LLMDescriber | None = None  # writes captions for rows that have none
    decomposer: DecomposerConfig = RulesDecomposer()
    tokenizer: Tokenizer = Tokenizer()
    images: ImageOptions = ImageOptions()
    duplicates: DuplicateOptions = DuplicateOptions()
    val_fraction: float = Field(default=0.1, ge=0, lt=1)  # of rows, in whole groups; where the source has no split
    samples_per_shard: int = Field(default=1000, ge=1)
    images_per_chunk: int = Field(default=1000, ge=1)  # of the scan: what a killed scan can lose, by worker
    num_workers: int = Field(default=2, ge=1)
    out_dir: Path
