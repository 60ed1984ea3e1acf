"""The model card says what the run and its evaluations say, and its front matter can be read back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from data_prep.schema import Aspect, ShardManifest
from pretrain.config import TrainConfig
from pretrain.publish.card_results import eval_results, knows_skin_tone, results_section
from pretrain.publish.licences import weights_licence
from pretrain.publish.markdown import count_table, plain
from pretrain.publish.model_card import CardFacts, ModelFacts, model_card
from pretrain.publish.run_facts import RunFacts, Validation, training_hours
from tests.unit.publish.results import evaluation

MODEL = ModelFacts(
    num_parameters=149_620_737,
    image_px=224,
    embed_dim=512,
    context_length=77,
    has_own_text_tower=False,
    clip_difference=2e-7,
)
LICENCES = {"CC BY 4.0": 909, "CC-BY-NC-4.0": 2961}


def facts(**changes: object) -> CardFacts:
    manifest = ShardManifest(
        dataset="derm_images",
        split="train",
        num_samples=3870,
        shards=(),
        index_sha256="",
        image_short_side=224,
        captions_by_aspect={Aspect.CAPTION: 3870, Aspect.DIAGNOSIS: 3000},
        samples_by_diagnosis={"nevus": 3000, "melanoma": 870},
        samples_by_licence=LICENCES,
        samples_by_source={"HAM10000": 2961, "PAD | UFES": 909},
        num_rejected=12,
        decomposer="rules-3",
        config_digest="",
    )
    config = TrainConfig.model_validate(
        {
            "run_dir": "mine",
            "data": {"train_dir": "train"},
            "model": {"name": "ViT-B-16"},
            "objectives": [{"kind": "clip"}, {"kind": "local_alignment"}],
            "global_batch_size": 1024,
            "num_steps": 2000,
        }
    )
    run = RunFacts(
        config=config,
        manifest=manifest,
        step=2000,
        samples_seen=2_048_000,
        num_ranks=4,
        hardware="NVIDIA A100-SXM4-80GB",
        hours=3.14159,
        year=2026,
        starts=("ViT-B-16, weights openai",),
        samples_by_source_and_licence={("PAD | UFES", "CC BY 4.0"): 909, ("HAM10000", "CC-BY-NC-4.0"): 2961},
    )
    base = CardFacts(
        repo="org/derm-clip",
        run=run,
        licence=weights_licence(LICENCES),
        model=MODEL,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_data_recipe_hardware_and_licence_stand_in_the_card() -> None:
    card = ModelCard(model_card(facts()))
    assert card.data.license == "cc-by-nc-4.0" and "datasets" not in card.data.to_dict()
    assert r"pairs of derm\_images with dermvlp" in card.text
    assert ModelCard(model_card(facts(datasets=("org/data",)))).data.datasets == ["org/data"]
    for text in (
        "149.6 M parameters",
        "3,870 image-text pairs",
        "| HAM10000 | CC-BY-NC-4.0 | no commercial use, derivatives | 2,961 |",
        r"| PAD \| UFES | CC BY 4.0 | commercial use, derivatives | 909 |",
        "Rows of the sources that became no sample: 12.",
        "- ViT-B-16, weights openai",
        r"clip x 1, local\_alignment x 0.7",
        "2,000 of 1,024 images; 2,048,000 images seen",
        "4 rank(s), the first on: NVIDIA A100-SXM4-80GB",
        "| hours of training | 3.1 (",
        "training_metrics.jsonl",
        "Non-commercial, because of CC-BY-NC-4.0 (2961 samples).",
        "Not a medical device",
        "Out of scope",
        "How well it does by skin tone was not measured",
        "nothing is known of how well it does",
        "@misc{dermclip2026,",
        'CLIPModel.from_pretrained("org/derm-clip")',
    ):
        assert text in card.text, text


def test_what_a_run_did_not_record_is_said() -> None:
    base = facts()
    text = model_card(replace(base, run=replace(base.run, hardware=None, hours=None, starts=())))
    assert "the first on: not recorded" in text and "| hours of training | not recorded |" in text
    assert "training_metrics.jsonl" not in text and "published weights" not in text


def test_sources_and_licences_stand_apart_where_the_shards_are_gone() -> None:
    base = facts()
    text = model_card(replace(base, run=replace(base.run, samples_by_source_and_licence=None)))
    assert "Which source has which licence is not said here" in text
    assert "| CC-BY-NC-4.0 | no commercial use, derivatives | 2,961 |" in text and r"| PAD \| UFES | 909 |" in text
    assert "Which source" not in model_card(base)


def test_results_stand_with_intervals_skin_tone_first() -> None:
    text = results_section([evaluation("HAM10000")])
    assert "| balanced\\_accuracy | 0.610 [0.550, 0.660] | 200 | 0.143 | 0.590 [0.520, 0.650] |" in text
    assert "| top\\_3 | undefined | 0 |" in text
    assert "Of the 200 tested on 5 are in the training data too (3 with the same pixels, 2 near copies)." in text
    assert "| II | 0.660 [0.580, 0.720] | 120 |" in text and "| V |" not in text
    assert "Left out here: 1 group(s) of fewer than 20 rows; `evaluations/*.json` has them." in text
    assert "worst: III; gap 0.090 [-0.040, 0.220]; 38 rows without a value." in text
    assert text.index("skin tone (Fitzpatrick type)") < text.index("by sex")
    assert r"One class has \| four images." in text
    assert "not compared with the training data" in results_section([evaluation("HAM10000", leakage=None)])
    assert results_section([]) == "None was given."


def test_model_index_holds_defined_metrics_with_their_intervals() -> None:
    evaluations = (evaluation("HAM10000"), evaluation("PAD UFES"))
    results = eval_results(evaluations)
    assert [(r.dataset_type, r.metric_type, r.metric_value) for r in results] == [
        ("ham10000", "balanced_accuracy", 0.59),  # without the images that were trained on
        ("pad-ufes", "balanced_accuracy", 0.59),
    ]
    bounds = {"confidence": 0.95, "low": 0.52, "high": 0.65}
    assert results[0].metric_args == {"n": 195, **bounds, "without_training_images": True}
    clean = evaluation("HAM10000")
    clean = clean.model_copy(update={"tasks": (clean.tasks[0].model_copy(update={"without_overlap": {}}),)})
    whole = eval_results([clean])
    assert [(r.metric_type, r.metric_value) for r in whole] == [("balanced_accuracy", 0.61), ("auroc", 0.9)]
    assert whole[1].metric_args == {"n": 200}
    card = ModelCard(model_card(facts(evaluations=evaluations)))
    assert card.data.eval_results == results
    assert "by skin tone was not measured" not in card.text


def test_results_on_the_split_that_chose_the_checkpoint_are_no_independent_test() -> None:
    validation = Validation(every=500, best_by="retrieval", keeps_best=True, is_best=True, split="derm_images-val")
    evaluations = (evaluation("derm_images-val"), evaluation("HAM10000"))
    base = facts(evaluations=evaluations)

    def card(**changes: object) -> str:
        return model_card(replace(base, run=replace(base.run, validation=replace(validation, **changes))))  # type: ignore[arg-type]

    chosen = "and its best checkpoint, this one, chosen there by the highest mean recall of retrieval: results on it"
    of_results = f"**The run was validated every 500 steps on this set, {chosen} are no independent test.**"
    of_limits = f"- The run was validated every 500 steps on derm\\_images-val, {chosen} are no independent test."
    text = card()
    assert text.count(of_results) == 1 and text.index(of_results) < text.index("### HAM10000")
    assert of_limits in text
    arguments = {r.dataset_name: r.metric_args for r in ModelCard(text).data.eval_results or []}
    assert arguments["derm_images-val"]["run_was_validated_on_it"]
    assert "run_was_validated_on_it" not in arguments["HAM10000"]
    gone = card(split=None)
    assert "on this set" not in gone and "steps on a held-out split that could not be read any more" in gone
    assert "Whether an evaluation above is of the split" in gone and "Whether an evaluation above" not in text
    assert "its best checkpoint, another than this one, chosen there by the lowest loss" in card(
        is_best=False, best_by="loss"
    )
    assert "every 500 steps on this set: results on it" in card(keeps_best=False)
    assert "independent test" not in model_card(base)


def test_skin_tone_is_known_only_where_it_was_measured() -> None:
    result = evaluation("HAM10000")
    assert knows_skin_tone([result])
    by_sex, by_tone = result.tasks[0].by_group
    rare = by_tone.model_copy(update={"min_group_size": 50})  # one group is as large
    for by_group in ((by_sex,), (by_sex, rare)):
        without = result.tasks[0].model_copy(update={"by_group": by_group})
        assert not knows_skin_tone([result.model_copy(update={"tasks": (without,)})])


def test_small_groups_are_counted_and_not_shown() -> None:
    result = evaluation("HAM10000")
    by_tone = result.tasks[0].by_group[1]

    def section(min_group_size: int | None) -> str:
        by_group = (by_tone.model_copy(update={"min_group_size": min_group_size}),)
        return results_section(
            [result.model_copy(update={"tasks": (result.tasks[0].model_copy(update={"by_group": by_group}),)})]
        )

    assert "| III |" in section(40) and "| III |" not in section(41) and "2 group(s) of fewer than 41" in section(41)
    assert "| skin tone" not in section(1000) and "3 group(s) of fewer than 1,000 rows" in section(1000)
    assert "| V | undefined | 2 |" in section(None) and "Left out" not in section(None)


def test_gated_access_and_a_licence_that_the_hub_does_not_list() -> None:
    card = ModelCard(model_card(facts(is_gated=True))).data.to_dict()
    assert card["extra_gated_fields"]["I will not use this model for diagnosis or treatment"] == "checkbox"
    assert "extra_gated_prompt" not in ModelCard(model_card(facts())).data.to_dict()
    given = weights_licence({"unknown": 1}, given="CC BY-NC")
    card = ModelCard(model_card(facts(licence=given))).data.to_dict()
    assert card["license"] == "other" and card["license_name"] == "cc-by-nc"


def test_a_model_without_clip_shape_says_why_and_how_it_loads() -> None:
    model = replace(MODEL, clip_difference=None, no_clip_model="its tokenizer is another", has_own_text_tower=True)
    text = model_card(facts(model=model))
    assert "There is no `transformers.CLIPModel` of it: its tokenizer is another." in text
    assert 'text_cfg=text_cfg | {"hf_model_name": "FOLDER"}' in text and "CLIPModel.from_pretrained" not in text


@pytest.mark.parametrize(
    ("text", "expected"), [("a|b", r"a\|b"), ("<b>x</b>\n# y", r"\<b\>x\</b\> \# y"), ("[a](b)", r"\[a\](b)")]
)
def test_what_comes_from_data_is_no_markup(text: str, expected: str) -> None:
    assert plain(text) == expected


def test_rare_names_are_summed_up() -> None:
    counts = {"a": 1, "b": 30, "c": 2, "d": 1000}
    assert count_table("x", counts, "n", most=2).splitlines()[2:] == ["| d | 1,000 |", "| b | 30 |", "| 2 more | 3 |"]
    assert len(count_table("x", counts, "n").splitlines()) == 6


def test_hours_are_those_of_the_steps() -> None:
    records = [
        {"step": 10, "samples_per_s": 64.0},
        {"step": 10, "val/loss": 1.0},
        {"step": 30, "samples_per_s": 32.0},
    ]
    # 10 steps of 64 images at 64 a second, then 20 at 32 a second
    assert training_hours(records, 64) == pytest.approx((10 + 40) / 3600)
    assert training_hours([], 64) is None
