"""Where rows come from. `open_source(config)` yields `SourceRow`s; each module reads one kind of source."""

from data_prep.config import (
    Derm1MSource,
    FolderSource,
    MakeSource,
    SourceConfig,
    TableSource,
    WebDatasetSource,
)
from data_prep.sources.base import Source
from data_prep.sources.derm1m import Derm1MRows
from data_prep.sources.folder import FolderRows
from data_prep.sources.make_csv import MakeRows
from data_prep.sources.synthetic import SyntheticRows
from data_prep.sources.table import TableRows
from data_prep.sources.webdataset import WebDatasetRows

__all__ = ["open_source"]


def open_source(config: SourceConfig, needs_caption: bool = True) -> Source:
    """The source that a configuration describes. Raises InputError for a missing table, column, tar or image folder.

    A row without a caption is rejected; with `needs_caption` False (a describer will write it) its caption is None.
    """
    if isinstance(config, TableSource):
        return TableRows(config, needs_caption)
    if isinstance(config, Derm1MSource):
        return Derm1MRows(config, needs_caption)
    if isinstance(config, MakeSource):
        return MakeRows(config, needs_caption)
    if isinstance(config, FolderSource):
        return FolderRows(config, needs_caption)
    if isinstance(config, WebDatasetSource):
        return WebDatasetRows(config, needs_caption)
    return SyntheticRows(config)
