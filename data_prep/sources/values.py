"""What the text of a field means: absent values, image paths, lists, ages, the person. One place for all sources."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path, PurePosixPath

from data_prep.errors import InputError
from data_prep.schema import Demographics
from data_prep.sources.base import ImageReference

logger = logging.getLogger(__name__)

#: Longer than any caption that was written as one; what is longer is a broken table or a whole document.
MAX_CAPTION_CHARS = 100_000

#: Case-folded. The sentences are what Derm1M and MAKE write where nothing is known.
_ABSENT = frozenset(
    {
        *("", "unknown", "nan", "none", "n/a"),
        *("no age information", "no gender information", "no body location information", "no symptom information"),
        *("no visual concepts", "no definitive diagnosis"),
    }
)


class Tally:
    """Counts what was repaired or left unused, for one warning at the end of a table.

    It names rows, never values: a shifted column could put a name anywhere.
    """

    def __init__(self, table: str) -> None:
        self.table = table
        self.counts: Counter[str] = Counter()
        self.first_row: dict[str, int] = {}

    def add(self, what: str, row: int) -> None:
        self.counts[what] += 1
        self.first_row.setdefault(what, row)

    def warn(self) -> None:
        if self.counts:
            listed = "; ".join(
                f"{what} in {num} row(s), the first is row {self.first_row[what]}" for what, num in self.counts.items()
            )
            logger.warning("%s: %s", self.table, listed)


# ---------------------------------------------------------------------------------------------- text


def absent_values(others: Iterable[str] = ()) -> frozenset[str]:
    """Case-folded texts that mean "not known": the usual ones, Derm1M's and MAKE's sentences, and `others`."""
    return _ABSENT | {" ".join(text.split()).casefold() for text in others}


def present(text: str, absent: frozenset[str] = _ABSENT) -> str | None:
    """The text with its white space collapsed; None where it is in `absent`, in any case."""
    text = " ".join(text.split())
    return None if text.casefold() in absent else text


NO_CAPTION = "no caption"
_WORD = re.compile(r"[^\W_]")


def why_no_caption(text: str | None) -> str | None:
    """None for a text that can be a caption, else the reason."""
    if text is None or not _WORD.search(text):
        return NO_CAPTION
    if len(text) > MAX_CAPTION_CHARS:
        return f"a caption of more than {MAX_CAPTION_CHARS:,} characters; check the table's quotation marks"
    return None


@lru_cache(maxsize=65536)
def lower_text(text: str) -> str | None:
    """`present`, lower-cased, for columns with few values."""
    found = present(text)
    return None if found is None else found.lower()


@lru_cache(maxsize=65536)
def split_list(text: str | None) -> tuple[str, ...]:
    """ "erythema, Scale; erythema" -> ("erythema", "scale")."""
    parts = (present(part) for part in re.split(r"[,;]", text or ""))
    return tuple(dict.fromkeys(part.lower() for part in parts if part))


# ---------------------------------------------------------------------------------------------- images


def find_image(image_dir: Path, written: str) -> ImageReference:
    """The image below `image_dir` that a table names. Raises LookupError with the reason where that is unusable.

    Only the text is looked at: asking the file system for each of a million files takes minutes on a cluster, and
    whether a file exists shows when it is read. Links inside the folder are the user's own and are followed.
    The reason does not repeat the path, which can hold a name or a record number; the row finds it.
    """
    name = written.replace("\\", "/")
    if not name:
        raise LookupError("no image path")
    if name[0] == "/" or (name[1:2] == ":" and name[0].isalpha()) or (".." in name and ".." in name.split("/")):
        raise LookupError("the image path leads out of the image folder")
    if "\0" in name or not is_utf8(name):
        raise LookupError("the image path holds characters that no file name has")
    if "//" in name or "./" in name or name[-1] in "/.":
        name = PurePosixPath(name).as_posix()  # "./a//b.jpg" is a/b.jpg: one image, one name
        if name == ".":
            raise LookupError("no image path")
    return ImageReference(name, Path(f"{image_dir}/{name}"))


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: lone surrogates stand for bytes that are no text."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_image_dir(path: Path, key: str) -> None:
    """Raise InputError unless the folder exists. `key` is its configuration key."""
    if not path.is_dir():
        raise InputError(f"{path}: no such image folder; correct {key}")


# ---------------------------------------------------------------------------------------------- the person

_AGE = re.compile(
    r"(\d{1,4}(?:[.,]\d+)?)(?:\s*-?\s*(?:(months?|mos?|weeks?|wks?|days?)|(?:years?|yrs?|y/?o?)\b\.?)(?:\s*-?\s*old)?)?"
)
_BAND = re.compile(r"(\d{1,2})\s*(?:[-\u2010-\u2014]|to)\s*(\d{1,3})\s*(?:years?|yrs?|y)?(?:\s*old)?")
_DECADE = re.compile(r"(\d0)'?s")
_OLDEST = re.compile(
    r"(?:90\s*(?:\+|and (?:more|over|older|above))|(?:>|>=|\u2265|over)\s*90)\s*(?:years?|yrs?|y)?(?:\s*old)?"
)
_UNITS_PER_YEAR = {"m": 12, "w": 52.18, "d": 365.25}
_TYPE = re.compile(r"(?:fitzpatrick\s*)?(?:skin\s*)?(?:type|fst)?\s*(?:([1-6])(?:\.0+)?|(vi|iv|v|i{1,3}))")
_ROMAN = {"i": 1, "ii": 2, "iii": 3, "iv": 4, "v": 5, "vi": 6}
_SEXES = {"m": "male", "man": "male", "boy": "male", "f": "female", "woman": "female", "girl": "female"} | {
    sex: sex for sex in ("male", "female", "intersex", "diverse", "other", "non-binary", "transgender")
}


def parse_age(text: str) -> tuple[float | None, str | None]:
    """Years and band of "45", "45 years", "6 months", "20-29", "30s", "90+".

    A number gives both, its decade as the band; a band gives no number. From 90 on there is one age, 90, and one band,
    "90+": so few people are older that the number would tell who it is. Raises ValueError for any other text.
    """
    text = text.casefold()
    if match := _AGE.fullmatch(text):
        years = float(match[1].replace(",", "."))
        if match[2]:
            years = round(years / _UNITS_PER_YEAR[match[2][0]], 2)
        if years > 120:
            raise ValueError("no age")
        return min(years, 90.0), age_band(years)
    if _OLDEST.fullmatch(text):
        return None, "90+"
    if match := _DECADE.fullmatch(text):
        return None, age_band(int(match[1]))
    match = _BAND.fullmatch(text)
    if match is None or not (low := int(match[1])) <= (high := int(match[2])) <= 120:
        raise ValueError("no age")
    if low >= 90:
        return None, "90+"
    if high > 99:
        raise ValueError("no age")
    return None, f"{low}-{high}"


def age_band(years: float) -> str:
    """The decade: "0-9", ..., "80-89", "90+"."""
    decade = int(years // 10) * 10
    return "90+" if decade >= 90 else f"{decade}-{decade + 9}"


@lru_cache(maxsize=65536)
def parse_person(age: str | None, sex: str | None, fitzpatrick: str | None) -> tuple[Demographics, tuple[str, ...]]:
    """What a row says of the person, and the fields whose value cannot be used and counts as absent.

    `sex` is one word of a short list, so that a shifted column cannot put a name into a shard, and "male, female"
    (several people) is none. `fitzpatrick` is 1 to 6 or I to VI.
    """
    unusable = []
    years, band, known_sex, skin_type = None, None, None, None
    if age is not None:
        try:
            years, band = parse_age(age)
        except ValueError:
            unusable.append("age")
    if sex is not None and (known_sex := _SEXES.get(sex.casefold())) is None:
        unusable.append("sex")
    if fitzpatrick is not None:
        if match := _TYPE.fullmatch(fitzpatrick.casefold()):
            skin_type = int(match[1]) if match[1] else _ROMAN[match[2]]
        else:
            unusable.append("fitzpatrick")
    return Demographics(age_years=years, age_band=band, sex=known_sex, fitzpatrick=skin_type), tuple(unusable)
