"""The table of licences, as sources spell them, and what they make of the weights."""

from __future__ import annotations

import pytest

from data_prep.errors import InputError
from pretrain.publish.licences import find_licence, weights_licence

# spelling -> (id, commercial, derivatives, share-alike, what the Hub calls it)
SPELLINGS = {
    "CC-BY-NC-4.0": ("CC-BY-NC-4.0", False, True, False, "cc-by-nc-4.0"),  # Derm1M, HAM10000
    "cc-by-nc-4.0": ("CC-BY-NC-4.0", False, True, False, "cc-by-nc-4.0"),
    "CC BY-NC 4.0": ("CC-BY-NC-4.0", False, True, False, "cc-by-nc-4.0"),
    "cc_by_nc_4.0": ("CC-BY-NC-4.0", False, True, False, "cc-by-nc-4.0"),
    " Attribution-NonCommercial 4.0 International ": ("CC-BY-NC-4.0", False, True, False, "cc-by-nc-4.0"),
    "Creative Commons Attribution-NonCommercial 4.0 International Public License": (
        *("CC-BY-NC-4.0", False, True, False, "cc-by-nc-4.0"),
    ),
    "https://creativecommons.org/licenses/by-nc/4.0/": ("CC-BY-NC-4.0", False, True, False, "cc-by-nc-4.0"),
    "https://creativecommons.org/licenses/by-nc/4.0/legalcode.en": (
        *("CC-BY-NC-4.0", False, True, False, "cc-by-nc-4.0"),
    ),
    "CC BY 4": ("CC-BY-4.0", True, True, False, "cc-by-4.0"),
    "CC-BY-4.0": ("CC-BY-4.0", True, True, False, "cc-by-4.0"),  # PAD-UFES-20
    "CC BY-NC-SA 3.0": ("CC-BY-NC-SA-3.0", False, True, True, "cc-by-nc-sa-3.0"),  # Fitzpatrick17k
    "CC BY-SA 4.0": ("CC-BY-SA-4.0", True, True, True, "cc-by-sa-4.0"),
    "CC BY-NC-ND 3.0 NZ": ("CC-BY-NC-ND-3.0", False, False, False, "cc-by-nc-nd-3.0"),  # DermNet
    "CC BY-NC-ND": ("CC-BY-NC-ND", False, False, False, "other"),  # PubMed Central writes no version
    "Attribution-NonCommercial-NoDerivs 2.0": ("CC-BY-NC-ND-2.0", False, False, False, "other"),
    "CC-0": ("CC0-1.0", True, True, False, "cc0-1.0"),  # ISIC archive
    "CC0": ("CC0-1.0", True, True, False, "cc0-1.0"),
    "CC0-1.0": ("CC0-1.0", True, True, False, "cc0-1.0"),
    "CC-BY": ("CC-BY", True, True, False, "other"),  # ISIC archive
    "CC-BY-NC": ("CC-BY-NC", False, True, False, "other"),  # ISIC archive
    "https://creativecommons.org/publicdomain/zero/1.0/": ("CC0-1.0", True, True, False, "cc0-1.0"),
    "Public Domain": ("public-domain", True, True, False, "other"),
    "Apache-2.0": ("Apache-2.0", True, True, False, "apache-2.0"),
    "Apache License, Version 2.0": ("Apache-2.0", True, True, False, "apache-2.0"),
    "MIT License": ("MIT", True, True, False, "mit"),
    "research only": ("research-only", False, True, False, "other"),
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_licence_is_found_however_it_is_spelt(text: str) -> None:
    licence = find_licence(text)
    assert licence is not None
    found = (licence.id, licence.commercial, licence.derivatives, licence.share_alike, licence.hub_id)
    assert found == SPELLINGS[text]


@pytest.mark.parametrize(
    "text",
    [
        *("", "unknown", "see website", "all rights reserved", "by request", "Attribution required, ask us"),
        *("CC BY-ND-SA 4.0", "CC NC 4.0", "CC BY 9.0", "CC BY-XX 4.0", "CC BY 4.0 or CC BY-NC 4.0"),
    ],
)
def test_what_the_table_does_not_know_is_unknown(text: str) -> None:
    assert find_licence(text) is None


# licences of the data -> of the weights
DERIVED = [
    (("Apache-2.0",), "Apache-2.0"),
    (("CC0", "MIT"), "Apache-2.0"),
    (("CC0", "CC BY 4.0"), "CC-BY-4.0"),
    (("CC BY 4.0", "CC-BY-NC-4.0"), "CC-BY-NC-4.0"),
    (("CC BY 4.0", "CC BY-SA 4.0"), "CC-BY-SA-4.0"),
    (("CC BY-NC 4.0", "CC BY-NC-SA 3.0"), "CC-BY-NC-SA-4.0"),
    (("CC BY-NC-SA 3.0", "CC0"), "CC-BY-NC-SA-4.0"),
]


@pytest.mark.parametrize(("data", "weights"), DERIVED)
def test_the_weights_licence_is_derived(data: tuple[str, ...], weights: str) -> None:
    chosen = weights_licence(dict.fromkeys(data, 5))
    assert chosen.licence.id == weights
    assert chosen.licence.commercial == ("NC" not in weights)


def test_reasons_name_licences_and_counts() -> None:
    chosen = weights_licence({"CC BY 4.0": 909, "CC-BY-NC-4.0": 2961})
    assert chosen.reasons == ("Non-commercial, because of CC-BY-NC-4.0 (2961 samples).",)
    assert weights_licence({"CC BY 4.0": 1, "CC-BY-NC-4.0": 0}).reasons == ()  # no sample has it


def test_no_derivatives_refuses_without_an_override() -> None:
    counts = {"CC BY-NC-ND 4.0": 3, "CC BY 4.0": 7}
    with pytest.raises(InputError, match=r"CC BY-NC-ND 4.0 \(3 samples\).*--allow-no-derivatives"):
        weights_licence(counts)
    with pytest.raises(InputError, match="--allow-no-derivatives"):
        weights_licence(counts, given="CC-BY-NC-4.0")  # a licence is no override
    chosen = weights_licence(counts, allow_no_derivatives=True)
    assert chosen.licence.id == "CC-BY-NC-4.0"
    assert any("although CC BY-NC-ND 4.0 (3 samples) allow no derivatives" in reason for reason in chosen.reasons)


def test_an_unknown_licence_refuses_without_one_given() -> None:
    counts = {"unknown": 2, "CC BY-NC 4.0": 1}
    with pytest.raises(InputError, match=r"unknown \(2 samples\).*--licence ID"):
        weights_licence(counts)
    chosen = weights_licence(counts, given="cc by-nc 4.0")
    assert chosen.licence.id == "CC-BY-NC-4.0"
    assert "Chosen by the publisher: the licence of unknown (2 samples) is not known." in chosen.reasons
    with pytest.raises(InputError, match="no sample has a licence"):
        weights_licence({})


@pytest.mark.parametrize(
    ("data", "given", "lacks"),
    [
        ("CC BY-NC 4.0", "MIT", "non-commercial"),
        ("CC BY-NC-SA 4.0", "CC BY-NC 4.0", "share-alike"),
        ("CC BY 4.0", "CC0", "attribution"),
    ],
)
def test_a_given_licence_is_never_less_strict(data: str, given: str, lacks: str) -> None:
    with pytest.raises(InputError, match=lacks):
        weights_licence({data: 1}, given=given)


def test_a_stricter_licence_can_be_given_and_the_card_says_so() -> None:
    chosen = weights_licence({"Apache-2.0": 4}, given="CC BY-NC-SA 4.0")
    assert chosen.licence.id == "CC-BY-NC-SA-4.0"
    assert chosen.reasons == ("Chosen by the publisher; the training data asks for Apache-2.0.",)


@pytest.mark.parametrize("given", ["mine", "CC BY-ND 4.0", "research only"])
def test_what_is_no_licence_for_weights_is_refused(given: str) -> None:
    with pytest.raises(InputError, match=f"--licence {given}"):
        weights_licence({"Apache-2.0": 1}, given=given)


def test_data_that_may_not_be_passed_on_needs_a_decision() -> None:
    counts = {"research only": 5, "Apache-2.0": 4}
    with pytest.raises(InputError, match=r"research only \(5 samples\) may not be passed on.*--licence ID"):
        weights_licence(counts)
    assert weights_licence(counts, given="CC BY-NC 4.0").licence.id == "CC-BY-NC-4.0"
    with pytest.raises(InputError, match="non-commercial"):
        weights_licence(counts, given="CC BY 4.0")


@pytest.mark.parametrize(
    ("counts", "given"),
    [
        ({"CC BY-SA 4.0": 5, "CC BY-NC 4.0": 900}, "Apache-2.0"),
        ({"CC BY-SA 4.0": 5, "CC BY-NC-SA 4.0": 900}, "CC0-1.0"),
    ],
)
def test_a_given_licence_is_as_strict_as_each_of_the_data(counts: dict[str, int], given: str) -> None:
    """Also where share-alike licences exclude each other, so that none can be derived."""
    with pytest.raises(InputError, match="non-commercial"):
        weights_licence(counts, given=given)


@pytest.mark.parametrize(
    "text",
    [
        "non-commercial research use only, see https://creativecommons.org/licenses/by/4.0/",
        "CC BY-NC-ND 4.0 (images); metadata https://creativecommons.org/publicdomain/zero/1.0/",
        "on request; not under https://creativecommons.org/licenses/by/4.0/",
    ],
)
def test_a_link_does_not_take_back_what_stands_beside_it(text: str) -> None:
    assert find_licence(text) is None


def test_share_alike_licences_can_exclude_each_other() -> None:
    for counts in ({"CC BY-SA 4.0": 1, "CC BY-NC-SA 4.0": 1}, {"CC BY-SA 4.0": 1, "CC BY-NC 4.0": 1}):
        with pytest.raises(InputError, match="exclude each other"):
            weights_licence(counts)
