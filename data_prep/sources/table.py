"""A table of images and labels, read row by row: .csv, .tsv, .parquet or .jsonl."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_prep.config import MakeSource, TableSource
from data_prep.sources.base import Rejection, SourceRow
from data_prep.sources.labels import Labels
from data_prep.sources.readers import check_table, read_records
from data_prep.sources.values import Tally, check_image_dir, find_image


class OneTable(ABC):
    """A `Source` of one table and a folder of images; a subclass makes the rows of its records.

    Raises InputError when made, before any row, for a table, a column or a folder that is missing.
    """

    def __init__(self, config: TableSource | MakeSource, wanted: Mapping[str, str]) -> None:
        self.wanted = wanted  # use -> column
        self._path, self._encoding = config.table_path, config.fallback_encoding
        check_table(self._path, wanted, "source.table_path", self._encoding)
        check_image_dir(config.image_dir, "source.image_dir")
        self._warned = False

    @property
    def files(self) -> tuple[Path, ...]:
        return (self._path,)

    def rows(self) -> Iterator[SourceRow | Rejection]:
        tally = Tally(self._path.name)
        for record in read_records(self._path, self.wanted, self._encoding, tally):
            yield record if isinstance(record, Rejection) else self._row(*record, tally)
        if not self._warned:  # the table is read several times
            tally.warn()
            self._warned = True

    @abstractmethod
    def _row(self, row: int, record: Mapping[str, str], tally: Tally) -> SourceRow | Rejection: ...


class TableRows(OneTable):
    """The `Source` of a `TableSource`.

    Rows that name the same image are all yielded. `rows` raises InputError for a split value that the configuration
    does not name.
    """

    def __init__(self, config: TableSource, needs_caption: bool = True) -> None:
        self.config = config
        fields = {field: column for field, column in config.columns.model_dump().items() if column is not None}
        has_captions = config.columns.caption is not None
        self.labels = Labels(config, fields, "columns.", needs_caption, has_captions)
        wanted = {f"columns.{field}": column for field, column in fields.items()}
        wanted |= {f"extra_columns.{name}": column for name, column in config.extra_columns.items()}
        super().__init__(config, wanted)

    def _row(self, row: int, record: Mapping[str, str], tally: Tally) -> SourceRow | Rejection:
        columns, table = self.config.columns, self.config.table_path.name
        try:
            image = find_image(self.config.image_dir, record[columns.image].strip())
        except LookupError as error:
            return Rejection(table, row, columns.image, str(error))
        caption = record[columns.caption] if columns.caption else None
        return self.labels.row(row, table, image, record, tally, caption, f"column:{columns.caption}")
