"""Licences of data as sources write them, what they allow, and the licence that weights trained on them take.

One table and pure functions. This is a careful reading of licence texts, and no legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from data_prep.errors import InputError


@dataclass(frozen=True)
class Licence:
    """What a licence allows of what it covers."""

    id: str  # of SPDX where that has one
    commercial: bool = True
    derivatives: bool = True  # altered or derived works may be shared
    share_alike: bool = False  # derived works keep the licence
    attribution: bool = True
    redistribution: bool = True
    url: str = ""

    @property
    def hub_id(self) -> str:
        """As the Hub's `license:` takes it; "other" for one that it does not list."""
        return self.id.lower() if self.id.lower() in _HUB_IDS else "other"


#: Those of the Hub's list that can come out here (https://huggingface.co/docs/hub/repositories-licenses).
_HUB_IDS = {
    *("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"),
    *("cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0"),
    *("cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
}

_CC0 = Licence("CC0-1.0", attribution=False, url="https://creativecommons.org/publicdomain/zero/1.0/")
_PUBLIC_DOMAIN = Licence("public-domain", attribution=False)
_APACHE = Licence("Apache-2.0", url="https://www.apache.org/licenses/LICENSE-2.0")
_MIT = Licence("MIT", url="https://opensource.org/license/mit")
_BSD = Licence("BSD-3-Clause", url="https://opensource.org/license/bsd-3-clause")
#: to be had on request, for research, and not to be passed on: DDI, PH2, SD-198, Dermofit
_RESEARCH = Licence("research-only", commercial=False, redistribution=False)

#: Other names, in the form that `_words` gives them. Creative Commons licences are read by `_creative_commons`.
_NAMES: dict[str, Licence] = {
    "cc0": _CC0,
    "cc 0": _CC0,
    "cc zero": _CC0,
    "cc0 1 0": _CC0,
    "cc 0 1 0": _CC0,
    "cc0 1 0 universal": _CC0,
    "creative commons zero": _CC0,
    "public domain": _PUBLIC_DOMAIN,
    "public domain mark": _PUBLIC_DOMAIN,
    "pdm": _PUBLIC_DOMAIN,
    "apache 2 0": _APACHE,
    "apache 2": _APACHE,
    "apache license 2 0": _APACHE,
    "apache license version 2 0": _APACHE,
    "mit": _MIT,
    "mit license": _MIT,
    "bsd 3 clause": _BSD,
    "research only": _RESEARCH,
    "research use only": _RESEARCH,
    "non commercial research only": _RESEARCH,
    "stanford university dataset research use agreement": _RESEARCH,
    "stanford research use agreement": _RESEARCH,
    "on request": _RESEARCH,
}

_CC_VERSIONS = ("1.0", "2.0", "2.5", "3.0", "4.0")
_CC_WORDS = {
    "by": "by",
    "attribution": "by",
    "nc": "nc",
    "noncommercial": "nc",
    "nd": "nd",
    "noderivatives": "nd",
    "noderivs": "nd",
    "sa": "sa",
    "sharealike": "sa",
}
_CC_COMBINATIONS = {("by",), ("by", "sa"), ("by", "nc"), ("by", "nd"), ("by", "nc", "sa"), ("by", "nc", "nd")}
#: national versions of 3.0 and before ("3.0 NZ"), whose terms are the same for us, and words without meaning here
_CC_FILLERS = {
    *("cc", "creative", "commons", "license", "licence", "international", "unported", "generic", "public"),
    *("deed", "legalcode", "en"),
    *("igo", "au", "at", "br", "ca", "ch", "de", "es", "fr", "it", "nl", "nz", "uk", "us"),
}


def find_licence(text: str) -> Licence | None:
    """The licence that a source names, however it spells it; None for one that the table does not know.

    "CC BY-NC 4.0", "cc_by_nc_4.0", "https://creativecommons.org/licenses/by-nc/4.0/" and "Creative Commons
    Attribution-NonCommercial 4.0 International" are one licence.
    """
    words = _words(text)
    if (known := _NAMES.get(words)) is not None:
        return known
    # a link is a licence only where nothing stands beside it that could take it back
    if link := re.fullmatch(rf"{_SITE} publicdomain (zero|mark)(?: 1 0)?(?: deed| legalcode)?(?: [a-z]{{2}})?", words):
        return _CC0 if link.group(1) == "zero" else _PUBLIC_DOMAIN
    return _creative_commons(words)


_SITE = "(?:https? )?(?:www )?creativecommons org"


def _words(text: str) -> str:
    text = text.lower().replace("non-commercial", "noncommercial").replace("share-alike", "sharealike")
    text = re.sub(r"no[ -]deriv(ative)?s?\b", "noderivatives", text)
    return " ".join(re.findall(r"[a-z0-9]+", text))


def _creative_commons(words: str) -> Licence | None:
    url = re.fullmatch(rf"{_SITE} licenses (.*)", words)
    words = f"cc {url.group(1)}" if url else words
    match = re.fullmatch(r"(?P<names>[a-z ]+?)(?: v?(?P<major>\d)(?: (?P<minor>\d))?(?P<rest>[a-z ]*))?", words)
    if match is None:
        return None
    names = [*match["names"].split(), *(match["rest"] or "").split()]
    if not names or (names[0] not in ("cc", "creative") and names[0] not in _CC_WORDS):
        return None
    if any(name not in _CC_WORDS and name not in _CC_FILLERS for name in names):
        return None
    version = f"{match['major']}.{match['minor'] or 0}" if match["major"] else ""
    parts = tuple(part for part in ("by", "nc", "sa", "nd") if part in {_CC_WORDS.get(name) for name in names})
    if parts not in _CC_COMBINATIONS or (version and version not in _CC_VERSIONS):
        return None
    return creative_commons(parts, version)


def creative_commons(parts: tuple[str, ...], version: str = "4.0") -> Licence:
    """The licence of these parts, as ("by", "nc", "sa")."""
    url = f"https://creativecommons.org/licenses/{'-'.join(parts)}/{version}/" if version else ""
    return Licence(
        "-".join(["CC", *(part.upper() for part in parts), *([version] if version else [])]),
        commercial="nc" not in parts,
        derivatives="nd" not in parts,
        share_alike="sa" in parts,
        url=url,
    )


# ------------------------------------------------------------------------------------------- the weights' licence


@dataclass(frozen=True)
class WeightsLicence:
    licence: Licence
    reasons: tuple[str, ...]  # why it is this one, plain sentences for the card


def weights_licence(
    counts: Mapping[str, int], given: str | None = None, allow_no_derivatives: bool = False
) -> WeightsLicence:
    """The least restrictive licence that respects the licences of the training samples.

    Non-commercial data makes non-commercial weights, share-alike is carried on, and attribution is kept.

    Args:
        counts: samples by licence, as in a manifest; samples without one stand under "unknown".
        given: a licence chosen by the publisher. Needed where a licence is unknown; never less strict than what the
            known ones ask for.
        allow_no_derivatives: publish although texts or images may not be altered and shared; the card says so.

    Raises InputError where nothing allows publishing without a decision of the publisher; the message names it.
    """
    found = {name: find_licence(name) for name, count in sorted(counts.items()) if count}
    if not found:
        raise InputError("training data: no sample has a licence; name the weights' own with --licence ID")
    chosen = None if given is None else find_licence(given)
    if given is not None and (chosen is None or not chosen.derivatives or not chosen.redistribution):
        raise InputError(
            f"--licence {given}: not a licence that weights can be published under; for example CC-BY-NC-4.0"
        )
    unknown = [name for name, licence in found.items() if licence is None]
    if unknown and chosen is None:
        raise InputError(
            f"training data: licences that are not known: {_listed(unknown, counts)}; ask the source what it allows, "
            "correct the data config, or take the responsibility and name the weights' licence with --licence ID"
        )
    known = [licence for licence in found.values() if licence is not None]
    fixed = [name for name, licence in found.items() if licence is not None and not licence.derivatives]
    if fixed and not allow_no_derivatives:
        raise InputError(
            f"training data: {_listed(fixed, counts)} allow no derivatives, and weights may be one; train without "
            "these samples, or publish all the same with --allow-no-derivatives"
        )
    kept = [name for name, licence in found.items() if licence is not None and not licence.redistribution]
    if kept and chosen is None:
        raise InputError(
            f"training data: {_listed(kept, counts)} may not be passed on, and whether weights may is for their source "
            "to say; ask it, and name the weights' licence with --licence ID"
        )
    needed = _needed(known)
    if chosen is None and isinstance(needed, str):
        raise InputError(f"training data: {needed}; train without one of them, or name a licence with --licence ID")
    licence = chosen or needed
    assert isinstance(licence, Licence)
    if chosen is not None:
        _check_strict_enough(chosen, known, needed)
    return WeightsLicence(licence, _reasons(found, counts, unknown, fixed, needed, chosen))


def _needed(known: list[Licence]) -> Licence | str:
    """The licence that the data's ask for, or why there is none."""
    commercial = all(licence.commercial for licence in known)
    sharing = sorted({licence.id for licence in known if licence.share_alike})
    if sharing:
        families = {licence.commercial for licence in known if licence.share_alike}
        if len(families) > 1 or (not commercial and families == {True}):
            return f"share-alike licences that exclude each other or non-commercial data ({', '.join(sharing)})"
        return creative_commons(("by", "sa") if commercial else ("by", "nc", "sa"))
    if not commercial:
        return creative_commons(("by", "nc"))
    if all(not licence.attribution or licence in (_APACHE, _MIT, _BSD) for licence in known):
        return _APACHE
    return creative_commons(("by",))


def _check_strict_enough(chosen: Licence, known: list[Licence], needed: Licence | str) -> None:
    """Also where share-alike licences exclude each other, and none is needed that all allow."""
    sharing = isinstance(needed, Licence) and needed.share_alike
    lacks = [
        name
        for name, is_lacking in {
            "non-commercial": chosen.commercial and any(not licence.commercial for licence in known),
            "share-alike": sharing and not chosen.share_alike,
            "attribution": not chosen.attribution and any(licence.attribution for licence in known),
        }.items()
        if is_lacking
    ]
    if lacks:
        asked = needed.id if isinstance(needed, Licence) else "more"
        raise InputError(
            f"--licence {chosen.id}: the training data asks for {asked} ({' and '.join(lacks)}); choose that, or "
            "one as strict"
        )


def _reasons(
    found: Mapping[str, Licence | None],
    counts: Mapping[str, int],
    unknown: list[str],
    fixed: list[str],
    needed: Licence | str,
    chosen: Licence | None,
) -> tuple[str, ...]:
    reasons = []
    not_commercial = [name for name, licence in found.items() if licence is not None and not licence.commercial]
    sharing = [name for name, licence in found.items() if licence is not None and licence.share_alike]
    if not_commercial:
        reasons.append(f"Non-commercial, because of {_listed(not_commercial, counts)}.")
    if sharing:
        reasons.append(f"Share-alike, because of {_listed(sharing, counts)}.")
    if unknown:
        reasons.append(f"Chosen by the publisher: the licence of {_listed(unknown, counts)} is not known.")
    elif isinstance(needed, str):
        reasons.append(f"Chosen by the publisher: {needed}.")
    elif chosen is not None and chosen != needed:
        reasons.append(f"Chosen by the publisher; the training data asks for {needed.id}.")
    if fixed:
        reasons.append(
            f"The publisher decided to publish although {_listed(fixed, counts)} allow no derivatives of the data."
        )
    return tuple(reasons)


def _listed(names: list[str], counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({counts[name]} samples)" for name in names)
