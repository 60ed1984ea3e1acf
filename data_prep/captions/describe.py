"""Reports of images that have a label and no caption, by a vision language model.

The report becomes the sample's caption, and the decomposer splits it as it does any other: with
`decomposer.prompt: findings_v1` into findings, one short phrase each. This is how WhyLesionCLIP's 56,590 images came to
438,000 findings (Yang et al., "A Textbook Remedy for Domain Shifts: Knowledge Priors for Medical Image Analysis",
NeurIPS 2024).
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.captions.answers import read_prompt, schema_violation
from data_prep.captions.ledger import Ledger
from data_prep.captions.tasks import Messages, hash_prompt, request_key
from data_prep.config import LLMDescriber
from data_prep.schema import Aspect, Caption

if TYPE_CHECKING:
    from data_prep.captions.asking import AskSummary

REPORT_SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {"report": {"type": "string"}},
    "required": ["report"],
    "additionalProperties": False,
}

#: Words. The prompt asks for at most 150; a report beyond the bound has run away.
MIN_WORDS, MAX_WORDS = 6, 250
#: Words besides the label's own and those that any report has: fewer, and it says no more than the label.
_MIN_NEW_WORDS = 4
_JPEG_QUALITY = 90


@dataclass(frozen=True)
class Undescribed:
    """An image to be described."""

    image_sha256: str  # names the image: two with the same are asked about once
    jpeg: Callable[[], bytes]  # without metadata, as it stands in the shard; called only when the question is written
    diagnosis: str | None


# ---------------------------------------------------------------------------------------------- question


class ReportTask:
    """The Task of asking for a report (see data_prep.captions.tasks). Raises InputError for an unknown prompt."""

    name = "report"
    schema: Mapping[str, object] = REPORT_SCHEMA

    def __init__(self, config: LLMDescriber) -> None:
        self._config = config
        self._prompt = read_prompt(config.prompt)
        self._prompt_hash = hash_prompt(self._prompt, REPORT_SCHEMA, str(config.image_px), config.detail)

    @property
    def options(self) -> LLMDescriber:
        return self._config

    @property
    def num_image_tokens(self) -> int:
        return self._config.image_tokens

    @property
    def prompt_hash(self) -> str:
        return self._prompt_hash

    def identity(self, item: Undescribed) -> str:
        return json.dumps([item.image_sha256, self._told(item)])

    def messages(self, item: Undescribed) -> Messages:
        return format_messages(
            reduce_jpeg(item.jpeg(), self._config.image_px), self._told(item), self._prompt, self._config.detail
        )

    def why_unusable(self, raw: str, item: Undescribed) -> str | None:
        read = parse_report(raw, self._told(item))
        return read.reason if isinstance(read, NoReport) else None

    def _told(self, item: Undescribed) -> str | None:
        return item.diagnosis if self._config.give_diagnosis else None


def format_messages(jpeg: bytes, diagnosis: str | None, prompt_text: str, detail: str) -> Messages:
    """The messages for one image. The label is untrusted text, so it is passed as a JSON string."""
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")
    return [
        {"role": "system", "content": prompt_text},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": json.dumps({"diagnosis": diagnosis}, ensure_ascii=False)},
                {"type": "image_url", "image_url": {"url": url, "detail": detail}},
            ],
        },
    ]


def reduce_jpeg(jpeg: bytes, longer_side_px: int) -> bytes:
    """The same bytes where the longer side is at most `longer_side_px`, else a smaller JPEG without metadata."""
    with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as image:
        if max(image.size) <= longer_side_px:
            return jpeg
        pixels = image.convert("RGB")
    scale = longer_side_px / max(pixels.size)
    size = (max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale)))
    reduced = pixels.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    buffer = io.BytesIO()
    # JPEG's writer takes comments from `info`, which the resized image has inherited
    Image.frombytes("RGB", reduced.size, reduced.tobytes()).save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------- answer


@dataclass(frozen=True)
class NoReport:
    """An answer that cannot be used, and why."""

    reason: str


class _ReportModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    report: str


_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_REFUSAL = re.compile(
    r"\b(?:I|we)\s*(?:'m|\u2019m|am|are)?\s*(?:sorry|unable|cannot|can['\u2019]?t|can\s+not|could\s+not|won['\u2019]t|apologi[sz]e)\b"
    r"|\bas\s+an?\s+(?:AI|artificial|language|assistant)\b|\bnot\s+able\s+to\s+(?:provide|assist|describe|analy[sz]e|view|see)\b"
    r"|\b(?:image|photo\w*)\s+(?:(?:was|is)\s+not|could\s+not\s+be|cannot\s+be)\s+(?:provided|visible|loaded|attached|seen)\b",
    re.IGNORECASE,
)
#: What no image shows, and a model that has read many case reports likes to add.
_INVENTED = re.compile(
    r"\b\d+\s*-?\s*(?:year|month|week|day)s?\s*-?\s*old\b"
    r"|\b(?:for|over|since|past|last)\s+(?:the\s+)?(?:(?:past|last)\s+)?(?:about\s+|several\s+|\w+\s+to\s+)?(?:\w+\s+)?"
    r"(?:days|weeks|months|years)\b"
    r"|\bhistory\s+of\b|\bpatient\s+(?:reports?|complains?|denies|states|presents?\s+with\s+a\s+history)\b",
    re.IGNORECASE,
)
_ADVICE = re.compile(
    r"\b(?:is|are|would\s+be)\s+(?:recommended|advised|warranted)\b|\b(?:I|we)\s+(?:recommend|advise|suggest)\b"
    r"|\bshould\s+(?:be\s+)?(?:consult|see|seek|treated|biopsied|excised|evaluated|referred)\w*\b|\bconsult\s+a\b",
    re.IGNORECASE,
)
#: Words that a report can have without having looked.
_COMMONPLACE = frozenset(
    word
    for line in (
        "a an the of in on at to for from with and or this that these those it its is are was were be as by there here",
        "image images photo photograph picture shows show showing displays depicts demonstrates presents appears can",
        "features feature findings finding consistent suggestive typical characteristic compatible classic appearance",
        "diagnosis diagnosed case example clinical dermoscopic dermatoscopic close-up closeup skin lesion lesions",
        "which condition disease patient seen visible known also called labelled labeled label",
    )
    for word in line.split()
)


def parse_report(raw: str, diagnosis: str | None) -> Caption | NoReport:
    """Check a model's answer; `diagnosis` is the label that the model was told, None where it was withheld.

    Unusable: not the schema, a refusal in words, fewer than `MIN_WORDS` or more than `MAX_WORDS` words, a report that
    only repeats the label, one with an age, a duration or a history, and one that gives advice.
    """
    try:
        text = " ".join(_ReportModel.model_validate_json(raw).report.split())
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        if problem["type"] == "json_invalid":
            return NoReport("malformed JSON")
        return NoReport(schema_violation(problem, {"report"}))
    reason = _why_no_report(text, diagnosis)
    return Caption(aspect=Aspect.CAPTION, text=text) if reason is None else NoReport(reason)


def _why_no_report(text: str, diagnosis: str | None) -> str | None:
    words = [word.casefold() for word in _WORD.findall(text)]
    if not words:
        return "empty report"
    if _REFUSAL.search(text):
        return "a refusal in words"
    if diagnosis is not None:
        told = {word.casefold() for word in _WORD.findall(diagnosis)}
        if len(set(words) - told - _COMMONPLACE) < _MIN_NEW_WORDS:
            return "only repeats the label"
    if len(words) < MIN_WORDS:
        return f"too short: fewer than {MIN_WORDS} words"
    if len(words) > MAX_WORDS:
        return f"too long: more than {MAX_WORDS} words"
    if _INVENTED.search(text):
        return "states an age, a duration or a history, which no image shows"
    if _ADVICE.search(text):
        return "gives advice"
    return None


# ---------------------------------------------------------------------------------------------- describer


class Describer:
    """`prepare` asks, `report` reads the ledger and needs no network. Build one in each process."""

    def __init__(self, config: LLMDescriber, ledger_path: Path) -> None:
        self.task = ReportTask(config)
        self._ledger_path = ledger_path
        self._ledger: Ledger | None = None

    @property
    def name(self) -> str:
        """`llm:<model>:<first 12 hexadecimal digits of the prompt's hash>`."""
        return f"llm:{self.task.options.model}:{self.task.prompt_hash[:12]}"

    @property
    def ledger(self) -> Ledger:
        if self._ledger is None:
            self._ledger = Ledger(self._ledger_path)
        return self._ledger

    def prepare(
        self,
        items: Iterable[Undescribed],
        *,
        retry_failed: bool = False,
        limit: int | None = None,
        max_usd: float | None = None,
    ) -> AskSummary:
        """Ask for every distinct image without a final answer; see data_prep.captions.asking.ask."""
        from data_prep.captions.asking import ask

        return ask(self.task, items, self.ledger, retry_failed=retry_failed, limit=limit, max_usd=max_usd)

    def report(self, image_sha256: str, diagnosis: str | None) -> Caption | str:
        """The report as a sample's caption, with its origin; or the reason why there is none."""
        item = Undescribed(image_sha256, _no_image, diagnosis)
        answer = self.ledger.get(request_key(self.task, self.task.identity(item)))
        if answer is None:
            return "the model was not asked for a report"
        if answer.status != "answered" or answer.raw is None:
            return answer.failure or "no usable answer"
        told = diagnosis if self.task.options.give_diagnosis else None
        read = parse_report(answer.raw, told)
        if isinstance(read, NoReport):  # was usable under the checks of an earlier version
            return read.reason
        return read.model_copy(update={"origin": f"{self.name}:{answer.answered_on}"})


def _no_image() -> bytes:
    raise AssertionError("an image is not needed to look up its report")


def make_describer(config: LLMDescriber, ledger_path: Path) -> Describer:
    """The describer that the configuration asks for; `ledger_path` is the SQLite file of the model's answers."""
    return Describer(config, ledger_path)
