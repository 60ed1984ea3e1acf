"""Captions into sub-captions without a model: sentences, then clauses, labelled by a lexicon of clinical terms.

A sentence is cut where a clause speaks of another aspect than the one before it; pieces are spans of the caption with
leading connectives and closing punctuation taken off. Cuts at a preposition are made only in descriptive text, never
where a negation reaches over them ("no lesions on the palms" stays whole).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from data_prep.captions.decompose import Decomposition, Dropped, Fits, fits_in_bytes, keep_fitting
from data_prep.captions.lexicon import STRENGTHS, label, score
from data_prep.schema import MAX_SUBCAPTIONS, SUBCAPTION_ASPECTS, Aspect, Caption

RULES_NAME = "rules-1"  # raise the number when rules or lexicon change what comes out

# ---------------------------------------------------------------------------------------------- sentences

_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|drs?|mrs?|ms|prof|figs?|no|vs|cf|approx|ca|et al|st|resp|incl|dept|spp?|var|ref)"
    r"|(?:^|[\s(])[A-Z])\.$",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(
    r"[.!?]+[\"'\u201d\u2019)\]]*\s+(?=[\"'\u201c\u2018(\[]*[A-Z0-9])"  # the ordinary end
    r"|(?<=[a-z)])[.!?](?=[A-Z][a-z])"  # the space was lost: "operation.The"
    r"|[\u3002\uff1b\uff01\uff1f]\s*"  # Chinese and Japanese
    r"|(?<=[a-z])\s+(?=(?:The|This|These|They)\s[a-z])"  # the full stop was lost
)
_BRACKETS = re.compile(r"\([^()]*\)|\[[^\[\]]*\]")
#: "(A)", "b)", "A-D:", "A.", "1)" at the beginning of a panel's legend
_PANEL = re.compile(
    r"(?:(?<=^)|(?<=[.;:,]\s))"
    r"(?:\([A-Ha-h1-9](?:[-\u2013,][A-Ha-h])?\)|[A-Ha-h1-9]\)|[A-H](?:-[A-H])?[.:]|[a-h]:)[.:]?\s+(?=[\"'\u201c]?[A-Z])"
)
_NOTHING_SAID = re.compile(
    r"(?:none|n/?a|unknown|not (?:available|applicable|specified|provided|mentioned))"
    r"|(?:there (?:is|was|are|were) )?no (?:[\w-]+ ){0,4}?(?:information|details?|description|definitive diagnosis)"
    r"(?: (?:is|was|are|were))?(?: (?:provided|available|given|mentioned))?(?: (?:in|about) .*)?"
    r"|the (?:user|poster|author|post|patient) (?:did|does) not (?:provide|mention|give|state|specify|include)\b[^,;]*"
    r"\b(?:information|details?|demographics)\b[^,;]*",
    re.IGNORECASE,
)


def says_nothing(text: str) -> bool:
    """Whether a text only says that something is not known ("no age information", "None")."""
    return _NOTHING_SAID.fullmatch(text.strip(" .,;:")) is not None


def _mask_brackets(text: str) -> str:
    """Same length, with what stands in brackets made opaque: nothing is cut inside them."""
    return _BRACKETS.sub(lambda match: "_" * len(match[0]) if len(match[0]) > 4 else match[0], text)


def sentences(caption: str) -> list[str]:
    """The caption's sentences and panel legends, in order, without the panels' letters."""
    text = " ".join(caption.split())
    found: list[str] = []
    for panel in _PANEL.split(text):
        masked, start = _mask_brackets(panel), 0
        for end in _SENTENCE_END.finditer(masked):
            head = masked[start : end.start() + 1]
            if end[0].startswith(".") and _ABBREVIATION.search(head):
                continue
            found.append(panel[start : end.end()])
            start = end.end()
        found.append(panel[start:])
    return [sentence.strip() for sentence in found if any(character.isalnum() for character in sentence)]


# ---------------------------------------------------------------------------------------------- clauses

_PEOPLE = (
    r"(?:man|woman|male|female|boy|girl|child|infant|neonate|newborn|toddler|adolescent|teenager|adult|lady|patient)s?"
)
_AUXILIARY = r"(?:is|are|was|were|can|may|might|could|should|must|will|has|have|had|does|do|did|requires?)"
_HEDGE = r"(?:(?:most|more|very)\s+)?(?:(?:often|\w+ly)\s+)?"
_PARTICIPLE = (
    r"(?:affecting|affects?|involving|seen|found|located|situated|occurring|appearing|locali[sz]ed|distributed|covering|"
    r"sparing|concentrated|indicating|suggesting|representing|revealing|showing|accompanied\s+by|associated\s+with|"
    r"followed\s+by|lasting|persisting|present\s+(?:for|since|on|over|in|at)|developing|developed|measuring|observed|"
    r"described|diagnosed|confirmed|treated|typical\s+of|reminiscent\s+of|resembling|resulting|leading|known\s+as|noted|"
    r"indicated\s+by|surrounded\s+by|requiring|recommending|necessitating|expected|emphasi[sz]ing)"
)
_CONCLUDES = r"(?:suggestive\s+of|consistent\s+with|indicative\s+of|compatible\s+with|diagnosed\s+(?:as|with))"
_BECAUSE = (
    r"(?:caused\s+by|due\s+to|triggered\s+by|induced\s+by|resulting\s+from|as\s+a\s+result\s+of|secondary\s+to|"
    r"because\s+of|linked\s+to|attributed\s+to)"
)
_SOME_TIME = r"(?:the\s+past\s+)?(?:\d|over|about|more|several|many|one|two|three|four|five|six)"
_COMES_WITH = (
    r"(?:presented|presenting|presents|suffering|diagnosed|suffers)\s+(?:with|as|from)\s+(?:complaints\s+of\s+)?"
)
_REPORTS = (
    r"(?:reports|reported|reporting|experiencing|experiences|describing|has\s+been\s+experiencing|complaining\s+of)\s+"
    r"(?:having\s+|that\s+)?"
)
_A_PERSON = rf"(?:(?:an?|the)\s+(?:[\w-]+\s+){{0,3}}?{_PEOPLE}\b|(?:an?\s+)?\d+[- ](?:year|month|week|day)|{_PEOPLE}\b)"
#: Where a sentence may be cut, by kind (see `_CUTS`). What a match consumes is taken off the right-hand piece.
_BOUNDARY = re.compile(
    rf"""
    (?P<clause>
        ;\s+ | :\s+ | \s[-\u2013\u2014]\s
      | ,?\s+(?:and\s+)?(?:(?:which|that)\s+)?(?:(?:is|are|was)\s+)?{_HEDGE}characteri[sz]ed\s+(?:\w+ly\s+)?by\s+
      | ,\s+(?:and\s+)?(?:which|who)\s+
            (?:(?:is|are|was|were)\s+(?={_HEDGE}(?:caused|due|triggered|{_PARTICIPLE})\b))?
      | ,\s+(?:but|while|whereas|although|though|yet|so)\s+
      | ,?\s+and\s+(?={_AUXILIARY}\s|discusses\s|includes?\s|seeking\s)
    )
  | (?P<statement>
        ,\s+(?:and\s+|with\s+)?(?!or\s|nor\s)(?=(?:[\w-]+\s+){{1,4}}{_AUXILIARY}\s)
      | ,\s+and\s+(?=(?:treatments?|management|the\s+\w+|its?|they|he|she|early)\s)
      | ,\s+(?:and\s+)?(?={_HEDGE}{_PARTICIPLE}\b)
      | ,\s+(?=(?:aged|despite|especially|particularly|possibly|thus)\s)
      | ,?\s+(?={_HEDGE}(?:{_CONCLUDES}|without\s+improvement)\b)
      | \s+(?=(?:indicating|suggesting|showing|revealing|captured\s+on|located|measuring|representing)\b)
    )
  | (?P<cause>
        ,?\s+(?={_HEDGE}{_BECAUSE}\b)
      | ,?\s+(?=(?:after|before|following|since|for\s+{_SOME_TIME})\b)
    )
  | (?P<finding>
        \s+(?:who\s+)?(?:has\s+been\s+|has\s+)?{_COMES_WITH}
      | \s+(?:who\s+)?{_REPORTS}
      | \s+who\s+
      | \s+(?:of|in)\s+(?={_A_PERSON})
      | ,?\s+(?:along\s+)?with\s+(?!each\b)
    )
  | (?P<place>
        ,?\s+(?=(?:all\s+)?
            (?:on|over|in|at|around|near|along|throughout|within|behind|above|below|under|beneath|across)\s)
    )
    """,
    re.VERBOSE,
)
_LEAD_IN = re.compile(
    r"(?:and\s+)?(?:this|the|these)\s+(?:image|photo|photograph|picture|figure|video|slide)s?\s+(?:(?:also\s+)?"
    r"(?:shows?|depicts?|describes?|displays?|illustrates?|highlights?|presents?|features?|discusses|reveals?)"
    r"(?:\s+that)?|is\s+about)\s+(?:an?\s+close-?\s?up\s+(?:(?:view|image|photo|picture)\s+)?of\s+)?"
    r"|(?:it|they)\s+(?:is|are|was|were)\s+(?:(?:often|\w+ly)\s+)?(?=(?:caused|characteri[sz]ed|triggered|treated)\b)"
    r"|(?:and|but|or|which|who|that|is|are|was|were|while|however|additionally|also|so|with)\s*,?\s+",
    re.IGNORECASE,
)
_DANGLING = re.compile(
    r"[\s,;:\u2013\u2014-]+(?:and|or|but|with|which|that|who|as|the|an?|of|in|on|is|are|was|were|to|by|also|while|both)?$",
    re.IGNORECASE,
)
_CLOSING_ABBREVIATION = re.compile(r"\b(?:etc|et al)\.$")
#: A piece that ends in one of these needs what follows.
_NEEDS_MORE = re.compile(
    r"\b(?:is|are|was|were|be|been|being|appears?|appeared|occurs?|occurred|located|situated|found|seen|observed|noted|"
    r"distributed|locali[sz]ed|spreads?|mainly|mostly|particularly|especially|commonly|predominantly|primarily|"
    r"present|presented|presenting|and|or|nor|of|to|the|an?|from|such as|like|including|involving|affecting|between|"
    r"numerous|filled|areas?|together|combined|associated|covered|similar|than|not|as|by|may|can|that|for|"
    r"patients?\s+indexed)$",
    re.IGNORECASE,
)
_NEGATION = re.compile(
    r"\b(?:no|not|without|never|nor|neither|denies|denied|absence|absent|lacks?|lacking|free of|sparing|spares?|non)\b",
    re.IGNORECASE,
)
_REPORTED = re.compile(
    r"\b(?:users?|discuss\w*|suggest\w*|mention\w*|considered|expressed|forum|diagnos[ei]\w*)\b", re.IGNORECASE
)
_FINDS = re.compile(r"\b(?:shows|showed|reveals|revealed)\b", re.IGNORECASE)
_ALL = frozenset(SUBCAPTION_ASPECTS)
_DESCRIPTIVE = _ALL - {Aspect.HISTORY, Aspect.MANAGEMENT, Aspect.OTHER}
#: kind of boundary -> aspects that may stand left and right of it
_CUTS: dict[str, tuple[frozenset[Aspect], frozenset[Aspect]]] = {
    "clause": (_ALL, _ALL),
    "statement": (_ALL, _ALL),
    "cause": (_DESCRIPTIVE, _ALL),
    "finding": (_DESCRIPTIVE, _ALL - {Aspect.MANAGEMENT}),
    "place": (_DESCRIPTIVE, _DESCRIPTIVE - {Aspect.MORPHOLOGY, Aspect.SYMPTOMS}),
}

_WEAK = ("finding", "place")

#: too little to be a piece: one word, or auxiliaries and adverbs only
_EMPTY = re.compile(rf"\s*(?:[^\s]+|(?:(?:{_AUXILIARY}|be|been|also|often|not|it|they|\w+ly)\s*)+)?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class _Clause:
    """A span of `sentence`; `mark` is the length of the connective to take off when the span begins a piece."""

    sentence: str
    start: int
    mark: int
    end: int
    kind: str  # of the boundary before it

    @property
    def text(self) -> str:
        return self.sentence[self.start + self.mark : self.end]

    @property
    def aspect(self) -> Aspect:
        return label(self.text)

    def joined(self, following: _Clause) -> _Clause:
        return _Clause(self.sentence, self.start, self.mark, following.end, self.kind)


def _raw_clauses(sentence: str) -> list[_Clause]:
    """The sentence at all its boundaries, except those that would leave next to nothing behind them."""
    found: list[_Clause] = []
    start, mark, kind = 0, 0, "clause"
    for boundary in _BOUNDARY.finditer(_mask_brackets(sentence)):
        next_kind = boundary.lastgroup or "clause"
        if _EMPTY.fullmatch(sentence[start + mark : boundary.start()]):
            if not found or kind not in _WEAK or next_kind in _WEAK:
                continue
            # the weaker boundary of the two goes
            undone = found.pop()
            start, mark, kind = undone.start, undone.mark, undone.kind
        found.append(_Clause(sentence, start, mark, boundary.start(), kind))
        start, mark, kind = boundary.start(), boundary.end() - boundary.start(), next_kind
    found.append(_Clause(sentence, start, mark, len(sentence), kind))
    return found


def _separate(left: _Clause, right: _Clause) -> bool:
    """Whether two neighbours are two statements; otherwise they stay one piece."""
    left_text = left.text.rstrip(" ,;:")
    if len(left_text.split()) < 2 or len(right.text.split()) < 2 or _NEEDS_MORE.search(left_text):
        return False
    if left.aspect is right.aspect or Aspect.OTHER in (left.aspect, right.aspect):
        return False
    left_allowed, right_allowed = _CUTS[right.kind]
    if left.aspect not in left_allowed or right.aspect not in right_allowed:
        return False
    if right.kind == "clause":
        return True
    if _NEGATION.search(left_text):  # it may reach over the cut
        return False
    if right.kind == "cause" and _FINDS.search(right.text):  # "before surgery showed"
        return False
    if right.kind == "cause" and _REPORTED.search(left_text):  # what is caused is the opinion, not the finding
        return False
    return right.kind == "statement" or score(left.text)[1] >= STRENGTHS["term"]


def clauses(sentence: str) -> list[_Clause]:
    """Pieces of one sentence, neighbours of the same aspect joined."""
    pieces: list[_Clause] = []
    for clause in _raw_clauses(sentence):
        if pieces and not _separate(pieces[-1], clause):
            pieces[-1] = pieces[-1].joined(clause)
        else:
            pieces.append(clause)
    return pieces


def _tidy(text: str) -> str:
    """Without lead-in, dangling connectives and closing punctuation; first letter a capital."""
    text = text.strip(" \t,;:\u2013\u2014-")
    trimmed = _LEAD_IN.sub("", text, count=1) if _LEAD_IN.match(text) else text
    if len(trimmed.split()) >= 2:
        text = trimmed
    text = text.rstrip(".,;: \u3002") if not _CLOSING_ABBREVIATION.search(text) else text
    shorter = _DANGLING.sub("", text)
    text = shorter if len(shorter.split()) >= 2 else text
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------------------------------------- captions


def _worth_keeping(pieces: list[_Clause]) -> tuple[list[_Clause], list[Dropped]]:
    """Without pieces that have no words, say nothing, or repeat an earlier one; the latter two are reported."""
    kept: list[_Clause] = []
    dropped: list[Dropped] = []
    seen: set[str] = set()
    for piece in pieces:
        text = _tidy(piece.text)
        if not any(character.isalnum() for character in text):
            continue
        if says_nothing(text):
            dropped.append(Dropped(text, label(text), "says only that something is not known"))
        elif text.casefold() in seen:
            dropped.append(Dropped(text, label(text), "repeated"))
        else:
            seen.add(text.casefold())
            kept.append(piece)
    return kept, dropped


def _fit(pieces: list[_Clause], num_places: int) -> list[_Clause]:
    """Join the shortest neighbours of one sentence until there is room for all, or no neighbours are left."""
    pieces = list(pieces)
    while len(pieces) > num_places:
        pairs = [
            i
            for i, (left, right) in enumerate(pairwise(pieces))
            if left.sentence is right.sentence and left.end == right.start
        ]
        if not pairs:
            break
        best = min(pairs, key=lambda i: pieces[i + 1].end - pieces[i].start)
        pieces[best : best + 2] = [pieces[best].joined(pieces[best + 1])]
    return pieces


def _leave_out(captions: list[Caption], num_places: int) -> tuple[list[Caption], list[Caption]]:
    """Kept and left out, both in order: OTHER goes first, then the last ones of the commonest aspect."""
    kept = list(captions)
    while len(kept) > num_places:
        counts = Counter(caption.aspect for caption in kept)
        kept.pop(max(range(len(kept)), key=lambda i: (kept[i].aspect is Aspect.OTHER, counts[kept[i].aspect], i)))
    return kept, [caption for caption in captions if caption not in kept]


def split(caption: str) -> Decomposition:
    """Split a caption into at most `MAX_SUBCAPTIONS` labelled spans.

    Spans that say nothing or repeat another, and those beyond the limit, are reported in `dropped`. An empty
    caption gives none.
    """
    pieces, dropped = _worth_keeping([piece for sentence in sentences(caption) for piece in clauses(sentence)])
    texts = [_tidy(piece.text) for piece in _fit(pieces, MAX_SUBCAPTIONS)]
    kept, left_out = _leave_out(
        [Caption(aspect=label(text), text=text, origin=RULES_NAME) for text in texts], MAX_SUBCAPTIONS
    )
    dropped += [Dropped(c.text, c.aspect, f"more than {MAX_SUBCAPTIONS} sub-captions") for c in left_out]
    return Decomposition(tuple(kept), tuple(dropped), made_by="rules")


class RuleSplitter:
    """The Decomposer without a model."""

    name = RULES_NAME

    def __init__(self, fits: Fits = fits_in_bytes) -> None:
        self._fits = fits

    def decompose(self, caption: str) -> Decomposition:
        return keep_fitting(split(caption), self._fits)
