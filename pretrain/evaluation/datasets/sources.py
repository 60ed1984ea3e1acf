"""The records of each kind of source as items. Nothing is decoded, and no table is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import assert_never

from data_prep.config import Derm1MSource, WebDatasetSource
from data_prep.schema import Aspect, Sample
from data_prep.sources.base import ImageReference, Rejection, SourceRow
from data_prep.sources.derm1m import Derm1MRows
from data_prep.sources.folder import walk_images
from data_prep.sources.readers import check_table, read_records
from data_prep.sources.values import Tally, check_image_dir, is_utf8
from data_prep.sources.webdataset import WebDatasetRows
from pretrain.data.manifest import DamagedSample, ShardedDataset
from pretrain.evaluation.datasets.description import (
    Columns,
    Derm1MData,
    EvalDataConfig,
    FolderData,
    ShardsData,
    TableData,
    TarsData,
)
from pretrain.evaluation.datasets.files import ImageFiles, forget_listings, with_size
from pretrain.evaluation.datasets.values import Item, RecordReader, attributes_of

Items = Iterator[Item | Rejection]


def read_items(config: EvalDataConfig, hash_patient: Callable[[str], str], tally: Tally) -> Items:
    """Every record, in the source's order. Raises InputError for what is missing: table, column, folder."""
    forget_listings()  # files may have come since
    yield from _items(config, hash_patient, tally)
    forget_listings()


def _items(config: EvalDataConfig, hash_patient: Callable[[str], str], tally: Tally) -> Items:
    source = config.source
    match source:
        case TableData():
            yield from _table(source, RecordReader(config, source.columns, hash_patient, tally), tally)
        case FolderData():
            columns = Columns.model_validate({level: level for level in source.levels if level != "ignore"})
            yield from _folder(source, RecordReader(config, columns, hash_patient, tally))
        case TarsData():
            yield from _tars(source, RecordReader(config, source.columns, hash_patient, tally))
        case ShardsData():
            yield from _shards(source)
        case Derm1MData():
            yield from _derm1m(source, hash_patient)
        case _:
            assert_never(source)


def _table(source: TableData, reader: RecordReader, tally: Tally) -> Items:
    columns, path = source.columns, source.table_path
    wanted = {f"source.{use}": column for use, column in columns.named().items()}
    check_table(path, wanted, "source.table_path", source.fallback_encoding)
    files = ImageFiles(source.image_dir, source.images_by)
    assert columns.image is not None  # the description sees to it
    for found in read_records(path, wanted, source.fallback_encoding, tally, columns.of_lists()):
        if isinstance(found, Rejection):
            yield found
            continue
        row, record = found
        try:
            image = files.find(record[columns.image].strip())
        except LookupError as error:
            yield Rejection(path.name, row, columns.image, str(error))
            continue
        yield reader.item(row, path.name, image, record)


def _folder(source: FolderData, reader: RecordReader) -> Items:
    check_image_dir(source.image_dir, "source.image_dir")
    table, skipped = source.image_dir.resolve().name, Counter[str]()
    for row, (parts, reason) in enumerate(walk_images(source.image_dir, skipped), start=1):
        name = "/".join(parts)
        if reason is None and not is_utf8(name):
            reason = "a file or folder name that is not UTF-8"
        if reason is None and len(parts) <= len(source.levels):
            reason = "the file lies above the folders that source.levels names"
        if reason is not None:
            yield Rejection(table, row, "image", reason)
            continue
        record: dict[str, str] = {
            level: folder if level == "patient" else folder.replace("_", " ")
            for level, folder in zip(source.levels, parts, strict=False)
        }
        try:
            image = with_size(ImageReference(name, source.image_dir / name))
        except LookupError as error:
            yield Rejection(table, row, "image", str(error))
            continue
        yield reader.item(row, table, image, record)
    for what, num in skipped.items():
        reader.tally.counts[f"not looked at, {what}"] += num


def _tars(source: TarsData, reader: RecordReader) -> Items:
    keys = source.columns.named()
    tars = WebDatasetSource(
        tar_dir=source.tar_dir,
        pattern=source.pattern,
        caption_extension=source.caption_extension,
        extra_columns=keys,
    )
    for found in WebDatasetRows(tars, needs_caption=False).records(source.columns.of_lists()):
        if isinstance(found, Rejection):
            yield found
        else:
            texts = () if found.caption is None else (found.caption,)
            yield reader.item(found.row, found.table, found.image, found.values, texts)


def _shards(source: ShardsData) -> Items:
    data = ShardedDataset(source.path)
    for position in range(len(data)):
        path, row = data.shard_of(position), data.index[position]
        image = ImageReference(f"{path.name}/{position}", path, int(row["image_offset"]), int(row["image_num_bytes"]))
        try:
            sample = data.read_sample(position)
        except DamagedSample:
            yield Rejection(path.name, position + 1, "json", "damaged; run `dermvlp verify`")
            continue
        whole = next((caption.text for caption in sample.captions if caption.aspect is Aspect.CAPTION), None)
        item = _item_of(sample, position + 1, path, image, whole, sample.group)
        yield replace(item, key=sample.key)


def _derm1m(source: Derm1MData, hash_patient: Callable[[str], str]) -> Items:
    check_table(source.table_path, {}, "source.table_path")
    config = Derm1MSource(train_csv_path=source.table_path, image_dir=source.image_dir)
    for found in Derm1MRows(config, needs_caption=False).rows():
        if isinstance(found, Rejection):
            yield found
            continue
        try:
            image = with_size(found.image)
        except LookupError as error:
            yield Rejection(found.table, found.row, "filename", str(error))
            continue
        group = None if found.group is None else hash_patient(found.group)
        item = _item_of(found, found.row, source.table_path, image, found.caption, group)
        # "psoriasis, lichen planus" is no class
        yield item if item.label is None or "," not in item.label else replace(item, label=None)


def _item_of(
    record: Sample | SourceRow,
    row: int,
    path: Path,
    image: ImageReference,
    caption: str | None,
    patient: str | None,
) -> Item:
    return Item(
        row=row,
        table=path.name,
        image=image,
        label=None if record.diagnosis == "unknown" else record.diagnosis,
        texts=() if caption is None else (caption,),
        patient=patient,
        attributes=attributes_of(record.demographics, record.body_site, record.source),
        concept_names=record.concepts,
        diagnosis_path=record.diagnosis_path,
        licence=record.licence,
    )
