"""Reference alignment costs nothing once training is over: no parameters, no modules, no calls of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from refalign_ext.backbone import WAN_CONFIGS, ReferenceBackbone, WanModel
from refalign_ext.guidance import required_branches
from refalign_ext.pipeline import R2VPipeline
from tests.helpers.tiny_checkpoint import dit_settings
from wan.modules import model as model_module

ROOT = Path(__file__).resolve().parents[1]
LAYERS = WAN_CONFIGS["r2v-tiny"].num_layers
STEPS = 2
SMALL = {"size": (32, 24), "frame_num": 5, "seed": 0, "sample_steps": STEPS, "progress": False}
# the model sees two latent frames of 8 x 6 cells, 4 x 3 tokens each
VIDEO_TOKENS, TOKENS_PER_REFERENCE = 24, 12
# training's parts, none of which generation may load; the teacher's class is in transformers' modeling_dinov3_vit
TRAINING_ONLY = (
    *("projectors", "teachers", "losses", "timesteps", "training", "checkpoint", "planning", "data"),
    *("sprites", "evaluation", "distributed"),
)


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path) -> R2VPipeline:
    return R2VPipeline.from_pretrained(tiny_checkpoint, task="r2v-tiny", device="cpu")


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (40, 30), color) for color in ("red", "blue", "green")[:count]]


@pytest.fixture
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(queries, keys) of every call of the attention function, in tokens."""
    calls: list[tuple[int, int]] = []
    attention = model_module.attention

    def counting(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((q.shape[1], k.shape[1]))
        return attention(q, k, v, *args, **kwargs)

    monkeypatch.setattr(model_module, "attention", counting)
    return calls


def test_the_pipeline_holds_a_wan_model_and_nothing_more(pipeline: R2VPipeline) -> None:
    with torch.device("meta"):
        plain = WanModel(model_type="t2v", **dit_settings(pipeline.config))
    model = pipeline.backbone.model
    assert type(model) is WanModel
    shapes = {name: weight.shape for name, weight in plain.state_dict().items()}
    assert {name: weight.shape for name, weight in model.state_dict().items()} == shapes
    wanted = sum(parameter.numel() for parameter in plain.parameters())
    assert sum(parameter.numel() for parameter in pipeline.backbone.parameters()) == wanted
    modules = [type(module) for module in model.modules()]
    assert modules == [type(module) for module in plain.modules()]
    held = [value for value in vars(pipeline).values() if isinstance(value, nn.Module)]
    assert held == [pipeline.backbone]


def test_generation_loads_no_part_of_training(tiny_checkpoint: Path) -> None:
    script = f"""
import json, sys
from PIL import Image
from refalign_ext.pipeline import R2VPipeline
pipeline = R2VPipeline.from_pretrained({str(tiny_checkpoint)!r}, task="r2v-tiny", device="cpu")
result = pipeline.generate("up", [Image.new("RGB", (40, 30), "red")], **{SMALL!r})
print(json.dumps([list(result.video.shape), sorted(sys.modules)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    shape, loaded = json.loads(done.stdout.splitlines()[-1])
    assert shape == [3, 5, 24, 32]
    assert "refalign_ext.backbone" in loaded
    parts = {name.split(".")[1] for name in loaded if name.startswith("refalign_ext.")}
    assert parts.isdisjoint(TRAINING_ONLY), parts.intersection(TRAINING_ONLY)
    unwanted = ("transformers.models.dinov3_vit.modeling", "tensorboard")
    assert not [name for name in loaded if name.startswith(unwanted)]


@pytest.mark.parametrize(
    ("count", "scales"),
    [(2, (5.0, 7.5)), (1, (3.0, 3.0)), (1, (1.0, 4.0)), (1, (1.0, 1.0)), (0, (5.0, 4.0)), (0, (5.0, 1.0))],
)
def test_one_batched_call_per_step(
    pipeline: R2VPipeline,
    attention_calls: list[tuple[int, int]],
    count: int,
    scales: tuple[float, float],
) -> None:
    batches: list[int] = []
    handle = pipeline.backbone.model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(args[0])), with_kwargs=True
    )
    try:
        pipeline.generate(
            "up", pictures(count), ref_guide_scale=scales[0], text_guide_scale=scales[1], **SMALL
        )
    finally:
        handle.remove()
    branches = required_branches(scales[0] if count else scales[1], scales[1])
    assert batches == [len(branches)] * STEPS
    assert len(attention_calls) == STEPS * 2 * LAYERS


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_attention_calls_of_one_pass(
    pipeline: R2VPipeline, attention_calls: list[tuple[int, int]], count: int
) -> None:
    latents, references = torch.randn(16, 2, 6, 8), torch.randn(16, count, 6, 8)
    text = torch.randn(5, 64)
    with torch.no_grad():
        pipeline.backbone([latents], torch.tensor([500.0]), [text], [references])
    tokens = VIDEO_TOKENS + count * TOKENS_PER_REFERENCE
    assert attention_calls == [(tokens, tokens), (VIDEO_TOKENS, 64)] * LAYERS


def test_only_the_text_attention_differs_in_work() -> None:
    """Rows through every linear layer: as in a plain pass, but for cross-attention's queries and outputs."""
    config = WAN_CONFIGS["r2v-tiny"]
    model = WanModel(model_type="t2v", **{**dit_settings(config), "num_layers": 2}).eval()
    rows: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda module, args, output, name=name: rows.__setitem__(
                    name, rows.get(name, 0) + output.numel() // output.shape[-1]
                )
            )
    latents, references = torch.randn(16, 2, 6, 8), torch.randn(16, 2, 6, 8)
    context, timestep = [torch.randn(5, 64)], torch.tensor([500.0])
    tokens = VIDEO_TOKENS + 2 * TOKENS_PER_REFERENCE
    with torch.no_grad():
        model([torch.cat([latents, references], 1)], t=timestep, context=context, seq_len=tokens)
        plain = dict(rows)
        rows.clear()
        ReferenceBackbone(model)([latents], timestep, context, [references])
    assert plain["blocks.0.cross_attn.q"] == tokens
    expected = {
        name: VIDEO_TOKENS if name.endswith(("cross_attn.q", "cross_attn.o")) else count
        for name, count in plain.items()
    }
    assert rows == expected
