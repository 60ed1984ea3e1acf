"""A tower as a stack of layers: for freezing its lower part and for a learning rate that falls with depth.

Layer 0 holds the embeddings (patch or token embedding, position, class token, the norm before the blocks), layers
1 to n the blocks (stages, of a convolutional tower), layer n + 1 the last norm and the heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch.nn as nn
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer

from data_prep.errors import InputError
from pretrain.config import ModelConfig

#: regular expressions as timm's `group_matcher` writes them: the embeddings' names, then the blocks' with their number
Matcher = Mapping[str, str | Sequence[tuple[str, tuple[int, ...] | None]]]

_RESBLOCKS = r"transformer\.resblocks\.(\d+)\."
_MATCHERS: dict[type[nn.Module], Matcher] = {
    VisionTransformer: {"stem": r"conv1|class_embedding|positional_embedding|ln_pre", "blocks": _RESBLOCKS},
    TextTransformer: {"stem": r"token_embedding|positional_embedding|cls_emb", "blocks": _RESBLOCKS},
    ModifiedResNet: {"stem": r"(?:conv|bn)\d\.", "blocks": r"layer(\d+)\."},
    # BERT, RoBERTa, XLM-R and M2M: embeddings, encoder.layer; the encoders of T5 and mT5: embed_tokens, block
    HFTextEncoder: {
        "stem": r"transformer\.(?:embeddings|embed_tokens|(?:encoder\.)?embed_positions)",
        "blocks": r"transformer\.(?:encoder\.)?(?:layers?|block)\.(\d+)\.",
    },
}
#: timm counts the final norm (and EfficientNet's last convolution) with the last block; BEiT and we with the head
_WITH_LAST_BLOCK = 99999


def layers(tower: nn.Module) -> list[list[nn.Parameter]]:
    """Every parameter of an open_clip or timm tower in exactly one list, from the embeddings to the head.

    Raises InputError for a tower whose blocks are not known.
    """
    parameters = dict(tower.named_parameters())
    return [[parameters[name] for name in names] for names in layer_names(tower)]


def layer_names(tower: nn.Module) -> list[list[str]]:
    """`layers` by the names of the parameters."""
    trunk, prefix = (tower.trunk, "trunk.") if isinstance(tower, TimmModel) else (tower, "")
    matcher = _matcher(trunk)
    groups: dict[tuple[int, ...] | None, list[str]] = {}
    for name, _ in trunk.named_parameters():
        groups.setdefault(_group(name, matcher), []).append(prefix + name)
    head = groups.pop(None, [])
    head += [name for name, _ in tower.named_parameters() if not name.startswith(prefix)]
    stem = [name for key in sorted(groups) if key[0] == 0 for name in groups[key]]  # type: ignore[index, type-var]
    blocks = [groups[key] for key in sorted(groups) if key[0] > 0]  # type: ignore[index, type-var]
    if not blocks:
        raise InputError(f"model: the blocks of a tower of kind {type(trunk).__name__} are not known")
    return [stem, *blocks, head]


def _matcher(trunk: nn.Module) -> Matcher:
    for kind, matcher in _MATCHERS.items():
        if isinstance(trunk, kind):
            return matcher
    if not hasattr(trunk, "group_matcher"):
        raise InputError(f"model: the blocks of a tower of kind {type(trunk).__name__} are not known")
    return trunk.group_matcher(coarse=True)  # type: ignore[operator, no-any-return]


def _group(name: str, matcher: Matcher) -> tuple[int, ...] | None:
    """(0,) for embeddings, (1, number, ..) for a block, None for the rest."""
    for ordinal, specs in enumerate(matcher.values()):
        for pattern, suffix in [(specs, None)] if isinstance(specs, str) else specs:
            match = re.match(pattern, name)
            if match is not None and suffix != (_WITH_LAST_BLOCK,):
                return (ordinal, *(int(number) for number in match.groups() if number is not None), *(suffix or ()))
    return None


def projection_names(tower: nn.Module) -> set[str]:
    """The tensors that lead from the tower's width into the joint space; empty where the tower has none."""
    if isinstance(tower, TimmModel):
        # without a projection of open_clip's own, the trunk's classifier takes its place
        classifier = tower.trunk.pretrained_cfg.get("classifier", "head")
        names = classifier if isinstance(classifier, tuple | list) else (classifier,)
        prefixes = ("head.", *(f"trunk.{name}." for name in names))
    elif isinstance(tower, ModifiedResNet):
        prefixes = ("attnpool.c_proj.",)
    else:
        prefixes = ("proj.", "text_projection.")
    return {name for name in tower.state_dict() if f"{name}.".startswith(prefixes)}


def pooling_names(tower: nn.Module) -> set[str]:
    """The tensors of an attention pooling that patch features and latents do not pass; empty for linear pooling."""
    if isinstance(tower, ModifiedResNet):
        return {name for name in tower.state_dict() if name.startswith("attnpool.")}
    names = {name for name in tower.state_dict() if ".attn_pool." in f".{name}" and ".ln_k." not in name}
    if names and not isinstance(tower, TimmModel):
        names |= {name for name in tower.state_dict() if name.startswith("ln_post.")}  # norms what was pooled
    return names | {name for name in tower.state_dict() if name.startswith("head.pool.")}


def freeze_layers(tower: nn.Module, num_blocks: int) -> None:
    """The embeddings and the first `num_blocks` blocks learn no more; 0 freezes nothing.

    Raises InputError where the tower has fewer blocks.
    """
    if num_blocks == 0:
        return
    lists = layers(tower)
    most = len(lists) - 2
    if not 0 < num_blocks <= most:
        raise InputError(
            f"freeze_layers: {num_blocks}, but this tower ({type(tower).__name__}) has {most} blocks; "
            f"give 1 to {most}, or `frozen: true` for all but the projection"
        )
    for parameter in (p for part in lists[: num_blocks + 1] for p in part):
        parameter.requires_grad_(False)


def freeze_tower(tower: nn.Module) -> None:
    """Nothing learns but the projection into the joint space (locked-image tuning: Zhai et al. 2022)."""
    projection = projection_names(tower)
    for name, parameter in tower.named_parameters():
        if name not in projection:
            parameter.requires_grad_(False)


def learning_rate_scales(model: nn.Module, config: ModelConfig) -> dict[str, float]:
    """Parameter name to factor of the learning rate: layer_decay ** (number of layers above it), as BEiT trains.

    `model` carries its towers as `visual` and `text`. 1.0 for a tower's last layer, in which the projection into the
    joint space is, and for all that lies outside the towers.
    """
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    for field, settings in (("visual", config.image), ("text", config.text)):
        if settings.layer_decay < 1.0:
            for above, names in enumerate(reversed(layer_names(getattr(model, field)))):
                scales |= {f"{field}.{name}": settings.layer_decay**above for name in names}
    return scales
