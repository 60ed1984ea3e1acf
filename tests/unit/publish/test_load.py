"""A folder that somebody else made runs no code of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.errors import InputError
from pretrain.evaluation.encoding.encoders import load_encoder
from pretrain.publish.load import load_folder

_TEXT = {"context_length": 16, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1}
_MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8},
}


def write(folder: Path, text_cfg: dict[str, object], **files: object) -> Path:
    document = {"model_cfg": _MODEL | {"text_cfg": text_cfg}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n", encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_a_tokenizer_of_its_own_is_refused(tmp_path: Path) -> None:
    text_cfg = _TEXT | {"hf_tokenizer_name": str(tmp_path), "tokenizer_kwargs": {"trust_remote_code": True}}
    tokenizer = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    folder = write(tmp_path, text_cfg, tokenizer_config=tokenizer)
    with pytest.raises(InputError, match=r"tokenizer_kwargs \['trust_remote_code'\] are not taken from a config"):
        load_folder(folder)
    assert not (tmp_path / "ran").exists()


def test_a_text_tower_of_its_own_is_refused_and_not_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    text_cfg = {"hf_model_name": str(tmp_path), "hf_tokenizer_name": str(tmp_path), "hf_pooler_type": "mean_pooler"}
    folder = write(tmp_path, text_cfg, config={"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}})
    with pytest.raises(InputError):
        load_encoder(f"local-dir:{folder}")
    with pytest.raises(Exception, match=r"trust_remote_code|custom code"):
        load_folder(folder)
    assert not (tmp_path / "ran").exists()
