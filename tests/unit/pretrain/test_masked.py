"""Masked latent: what the predictor is told and gives, what a teacher is made of, and what it all costs."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import resize_pos_embed
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data_prep.errors import InputError
from pretrain.config import EmaTeacher, FrozenTeacher, MaskedLatentObjective, ModelConfig
from pretrain.models.build import build_open_clip
from pretrain.models.image_towers import expose_tokens
from pretrain.models.masked import LatentPredictor, Teacher, build_predictor, ema_teacher, frozen_teacher
from tests.conftest import TINY_MODEL

GRID = (4, 4)
VIT: dict[str, Any] = TINY_MODEL["vision_cfg"]  # 48 px, 12 px patches


def write_config(path: Path, vision_cfg: dict[str, Any], preprocess: dict[str, Any] | None = None) -> str:
    document = {"model_cfg": TINY_MODEL | {"vision_cfg": vision_cfg}, "preprocess_cfg": preprocess or {}}
    path.write_text(json.dumps(document), encoding="utf-8")
    return str(path)


def timm_cfg(name: str, px: int) -> dict[str, Any]:
    return {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear", "image_size": px}


def build_tower(path: Path, vision_cfg: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return expose_tokens(build_open_clip(ModelConfig(name=write_config(path, vision_cfg))).visual)


def tokens(width: int, num_prefix: int, has_class: bool, grid: tuple[int, int] = GRID) -> Any:
    """What the predictor reads off a tower or a teacher."""
    return SimpleNamespace(token_width=width, num_prefix_tokens=num_prefix, has_class_token=has_class, grid_size=grid)


def build_light(student: Any, teacher: Any, frozen: bool = True) -> LatentPredictor:
    torch.manual_seed(0)
    objective = MaskedLatentObjective(
        teacher=FrozenTeacher(name="any") if frozen else EmaTeacher(),
        predictor_width=16,
        predictor_depth=2,
        predictor_heads=2,
    )
    return build_predictor(student, teacher, objective).double()


def draw(num_prefix: int, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of 5 visible of 16 patches in 2 images, and where they are."""
    generator = torch.Generator().manual_seed(1)
    order_BP = torch.stack([torch.randperm(16, generator=generator) for _ in range(2)])
    latent = torch.randn(2, num_prefix + 5, width, generator=generator, dtype=torch.float64)
    return latent, order_BP[:, :5], order_BP[:, 5:]


@pytest.mark.parametrize(
    ("prefix", "student_class", "teacher_class", "num_compared"),
    [(0, False, True, 0), (1, True, True, 1), (1, True, False, 0), (5, True, True, 1), (4, False, False, 0)],
)
def test_what_was_seen_goes_through_one_linear_layer(
    prefix: int, student_class: bool, teacher_class: bool, num_compared: int
) -> None:
    """The class token, where both have one, then the visible patches; registers have nothing to be compared with."""
    predictor = build_light(tokens(24, prefix, student_class), tokens(40, int(teacher_class), teacher_class))
    latent, visible_BV, masked_BM = draw(prefix)
    seen, predicted = predictor(latent, visible_BV, masked_BM)
    assert seen is not None and predictor.seen_to_teacher is not None
    compared = torch.cat([latent[:, :num_compared], latent[:, prefix:]], dim=1)
    assert torch.equal(seen, predictor.seen_to_teacher(compared))
    assert seen.shape == (2, num_compared + 5, 40) and predicted.shape == (2, 11, 40)


def test_an_ema_teacher_is_compared_in_masked_patches_alone() -> None:
    predictor = build_light(tokens(24, 1, True), tokens(24, 1, True), frozen=False)
    seen, predicted = predictor(*draw(1))
    assert seen is None and predicted.shape == (2, 11, 24)
    assert predictor.seen_to_teacher is None


