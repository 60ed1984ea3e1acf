"""Text towers: packed texts give what open_clip's own tower gives for every caption, padded and repeated."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from data_prep.errors import InputError
from pretrain.config import ModelConfig
from pretrain.data.texts import pack
from pretrain.models.build import build_open_clip
from pretrain.models.text_towers import AsyncHFTextEncoder, TrimmedTextTransformer, allow_trimmed, can_trim
from tests.conftest import TINY_MODEL

CONTEXT = 24
START, END, PAD, VOCABULARY = 1, 198, 0, 199  # the end token is the largest id, as CLIP's pooling wants it
LENGTHS = (3, 7, 8, 9, 15, 16, 17, 23, 24)
SLOTS = (0, 4, 0, 8, 2, 2, 1, 7, 3, 5, 6, 0)  # captions, of which some repeat: text of each slot

BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
}
ROBERTA = BERT | {"model_type": "roberta", "pad_token_id": 1, "type_vocab_size": 1}
MT5 = {
    "model_type": "mt5",
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "pad_token_id": PAD,
}
CLIP: dict[str, Any] = {"width": 32, "heads": 2, "layers": 2, "vocab_size": VOCABULARY}
#: name: (text_cfg, the config.json of an HF tower)
TOWERS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "CLIP": (CLIP, None),
    "CLIP pooled at the end token's id": (CLIP | {"pool_type": "eos", "eos_id": END}, None),
    "BERT mean": ({"hf_pooler_type": "mean_pooler"}, BERT),
    "BERT cls": ({"hf_pooler_type": "cls_pooler", "hf_proj_type": "linear"}, BERT),
    "BERT cls of the last layer": ({"hf_pooler_type": "cls_last_hidden_state_pooler", "hf_proj_type": None}, BERT),
    "RoBERTa mean": ({"hf_pooler_type": "mean_pooler"}, ROBERTA),
    "mT5 mean": ({"hf_pooler_type": "mean_pooler"}, MT5),
}
HF = [name for name, (_, config) in TOWERS.items() if config is not None]
SIGLIP = CLIP | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}


def build(folder: Path, text_cfg: dict[str, Any], hf_config: dict[str, Any] | None, **settings: Any) -> Any:
    """A text tower as open_clip makes it, random, in float64."""
    text_cfg = {"context_length": CONTEXT, **text_cfg}
    if hf_config is not None:
        (folder / "config.json").write_text(json.dumps(hf_config), encoding="utf-8")
        text_cfg["hf_model_name"] = str(folder)
    path = folder / "model.json"
    path.write_text(json.dumps({"model_cfg": TINY_MODEL | {"text_cfg": text_cfg}}), encoding="utf-8")
    torch.manual_seed(0)
    tower = build_open_clip(ModelConfig(name=str(path), **settings), load_pretrained=False).text.double()
    for parameter in tower.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)  # BERT's own start gives features that hardly depend on the text
    return tower


def draw_texts(pad_id: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    low = max(START, pad_id) + 1
    return [np.array([START + pad_id, *random.integers(low + 1, END, n - 2), END], dtype=np.int64) for n in LENGTHS]


def compare(plain: nn.Module, tower: nn.Module, texts: list[np.ndarray], edges: tuple[int, ...], pad_id: int) -> None:
    """Features of all slots and gradients of all parameters: packed against padded and repeated."""
    padded = torch.full((len(texts), CONTEXT), pad_id)
    for row, ids in enumerate(texts):
        padded[row, : len(ids)] = torch.from_numpy(ids)
    expected = plain(padded[list(SLOTS)])
    packed = pack(texts, edges, pad_id, trim=can_trim(tower, ends_apart=True))
    distinct = torch.cat([tower(tokens) for tokens in packed.bucket_tokens])[packed.order_R]
    actual = distinct[list(SLOTS)]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert torch.pdist(distinct.detach()).min() > 1e-3  # the texts are told apart
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.autograd.backward([(actual * weight).sum(), (expected * weight).sum()])
    for (name, mine), theirs in zip(tower.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            # T5's norm and softmax compute in float32 whatever they are given
            rtol, atol = (1e-6, 1e-6) if "SelfAttention" in str(tower) else (1e-9, 1e-10)
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("edges", [(CONTEXT,), (8, 16, CONTEXT)], ids=str)
@pytest.mark.parametrize("name", TOWERS)
def test_packed_equals_padded_and_repeated(tmp_path: Path, name: str, edges: tuple[int, ...]) -> None:
    plain = build(tmp_path, *TOWERS[name]).eval()
    tower = allow_trimmed(copy.deepcopy(plain))
    assert type(tower) is (AsyncHFTextEncoder if name in HF else TrimmedTextTransformer)
    assert list(tower.state_dict()) == list(plain.state_dict())
    assert can_trim(tower, ends_apart=True) and not can_trim(tower, ends_apart=False)
    pad_id = plain.config.pad_token_id if name in HF else PAD
    compare(plain, tower, draw_texts(pad_id), edges, pad_id)


def test_siglip_is_deduplicated_and_never_trimmed(tmp_path: Path) -> None:
    plain = build(tmp_path, SIGLIP, None).eval()
    tower = allow_trimmed(copy.deepcopy(plain))
    assert not can_trim(tower, ends_apart=True)
    texts = [np.pad(ids, (0, CONTEXT - len(ids))) for ids in draw_texts(PAD)]
    assert [tokens.shape for tokens in pack(texts, (CONTEXT,), PAD, trim=False).bucket_tokens] == [(9, CONTEXT)]
    compare(plain, tower, texts, (CONTEXT,), PAD)
    short = torch.from_numpy(draw_texts(PAD)[0])[None]
    assert (tower(short) - plain(torch.from_numpy(texts[0])[None])).abs().max() > 1e-3  # trimming would have mattered


@pytest.mark.parametrize(
    "changes",
    [{"pool_type": "last"}, {"pool_type": "first", "no_causal_mask": True}, {"embed_cls": True, "output_tokens": True}],
    ids=["last place", "sees padding", "CoCa"],
)
def test_other_towers_are_never_trimmed(tmp_path: Path, changes: dict[str, Any]) -> None:
    tower = allow_trimmed(build(tmp_path, CLIP | changes, None).eval())
    assert not can_trim(tower, ends_apart=True)
    whole = torch.from_numpy(np.pad(draw_texts(PAD)[0], (0, CONTEXT - LENGTHS[0])))[None]
    assert tower(whole).shape == (1, 32)


class Waits(TorchDispatchMode):
    """Lists the operations for which the host would wait for a device."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in self.NAMES or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", TOWERS)
