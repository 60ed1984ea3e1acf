"""The model card, README.md of a published model: written from the run, its data's manifest and its evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from data_prep.schema import Aspect
from pretrain.evaluation.results import EvaluationResult
from pretrain.publish.card_results import choice_by, eval_results, knows_skin_tone, results_section
from pretrain.publish.licences import WeightsLicence, find_licence
from pretrain.publish.markdown import bullets, count_table, plain, table
from pretrain.publish.run_facts import RunFacts

TAGS = ("open_clip", "clip", "dermatology", "medical", "vision-language", "dermvlp")

_GATED_PROMPT = (
    "This model was trained on medical images. It is for research and not a medical device. By asking for access you "
    "agree to the licence and to the limits that the model card names."
)
_GATED_FIELDS = {
    "Name": "text",
    "Affiliation": "text",
    "Intended use": "text",
    "I will not use this model for diagnosis or treatment": "checkbox",
}


@dataclass(frozen=True)
class ModelFacts:
    num_parameters: int
    image_px: int
    embed_dim: int
    context_length: int
    has_own_text_tower: bool  # an HF text tower, whose architecture is in the folder
    clip_difference: float | None  # of the CLIPModel from open_clip's unit vectors; None: there is none
    no_clip_model: str = ""  # why there is none


@dataclass(frozen=True)
class CardFacts:
    """All that the card says."""

    repo: str  # ORG/NAME
    run: RunFacts
    licence: WeightsLicence
    model: ModelFacts
    evaluations: tuple[EvaluationResult, ...] = ()
    datasets: tuple[str, ...] = ()  # ids on the Hub of the training data
    is_gated: bool = False


def model_card(facts: CardFacts) -> str:
    """The text of README.md. Equal facts give equal bytes, so that publishing again changes nothing.

    Raises ValueError where the front matter, read back, is not what was meant.
    """
    data = _front_matter(facts)
    parts = [
        f"# {plain(facts.repo.rpartition('/')[2])}",
        _summary(facts),
        _warning(),
        "## Use",
        _usage(facts),
        "## Training data",
        _training_data(facts),
        "## Recipe",
        _recipe(facts),
        "## Results",
        results_section(facts.evaluations, facts.run.validation),
        "## Intended use, and what it is not for",
        _uses(),
        "## Limitations",
        _limitations(facts),
        "## Licence",
        _licence(facts.licence),
        "## Citation",
        _citation(facts),
    ]
    content = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"
    read_back = ModelCard(content).data.to_dict()
    if read_back != data.to_dict():
        raise ValueError(f"{facts.repo}: the card's front matter does not survive being read: {read_back}")
    return content


def _front_matter(facts: CardFacts) -> ModelCardData:
    licence = facts.licence.licence
    fields: dict[str, Any] = {
        "language": "en",
        "library_name": "open_clip",
        "pipeline_tag": "zero-shot-image-classification",
        "license": licence.hub_id,
        # ids of the Hub alone, which makes links of them: the data's own name is in the text
        "datasets": list(facts.datasets) or None,
        "tags": [*TAGS, *(["transformers"] if facts.model.clip_difference is not None else [])],
    }
    if licence.hub_id == "other":
        fields |= {"license_name": licence.id.lower(), "license_link": licence.url}
    if facts.is_gated:
        fields |= {"extra_gated_prompt": _GATED_PROMPT, "extra_gated_fields": dict(_GATED_FIELDS)}
    results = eval_results(facts.evaluations, facts.run.validation)
    if results:
        fields |= {"model_name": facts.repo.rpartition("/")[2], "eval_results": results}
    return ModelCardData(**fields)


def _summary(facts: CardFacts) -> str:
    model, manifest = facts.model, facts.run.manifest
    return (
        f"A contrastive vision-language model for dermatology: {model.num_parameters / 1e6:.1f} M parameters, images "
        f"of {model.image_px} px, texts of at most {model.context_length} tokens, {model.embed_dim} joint dimensions. "
        f"Trained on {manifest.num_samples:,} image-text pairs of {plain(manifest.dataset)} with dermvlp."
    )


def _warning() -> str:
    return "> **Not a medical device.** For research. It must not be used to diagnose, to treat or to reassure anybody."


def _usage(facts: CardFacts) -> str:
    lines = [
        "```python",
        "import open_clip",
        "",
        f'model, _, preprocess = open_clip.create_model_and_transforms("hf-hub:{facts.repo}")',
        f'tokenizer = open_clip.get_tokenizer("hf-hub:{facts.repo}")',
        "```",
        "",
        'A downloaded folder loads by `"local-dir:FOLDER"` in the same two calls.',
    ]
    if facts.model.has_own_text_tower:
        lines += [
            "There, open_clip asks the Hub for the text tower's configuration. Without a network, or under another",
            "name, say that it lies in the folder:",
            "",
            "```python",
            "import json",
            "",
            'text_cfg = json.load(open("FOLDER/open_clip_config.json"))["model_cfg"]["text_cfg"]',
            "model, _, preprocess = open_clip.create_model_and_transforms(",
            '    "local-dir:FOLDER", text_cfg=text_cfg | {"hf_model_name": "FOLDER"}',
            ")",
            "```",
        ]
    if facts.model.clip_difference is None:
        lines += ["", f"There is no `transformers.CLIPModel` of it: {facts.model.no_clip_model}."]
    else:
        lines += [
            "",
            "As a `transformers` model, whose unit vectors were checked to be open_clip's on the same pixels and texts",
            "(to 0.00001). Its processor differs a little: the backend `pil` gives open_clip's pixels, but for a crop",
            "that can lie one pixel aside; and texts are not cleaned of HTML:",
            "",
            "```python",
            "from transformers import CLIPModel, CLIPProcessor",
            "",
            f'model = CLIPModel.from_pretrained("{facts.repo}")',
            f'processor = CLIPProcessor.from_pretrained("{facts.repo}", backend="pil")',
            "```",
        ]
    return "\n".join(lines)


def _training_data(facts: CardFacts) -> str:
    manifest = facts.run.manifest
    aspects = {str(Aspect(aspect).value): count for aspect, count in manifest.captions_by_aspect.items()}
    parts = [
        *_sources(facts.run),
        count_table("captions by aspect", aspects, "captions"),
        count_table("diagnosis", manifest.samples_by_diagnosis, "samples", most=12),
        f"Rows of the sources that became no sample: {manifest.num_rejected:,}. Sub-captions by "
        f"{plain(manifest.decomposer)}. Images of {manifest.image_short_side} px on the short side.",
    ]
    if facts.run.starts:
        parts.append("Training began with published weights, which have data and licences of their own:")
        parts.append(bullets(plain(start) for start in facts.run.starts))
    return "\n\n".join(part for part in parts if part)


def _sources(run: RunFacts) -> list[str]:
    """One table of sources and their licences; two where it is not known which source has which licence."""
    if run.samples_by_source_and_licence is not None:
        found = sorted(run.samples_by_source_and_licence.items(), key=lambda item: (-item[1], item[0]))
        # of data that names no source within itself, the data's own name says most
        unnamed = {"unknown": f"{run.manifest.dataset}, source not named"}
        rows = [(plain(unnamed.get(s, s)), plain(name), _terms(name), f"{count:,}") for (s, name), count in found]
        return [
            "A sample is one image with its texts.",
            table(("source", "licence", "what it allows", "samples"), rows),
        ]
    licences = sorted(run.manifest.samples_by_licence.items(), key=lambda item: (-item[1], item[0]))
    parts = [
        "A sample is one image with its texts. Which source has which licence is not said here: the shards, which say "
        "it, could not be read when this card was written.",
        table(("licence", "what it allows", "samples"), [(plain(n), _terms(n), f"{count:,}") for n, count in licences]),
    ]
    sources = run.manifest.samples_by_source
    return [*parts, count_table("source", sources, "samples")] if sources else parts


def _terms(name: str) -> str:
    licence = find_licence(name)
    if licence is None:
        return "not known to dermvlp"
    commercial = "commercial use" if licence.commercial else "no commercial use"
    return f"{commercial}, {'derivatives' if licence.derivatives else 'no derivatives'}"


def _recipe(facts: CardFacts) -> str:
    run, config = facts.run, facts.run.config
    optimizer, engine = config.optimizer, config.engine
    objectives = ", ".join(f"{objective.label} x {objective.weight:g}" for objective in config.objectives)
    hardware = f"{run.num_ranks} rank(s), the first on: {plain(run.hardware or 'not recorded')}"
    hours = "not recorded" if run.hours is None else f"{run.hours:.2g} (validation and saving not counted)"
    augmentation = ", ".join(f"{name} {value}" for name, value in config.data.augmentation.model_dump().items())
    rows = [
        ("model", plain(config.model.name)),
        ("objectives", plain(objectives)),
        ("steps", f"{run.step:,} of {config.global_batch_size:,} images; {run.samples_seen:,} images seen"),
        ("optimizer", f"AdamW, lr {optimizer.lr:g}, betas {optimizer.betas[0]:g} and {optimizer.betas[1]:g}"),
        ("schedule", f"{optimizer.schedule}, {optimizer.warmup_steps:,} warm-up steps"),
        ("weight decay", f"{optimizer.weight_decay:g}"),
        ("precision", f"{engine.precision}, {engine.kind}, ZeRO {engine.zero_stage}"),
        ("augmentation", plain(augmentation)),
        ("seed", str(config.seed)),
        ("hardware", hardware),
        ("hours of training", hours),
    ]
    log = "" if run.hours is None else "; the log of its steps: `training_metrics.jsonl`"
    return table(("", ""), rows) + f"\n\nAll of it: `training_config.yaml`{log}."


def _uses() -> str:
    return (
        "For research: zero-shot classification, retrieval and annotation of concepts in dermatological images, "
        "features for other models, and studies of what such models get wrong.\n\n"
        "Out of scope: any decision on a person's care; apps for patients; images that are not of skin; other "
        "languages than English; telling who a person is; and any use that its licence excludes."
    )


def _limitations(facts: CardFacts) -> str:
    manifest = facts.run.manifest
    largest = max(manifest.samples_by_diagnosis.values(), default=0)
    lines = [
        "Similarities are no probabilities of a disease. A class that is not among the prompts cannot be answered.",
        f"{len(manifest.samples_by_diagnosis):,} diagnoses, unevenly: the commonest has {largest:,} samples. Rare ones "
        "are known least.",
        "Captions say what their authors wrote, and can be wrong; sub-captions were made from them automatically.",
        "Results hold for the evaluation sets named above. Other cameras, clinics and populations were not tested.",
    ]
    if (validation := facts.run.validation) is not None:
        unknown = "a held-out split that could not be read any more when this card was written"
        lines.append(choice_by(validation, unknown if validation.split is None else plain(validation.split)))
        if validation.split is None and facts.evaluations:
            lines.append("Whether an evaluation above is of the split that the run was validated on is not known.")
    if not facts.evaluations:
        lines.append("No evaluation was published with this model: nothing is known of how well it does.")
    if not knows_skin_tone(facts.evaluations):
        lines.append(
            "How well it does by skin tone was not measured, or on too few images. Dark skin is rare in most data of "
            "this kind."
        )
    return bullets(lines)


def _licence(chosen: WeightsLicence) -> str:
    licence = chosen.licence
    name = f"[{licence.id}]({licence.url})" if licence.url else licence.id
    parts = [f"{name}, derived from the licences of the training data above."]
    return "\n\n".join([*parts, bullets(chosen.reasons)] if chosen.reasons else parts)


def _citation(facts: CardFacts) -> str:
    owner, _, name = facts.repo.rpartition("/")
    key = "".join(character for character in name.lower() if character.isalnum())
    return "\n".join(
        [
            "Cite the data sets that it was trained on as their authors ask, and this model as",
            "",
            "```bibtex",
            f"@misc{{{key}{facts.run.year},",
            f"  title = {{{name}: a dermatology vision-language model}},",
            f"  author = {{{owner}}},",
            f"  year = {{{facts.run.year}}},",
            f"  howpublished = {{\\url{{https://huggingface.co/{facts.repo}}}}}",
            "}",
            "```",
        ]
    )