def test_predictions_belong_to_their_positions() -> None:
    predictor = build_light(tokens(24, 1, True), tokens(40, 1, True))
    latent, visible_BV, masked_BM = draw(1)
    _, predicted = predictor(latent, visible_BV, masked_BM)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = torch.cat([latent[:, :1], latent[:, 1:][:, order]], dim=1)
    _, same = predictor(shuffled, visible_BV[:, order], masked_BM)
    torch.testing.assert_close(same, predicted, rtol=1e-12, atol=1e-12)  # the order of the visible does not matter
    _, flipped = predictor(latent, visible_BV, masked_BM.flip(1))
    torch.testing.assert_close(flipped, predicted.flip(1), rtol=1e-12, atol=1e-12)
    _, moved = predictor(latent, visible_BV[:, order], masked_BM)
    assert (moved - predicted).abs().max() > 1e-4  # where a visible patch was does
    assert torch.pdist(predicted[0]).min() > 1e-4  # each place is told apart


def test_a_grid_need_not_be_square() -> None:
    predictor = build_light(tokens(24, 0, False, grid=(2, 8)), tokens(40, 0, False))
    assert predictor.position_PH.shape == (16, 16) and torch.pdist(predictor.position_PH).min() > 0.1
    assert "position_PH" not in predictor.state_dict()


def test_a_width_that_does_not_divide_is_refused() -> None:
    student = tokens(24, 1, True)
    with pytest.raises(InputError, match="predictor_width 18 must divide by 4 and by predictor_heads"):
        LatentPredictor(student, student, width=18, depth=1, heads=2, predicts_seen=False)


def test_an_ema_teacher_follows_and_shares_nothing(tmp_path: Path) -> None:
    student = build_tower(tmp_path / "vit.json", VIT).double()
    teacher = ema_teacher(student)
    own = dict(teacher.visual.named_parameters())
    assert not any(p.requires_grad for p in own.values()) and not teacher.visual.training
    start = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert all(p.dtype == torch.float32 and torch.equal(p, start[name].float()) for name, p in own.items())
    teacher.follow(student.named_parameters(), momentum=0.9)
    for name, parameter in own.items():
        torch.testing.assert_close(parameter, (start[name] + 0.1).float())


def test_a_teacher_sees_the_whole_image_as_its_own_tower_would(tmp_path: Path) -> None:
    """Its own mean, its own resolution; latents after the final norm."""
    mean = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    name = write_config(tmp_path / "teacher.json", VIT | {"patch_size": 16, "image_size": 64}, mean)
    torch.manual_seed(0)
    teacher = frozen_teacher(FrozenTeacher(name=name), GRID)
    assert (teacher.token_width, teacher.num_prefix_tokens, teacher.has_class_token) == (32, 1, True)
    pixels = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    latent_BTW = teacher(pixels)
    assert latent_BTW.shape == (2, 17, 32) and not latent_BTW.requires_grad
    scaled = (pixels / 255 - torch.tensor(mean["mean"]).view(3, 1, 1)) / torch.tensor(mean["std"]).view(3, 1, 1)
    scaled = F.interpolate(scaled, size=(64, 64), mode="bicubic", antialias=True)
    visual = teacher.visual
    expected = visual.ln_post(visual.transformer(visual._embeds(scaled)))
    torch.testing.assert_close(latent_BTW, expected, rtol=1e-4, atol=1e-4)


def test_a_teacher_under_autocast_keeps_its_weights(tmp_path: Path) -> None:
    teacher = Teacher(build_tower(tmp_path / "vit.json", VIT))
    pixels = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    exact = teacher(pixels)
    teacher.compute_dtype = torch.bfloat16
    rounded = teacher(pixels).float()
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert 1e-4 < (rounded - exact).abs().max() < 0.2


@pytest.mark.parametrize(
    ("vision_cfg", "px", "prefix"),
    [
        (VIT, 48, (1, True)),
        (VIT | {"patch_size": 16}, 64, (1, True)),  # 3 x 3 at its own 48 px
        (timm_cfg("test_vit2", 160), 64, (1, False)),  # a register, no class token
        (timm_cfg("test_vit3", 160), 64, (1, False)),
        (timm_cfg("test_convnext", 160), 128, (0, False)),
    ],
    ids=["same grid", "other patch size", "timm, mean pooling", "timm, attention pooling", "feature map"],
)
def test_a_frozen_teacher_takes_the_resolution_of_the_students_grid(
    tmp_path: Path, vision_cfg: dict[str, Any], px: int, prefix: tuple[int, bool]
) -> None:
    teacher = frozen_teacher(FrozenTeacher(name=write_config(tmp_path / "teacher.json", vision_cfg)), GRID)
    assert tuple(teacher.visual.image_size) == (px, px)
    assert (teacher.num_prefix_tokens, teacher.has_class_token) == prefix
    latent_BTW = teacher(torch.zeros(2, 3, 48, 48, dtype=torch.uint8))
    assert latent_BTW.shape == (2, prefix[0] + 16, teacher.token_width)


