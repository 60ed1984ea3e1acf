"""Where rows come from. `open_source(config)` yields `SourceRow`s; each module reads one kind of source."""

from data_prep.config import Derm1MSource, SourceConfig, TableSource
from data_prep.sources.base import Source
from data_prep.sources.derm1m import Derm1MRows
from data_prep.sources.synthetic import SyntheticRows
from data_prep.sources.table import TableRows

__all__ = ["open_source"]


def open_source(config: SourceConfig) -> Source:
    """The source that a configuration describes. Raises InputError for a missing table, column or image folder."""
    if isinstance(config, TableSource):
        return TableRows(config)
    if isinstance(config, Derm1MSource):
        return Derm1MRows(config)
    return SyntheticRows(config)
