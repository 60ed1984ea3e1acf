"""Splitting captions by rules. All sentences were written for these tests; none is copied from a data set."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from data_prep.captions.lexicon import label
from data_prep.captions.report import covered_words, main, read_captions
from data_prep.captions.rules import RuleSplitter, says_nothing, sentences, split
from data_prep.schema import MAX_SUBCAPTIONS, SUBCAPTION_ASPECTS, Aspect

#: 40 clauses of the forms that textbook legends, transcripts and forum posts have, labelled by hand.
GOLDEN = [
    ("morphology", "Multiple sharply demarcated pink plaques with silvery scale"),
    ("morphology", "A firm dome-shaped nodule with central keratin plug"),
    ("morphology", "Red, swollen and crusted patches on the skin"),
    ("morphology", "Several 2-4 mm skin-coloured papules, some umbilicated"),
    ("morphology", "The skin texture is elevated irregular and fluid filled"),
    ("morphology", "Yellow thickened discoloured nail plate"),
    ("morphology", "Ulcer with undermined violaceous edges"),
    ("morphology", "An itchy, blotchy eruption with a circular shape"),
    ("body_site", "On the extensor side of both forearms"),
    ("body_site", "Mainly affecting the palms, soles and lateral fingers"),
    ("body_site", "In the groin and around the umbilicus"),
    ("body_site", "Located at the tip of the nose"),
    ("symptoms", "Intense itching and a burning sensation at night"),
    ("symptoms", "Accompanied by fever, chills and joint pain"),
    ("symptoms", "The lesion is painful and bleeds easily"),
    ("symptoms", "Asymptomatic, without pain or itching"),
    ("history", "Caused by an allergic reaction to nickel"),
    ("history", "Present for about six weeks and slowly spreading"),
    ("history", "The cause of the disease is an infection with a yeast"),
    ("history", "She has a long history of asthma and hay fever"),
    ("history", "After the second dose of a vaccine"),
    ("history", "Often triggered by heat or stress"),
    ("history", "The condition is hereditary and begins in childhood"),
    ("demographics", "A 43-year-old woman"),
    ("demographics", "Male, 71 years old, retired farmer"),
    ("demographics", "Common in young children and teenagers"),
    ("demographics", "FST5 skin tone"),
    ("investigation", "Punch biopsy reveals a dense infiltrate of lymphocytes in the dermis"),
    ("investigation", "Dermoscopy of the lesion shows arborizing vessels"),
    ("investigation", "The potassium hydroxide preparation was negative"),
    ("investigation", "Blood tests including an ANA titre were normal"),
    ("management", "Treatment options include topical steroids and phototherapy"),
    ("management", "Can be managed with antihistamines and avoiding the trigger"),
    ("management", "She was prescribed oral doxycycline for one month"),
    ("management", "Three months after surgical excision with a skin graft"),
    ("impression", "The users agreed on a diagnosis of tinea corporis"),
    ("impression", "Suggestive of an early basal cell carcinoma"),
    ("impression", "Bullous impetigo"),
    ("impression", "May indicate a skin condition such as rosacea or lupus"),
    ("other", "Photograph sent by post for the annual meeting"),
]


def test_golden_set() -> None:
    wrong = [(aspect, str(label(text)), text) for aspect, text in GOLDEN if label(text) != aspect]
    assert len(GOLDEN) == 40
    assert len(wrong) <= 6, wrong  # at least 85 % right


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (
            "Tense clear blisters on the right shin of a 67-year-old man with diabetes.",
            [
                ("morphology", "Tense clear blisters"),
                ("body_site", "On the right shin"),
                ("demographics", "A 67-year-old man with diabetes"),
            ],
        ),
        (
            "This image shows tinea faciei, a rash characterized by ring-shaped red plaques, often caused by contact "
            "with pets, and can be treated with antifungal creams.",
            [
                ("impression", "Tinea faciei, a rash"),
                ("morphology", "Ring-shaped red plaques"),
                ("history", "Often caused by contact with pets"),
                ("management", "Can be treated with antifungal creams"),
            ],
        ),
        ("No lesions on the palms or soles.", [("body_site", "No lesions on the palms or soles")]),
        ("Impetigo.", [("impression", "Impetigo")]),
        ("Slide for the annual meeting", [("other", "Slide for the annual meeting")]),
        ("Scabies. Scabies.", [("impression", "Scabies")]),
        ("(A) White macules on the chest. (B) The same, six weeks after treatment with tacrolimus.", None),
        ("", []),
        (" . ", []),
    ],
)
def test_split(caption: str, expected: list[tuple[str, str]] | None) -> None:
    found = [(str(sub.aspect), sub.text) for sub in split(caption).subcaptions]
    if expected is None:
        assert found[:2] == [("morphology", "White macules"), ("body_site", "On the chest")]
        assert not any(text.startswith(("(", "B)")) for _, text in found)
    else:
        assert found == expected


def test_sentences_keep_abbreviations_decimals_and_brackets() -> None:
    caption = (
        "Dr. Smith saw a 1.5 cm nodule (i.e. a lump. Firm) of S. aureus origin, e.g. Fig. 3. It grew.Then it healed "
        "The size was 12 x 10 cm vs. 3 cm before."
    )
    assert sentences(caption) == [
        "Dr. Smith saw a 1.5 cm nodule (i.e. a lump. Firm) of S. aureus origin, e.g. Fig. 3.",
        "It grew.",
        "Then it healed",
        "The size was 12 x 10 cm vs. 3 cm before.",
    ]


@pytest.mark.parametrize(
    ("caption", "kept"),
    [
        ("No red patches on the arms and no itching in the groin.", "no itching in the groin"),
        ("A plaque without scale on the arm.", "without scale on the arm"),
        ("He denies pain in the hands and feet.", "denies pain in the hands and feet"),
    ],
)
def test_negation_is_not_cut_from_what_it_negates(caption: str, kept: str) -> None:
    assert any(kept in sub.text for sub in split(caption).subcaptions)


def test_limit_joins_neighbours_first_then_reports_what_it_leaves_out() -> None:
    ages = range(20, 24)
    joined = split(" ".join(f"Red patches {age} cm wide on the arm of a {age}-year-old woman." for age in ages))
    assert len(joined.subcaptions) == MAX_SUBCAPTIONS
    assert [dropped.reason for dropped in joined.dropped] == ["repeated"] * 3  # the arm
    text = " ".join(sub.text for sub in joined.subcaptions)
    assert all(f"{age} cm" in text and f"{age}-year" in text for age in ages)

    long = split(" ".join(f"Nodule number {n} was red." for n in range(10)) + " Slide for the meeting.")
    assert len(long.subcaptions) == MAX_SUBCAPTIONS
    assert [dropped.reason for dropped in long.dropped] == ["more than 8 sub-captions"] * 3
    assert [dropped.aspect for dropped in long.dropped].count(Aspect.OTHER) == 1


@pytest.mark.parametrize(
    "text", ["None", "No age information", "no information about the site was provided.", "Unknown"]
)
def test_what_says_nothing_is_dropped(text: str) -> None:
    assert says_nothing(text)
    assert [d.reason for d in split(f"Red papules. {text.capitalize()}").dropped] == [
        "says only that something is not known"
    ]
    assert not says_nothing("No itching") and not says_nothing("The cause is unknown")


def test_the_decomposer_names_its_version_and_keeps_to_the_context() -> None:
    caption = "Tense clear blisters on the right shin of a 67-year-old man with diabetes."
    assert {sub.origin for sub in RuleSplitter().decompose(caption).subcaptions} == {"rules-1"}
    made = RuleSplitter(lambda text: "diabetes" not in text).decompose(caption)
    assert [sub.text for sub in made.subcaptions] == ["Tense clear blisters", "On the right shin"]
    assert [dropped.reason for dropped in made.dropped] == ["too long: does not fit the context"]


def real_captions() -> list[str]:
    if "DERMVLP_DATA" not in os.environ:
        pytest.skip("DERMVLP_DATA is not set: the real captions are not part of the repository")
    return read_captions(Path(os.environ["DERMVLP_DATA"]) / "derm1m-sample")


def test_real_captions() -> None:
    captions = real_captions()
    split(captions[0])  # the lexicon is loaded
    start_s = time.process_time()
    made = [split(caption) for caption in captions]
    assert (time.process_time() - start_s) / len(captions) < 0.003  # about 0.5 ms where it was written
    num_held = num_words = 0
    for caption, decomposition in zip(captions, made, strict=True):
        subcaptions = decomposition.subcaptions
        assert 1 <= len(subcaptions) <= MAX_SUBCAPTIONS
        assert len({sub.text.casefold() for sub in subcaptions}) == len(subcaptions)
        flat = " ".join(caption.split()).casefold()
        for sub in subcaptions:
            assert sub.text.casefold() in flat and sub.aspect in SUBCAPTION_ASPECTS  # a span of its caption
        held, total = covered_words(caption, decomposition)
        num_held, num_words = num_held + held, num_words + total
    assert sum(len(decomposition.subcaptions) >= 2 for decomposition in made) / len(made) > 0.65
    assert num_held / num_words > 0.85
    aspects = [sub.aspect for decomposition in made for sub in decomposition.subcaptions]
    assert set(aspects) == set(SUBCAPTION_ASPECTS)
    assert aspects.count(Aspect.OTHER) / len(aspects) < 0.03


def test_report_prints_examples_and_ends_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    (tmp_path / "Derm1M_v2_pretrain.csv").write_text(
        "filename,caption\na.jpg,Red scaly plaques on both knees.\nb.jpg,\nc.jpg,Impetigo.\n", encoding="utf-8"
    )
    assert main(["--derm1m-dir", str(tmp_path), "--num-examples", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert (
        figures["num_captions"] == 2 and figures["share_two_or_more"] == 0.5 and figures["mean_num_subcaptions"] == 1.5
    )
    assert figures["num_by_aspect"]["body_site"] == 1 and figures["share_words_covered"] == 1.0
    assert main(["--derm1m-dir", str(tmp_path / "nowhere")]) == 2
    assert "no Derm1M_v2_*.csv" in capsys.readouterr().err