def test_the_host_never_waits(tmp_path: Path, name: str) -> None:
    plain = build(tmp_path, *TOWERS[name]).train()
    tower = allow_trimmed(copy.deepcopy(plain))
    tokens = torch.from_numpy(np.stack(draw_texts(1)[3:5][:1] * 2))
    with Waits() as waits:
        tower(tokens).sum().backward()
    assert waits.found == []
    if name in HF:
        with Waits() as waits:
            plain(tokens)
        assert "_local_scalar_dense" in waits.found  # which is why the forward was replaced


@pytest.mark.parametrize("name", ["CLIP", "BERT mean", "mT5 mean"])
def test_activation_checkpointing_changes_nothing(tmp_path: Path, name: str) -> None:
    """In training mode, dropout included."""
    gradients: list[dict[str, Tensor | None]] = []
    calls = []
    for checkpointed in (False, True):
        tower = allow_trimmed(build(tmp_path, *TOWERS[name], activation_checkpointing=checkpointed)).train()
        norms = [m for m in tower.transformer.modules() if "LayerNorm" in type(m).__name__]
        count = [0]
        for norm in norms:
            norm.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        torch.manual_seed(3)
        tower(torch.from_numpy(draw_texts(PAD)[4])[None]).square().sum().backward()
        gradients.append({name: p.grad for name, p in tower.named_parameters()})
        calls.append(count[0])
    assert calls[1] > 1.5 * calls[0] > 0  # the blocks' norms are computed again in the backward
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-12, msg=name)


def test_an_hf_tower_starts_from_its_own_weights(tmp_path: Path) -> None:
    """Unless a checkpoint or the weights of a whole model will replace them, or the model is tiny."""
    source = build(tmp_path, *TOWERS["BERT mean"])
    source.transformer.save_pretrained(tmp_path)
    expected = source.transformer.embeddings.word_embeddings.weight.float()
    config = ModelConfig(name=str(tmp_path / "model.json"))

    def starts_from_it(config: ModelConfig, **settings: bool) -> bool:
        tower = allow_trimmed(build_open_clip(config, **settings).text)
        assert isinstance(tower, AsyncHFTextEncoder) and tower(torch.tensor([[2, 3]])).shape == (
            1,
            32 if not config.tiny else 64,
        )
        return torch.equal(tower.transformer.embeddings.word_embeddings.weight, expected)

    assert starts_from_it(config)
    assert not starts_from_it(config, load_pretrained=False)
    assert not starts_from_it(config.model_copy(update={"tiny": True}))


def test_an_attention_that_takes_no_ready_mask_is_refused(tmp_path: Path) -> None:
    tower = build(tmp_path, *TOWERS["BERT mean"])
    tower.transformer.set_attn_implementation("eager")
    with pytest.raises(InputError, match="text tower's attention is 'eager'"):
        allow_trimmed(tower)
    assert type(tower) is HFTextEncoder