def test_a_frozen_teacher_has_its_weights_at_the_new_resolution(tmp_path: Path) -> None:
    name = write_config(tmp_path / "teacher.json", VIT | {"patch_size": 16})  # 3 x 3 patches
    torch.manual_seed(5)
    source = build_open_clip(ModelConfig(name=name))
    state = {key: value.clone() for key, value in source.state_dict().items()}
    save_file(state, tmp_path / "whole.safetensors")
    save_file({key: value for key, value in state.items() if key.startswith("visual.")}, tmp_path / "part.safetensors")
    expected = dict(state)
    resize_pos_embed(expected, SimpleNamespace(visual=SimpleNamespace(grid_size=GRID)))
    settings = [
        {"pretrained": str(tmp_path / "whole.safetensors")},
        {"weights": {"source": str(tmp_path / "part.safetensors"), "prefix": "visual."}},
    ]
    for setting in settings:
        teacher = frozen_teacher(FrozenTeacher(name=name, **setting), GRID)  # type: ignore[arg-type]
        for key, value in teacher.visual.state_dict().items():
            assert torch.equal(value, expected[f"visual.{key}"]), key
    assert expected["visual.positional_embedding"].shape == (17, 32)


def test_a_teacher_whose_grid_cannot_be_the_students_is_refused(tmp_path: Path) -> None:
    name = write_config(tmp_path / "teacher.json", VIT)
    with pytest.raises(InputError, match=r"patch grid of \(5, 5\) at 60 px, the student of \(4, 4\); set masked_la"):
        frozen_teacher(FrozenTeacher(name=name, image_size=60), GRID)
    with pytest.raises(InputError, match=r"masked_latent.teacher: model.pretrained: .*nothing"):
        frozen_teacher(FrozenTeacher(name=name, pretrained=str(tmp_path / "nothing.pt")), GRID)


def test_a_teacher_keeps_its_image_tower_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def remember(*args: Any, **kwargs: Any) -> Any:
        model = create_model(*args, **kwargs)
        made.append((weakref.ref(model.text), sum(p.numel() for p in model.visual.parameters())))
        return model

    create_model = open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", remember)
    teacher = frozen_teacher(FrozenTeacher(name=write_config(tmp_path / "teacher.json", VIT)), GRID)
    gc.collect()
    [(text, size)] = made
    assert text() is None
    assert sum(p.numel() for p in teacher.parameters()) == size


def test_the_term_costs_no_more_than_the_plain_image_pass() -> None:
    """Operations of ViT-B/16 at 50 % masking and a teacher of its size, forward and backward."""
    with torch.device("meta"):
        student = expose_tokens(VisionTransformer(224, 16, 768, 12, 12, 4.0))
        predictor = LatentPredictor(student, tokens(768, 1, True), width=384, depth=4, heads=6, predicts_seen=True)
        image_BCHW = torch.empty(1, 3, 224, 224)
        visible_BV, masked_BM = torch.empty(1, 98, dtype=torch.long), torch.empty(1, 98, dtype=torch.long)

    def count(run: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return int(counter.get_total_flops())

    def predict() -> None:
        latent = student(image_BCHW, visible_BV, image=False, latents=True).latent_BTW
        sum(out.sum() for out in predictor(latent, visible_BV, masked_BM)).backward()

    def teach() -> None:
        with torch.no_grad():
            student(image_BCHW, image=False, latents=True)

    plain = count(lambda: student(image_BCHW).image_BD.sum().backward())
    visible = count(lambda: student(image_BCHW, visible_BV).image_BD.sum().backward())
    whole_term = count(predict) + count(teach)
    assert 0.45 * plain < visible < 0.51 * plain
    assert whole_term < 0.9 * plain
    assert whole_term - visible - count(teach) < 0.06 * plain  # the predictor
