"""One row and its image to a `Sample`: captions of every aspect, groups hashed, nothing else of the row."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from data_prep.captions.decompose import Decomposer, make_decomposer
from data_prep.captions.describe import Describer, make_describer
from data_prep.captions.tokens import TokenCounter
from data_prep.config import PrepareConfig
from data_prep.labels.concepts import Concepts
from data_prep.labels.ontology import Ontology, concepts_caption, diagnosis_caption
from data_prep.salt import hash_group
from data_prep.schema import MAX_CAPTIONS, Aspect, Caption, Sample
from data_prep.sources.base import SourceRow


class RowRejectedError(Exception):
    """(field, reason): this row does not become a sample. Quotes nothing of the row: the ledger is shared."""


@dataclass
class Tools:
    """What turns rows into samples; the same in every process, built from the configuration."""

    config: PrepareConfig
    ontology: Ontology | None
    concepts: Concepts | None
    decomposer: Decomposer
    describer: Describer | None
    salt: str

    @property
    def name(self) -> str:
        """Of what wrote the captions: enters the manifest."""
        return self.decomposer.name if self.describer is None else f"{self.describer.name} {self.decomposer.name}"


@lru_cache(1)
def make_tools(config_json: str, ledger_path: Path, salt: str) -> Tools:
    """`ledger_path`: the SQLite file of the models' answers. Raises InputError for an ontology, a list of concepts or a
    prompt that cannot be used."""
    config = PrepareConfig.model_validate_json(config_json)
    return Tools(
        config,
        None if config.ontology_path is None else Ontology.load(config.ontology_path),
        None if config.concepts_path is None else Concepts.load(config.concepts_path),
        make_decomposer(config.decomposer, ledger_path, TokenCounter(config.tokenizer).fits),
        None if config.describer is None else make_describer(config.describer, ledger_path),
        salt,
    )


def whole_caption(row: SourceRow, image_sha256: str, tools: Tools) -> Caption:
    """The row's own caption, or the describer's report. Raises RowRejectedError where there is neither."""
    if row.caption is not None:
        return Caption(aspect=Aspect.CAPTION, text=row.caption, origin=row.caption_origin)
    if tools.describer is None:
        raise RowRejectedError("caption", "no caption, and no describer is configured")
    report = tools.describer.report(image_sha256, row.diagnosis)
    if isinstance(report, str):
        raise RowRejectedError("caption", f"no report by the model: {report}")
    return report


def make_sample(row: SourceRow, image_sha256: str, tools: Tools, notes: Counter[str]) -> tuple[Sample, str | None]:
    """The sample, and why the model could not split its caption where that failed.

    `notes` counts what was dropped or not found. Raises RowRejectedError.
    """
    config = tools.config
    caption = whole_caption(row, image_sha256, tools)
    by_source = {given.aspect for given in row.subcaptions}
    captions = [caption, *row.subcaptions]
    diagnosis_path = row.diagnosis_path if tools.ontology is None else tools.ontology.canonical_path(row.diagnosis_path)
    if row.diagnosis is not None:
        if not diagnosis_path and tools.ontology is not None:
            match = tools.ontology.find(row.diagnosis, config.ontology_min_similarity)
            diagnosis_path = () if match.node is None else tools.ontology.path(match.node)
            notes["diagnosis not in the ontology"] += int(not diagnosis_path)
        if Aspect.DIAGNOSIS not in by_source:
            text = diagnosis_caption(row.diagnosis, diagnosis_path)
            captions.append(Caption(aspect=Aspect.DIAGNOSIS, text=text, origin="ontology"))
    concepts = row.concepts
    if tools.concepts is not None:
        concepts = tuple(dict.fromkeys(tools.concepts.find(concept) or concept for concept in row.concepts))
    if Aspect.VISUAL_CONCEPTS not in by_source and (visual := concepts_caption(concepts)) is not None:
        captions.append(Caption(aspect=Aspect.VISUAL_CONCEPTS, text=visual, origin="concepts"))
    failure = None
    if not row.subcaptions:
        decomposition = tools.decomposer.decompose(caption.text)
        captions += decomposition.subcaptions
        notes.update(f"sub-caption dropped: {dropped.kind}" for dropped in decomposition.dropped)
        failure = decomposition.failure
        if failure is not None and config.decomposer.kind == "llm" and config.decomposer.on_failure == "reject":
            raise RowRejectedError("caption", f"not split by the model: {failure}")
    if len(captions) > MAX_CAPTIONS:
        notes["captions beyond the limit of a sample"] += len(captions) - MAX_CAPTIONS
        captions = captions[:MAX_CAPTIONS]
    try:
        sample = Sample(
            key=f"{config.name}-{row.row:09d}" if row.split is None else f"{config.name}-{row.split}-{row.row:09d}",
            captions=tuple(captions),
            diagnosis=row.diagnosis,
            diagnosis_path=diagnosis_path,
            concepts=concepts,
            body_site=row.body_site,
            demographics=row.demographics,
            modality=row.modality,
            group=None if row.group is None else hash_group(config.name, row.group, tools.salt),
            dataset=config.name,
            source=row.source,
            licence=row.licence,
            image_sha256=image_sha256,
        )
    except ValidationError as error:
        raise RowRejectedError(*_first_problem(error)) from None
    return sample, failure


def _first_problem(error: ValidationError) -> tuple[str, str]:
    problem = error.errors(include_url=False, include_input=False)[0]
    return ".".join([error.title.lower(), *map(str, problem["loc"])]), problem["msg"].removeprefix("Value error, ")
