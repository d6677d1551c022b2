"""The reference-to-video pipeline and the plain Wan task on a random checkpoint in upstream's layout."""

from __future__ import annotations

import copy
import dataclasses
import logging
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from refalign_ext.backbone import WAN_CONFIGS
from refalign_ext.guidance import dual_guidance
from refalign_ext.pipeline import R2VPipeline
from refalign_ext.references import reference_to_tensor
from refalign_ext.tasks import TASKS
from wan.sampling import initial_noise
from wan.text2video import WanT2V

PROMPT = "a large circle moves right"
FEW = {"size": (32, 24), "frame_num": 5, "sample_steps": 2, "progress": False}


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path) -> R2VPipeline:
    return R2VPipeline.from_pretrained(tiny_checkpoint, task="r2v-tiny", device="cpu")


@pytest.fixture(scope="module")
def text_to_video(tiny_checkpoint: Path) -> WanT2V:
    return WanT2V(WAN_CONFIGS["r2v-tiny"], tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def references() -> list[Image.Image]:
    return [Image.new("RGB", (60, 40), "red"), Image.new("RGB", (40, 50), "blue")]


@pytest.fixture
def batch_sizes(pipeline: R2VPipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch size of every call of the DiT."""
    sizes: list[int] = []
    forward = pipeline.backbone.forward

    def counting(latents, *args, **kwargs):  # noqa: ANN001, ANN202
        sizes.append(len(latents))
        return forward(latents, *args, **kwargs)

    monkeypatch.setattr(pipeline.backbone, "forward", counting)
    return sizes


def test_result_and_settings(pipeline: R2VPipeline, references: list[Image.Image]) -> None:
    result = pipeline.generate(PROMPT, references, seed=1, **FEW)
    assert result.video.shape == (3, 5, 24, 32)
    assert result.video.dtype == torch.float32
    assert result.video.abs().max() <= 1
    assert [image.size for image in result.references] == [(32, 24)] * 2
    assert result.settings["seed"] == 1
    assert result.settings["sample_solver"] == "euler"
    for name in ("ref_guide_scale", "text_guide_scale"):
        assert result.settings[name] == getattr(pipeline.task, name) > 1
    assert set(result.timings) == {"prepare", "denoise", "decode"}
    assert result.peak_memory > 0


def test_seed_and_references_decide(pipeline: R2VPipeline, references: list[Image.Image]) -> None:
    def video(images: list[Image.Image], seed: int, prompt: str = PROMPT) -> torch.Tensor:
        return pipeline.generate(prompt, images, seed=seed, **FEW).video

    first = video(references, 1)
    assert torch.equal(first, video(references, 1))
    others = (
        video(references, 2),
        video(references[::-1], 1),
        video(references[:1], 1),
        video(references, 1, "up"),
    )
    assert all((first - other).abs().max() > 1e-3 for other in others)


def test_sampling_follows_equation_five(pipeline: R2VPipeline, references: list[Image.Image]) -> None:
    task = pipeline.task
    scales = {"ref_guide_scale": 5.0, "text_guide_scale": 7.5, "sample_steps": 3, "sample_shift": 5.0}
    request = task.open(task.request(PROMPT, references, negative_prompt="a small star", **scales))
    conditions = pipeline.prepare(request)
    noise = initial_noise((16, 3, 12, 12), 3)
    seen: list[torch.Tensor] = []
    latents = pipeline.denoise(
        noise, conditions, request, progress=False, callback=lambda step, latents: seen.append(latents)
    )
    assert len(seen) == 3 and seen[-1] is latents

    def evaluate(sample: torch.Tensor, time: float, text: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        return pipeline.backbone([sample], torch.tensor([time]), [text], [clean]).prediction[0]

    def by_hand(null_references: torch.Tensor) -> torch.Tensor:
        sample = noise
        sigmas = [5 * s / (1 + 4 * s) for s in (1.0, 2 / 3, 1 / 3, 0.0)]
        for sigma, following in pairwise(sigmas):
            negative, prompt, clean = conditions.negative_prompt, conditions.prompt, conditions.references
            velocity = dual_guidance(
                evaluate(sample, 1000 * sigma, negative, null_references),
                evaluate(sample, 1000 * sigma, negative, clean),
                evaluate(sample, 1000 * sigma, prompt, clean),
            )
            sample = sample + (following - sigma) * velocity
        return sample

    with torch.no_grad():
        torch.testing.assert_close(
            latents, by_hand(torch.zeros_like(conditions.references)), atol=2e-4, rtol=1e-4
        )
        # The null reference keeps its tokens: leaving them out is something else.
        without_tokens = by_hand(conditions.references[:, :0])
    assert (latents - without_tokens).abs().max() > 1e-2


def test_each_reference_is_encoded_alone(pipeline: R2VPipeline, references: list[Image.Image]) -> None:
    request = pipeline.task.open(pipeline.task.request(PROMPT, references))
    together = pipeline.prepare(request).references
    assert together.shape == (16, 2, 12, 12)
    for index, reference in enumerate(request.references):
        alone = pipeline.vae.encode([reference_to_tensor(reference.image)[:, None]])[0]
        torch.testing.assert_close(together[:, index : index + 1], alone, atol=1e-6, rtol=0)


def test_branches_one_by_one_give_the_same(
    pipeline: R2VPipeline,
    references: list[Image.Image],
    batch_sizes: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    scales = {"ref_guide_scale": 5.0, "text_guide_scale": 7.5}
    together = pipeline.generate(PROMPT, references, seed=4, **scales, **FEW)
    assert batch_sizes == [3, 3]
    assert "peak memory" not in caplog.text
    batch_sizes.clear()
    monkeypatch.setattr(pipeline, "offload_model", True)
    apart = pipeline.generate(PROMPT, references, seed=4, **scales, **FEW)
    assert batch_sizes == [1] * 6
    assert "peak memory" in caplog.text
    torch.testing.assert_close(together.video, apart.video, atol=1e-4, rtol=0)


def test_branches_that_do_not_fit_together_run_one_by_one(
    pipeline: R2VPipeline,
    references: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    scales = {"ref_guide_scale": 5.0, "text_guide_scale": 7.5}
    expected = pipeline.generate(PROMPT, references, seed=4, **scales, **FEW).video
    forward = pipeline.backbone.forward
    failures = []

    def small_memory(latents, *args, **kwargs):  # noqa: ANN001, ANN202
        if len(latents) > 1:
            failures.append(len(latents))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return forward(latents, *args, **kwargs)

    monkeypatch.setattr(pipeline.backbone, "forward", small_memory)
    with caplog.at_level(logging.INFO):
        video = pipeline.generate(PROMPT, references, seed=4, **scales, **FEW).video
    assert failures == [3]
    assert "one by one" in caplog.text
    torch.testing.assert_close(video, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++"])
def test_no_references_is_plain_text_to_video(
    pipeline: R2VPipeline, text_to_video: WanT2V, solver: str
) -> None:
    r2v = pipeline.generate(PROMPT, seed=5, sample_solver=solver, text_guide_scale=4.0, **FEW)
    t2v = text_to_video.generate(
        PROMPT,
        size=FEW["size"],
        frame_num=5,
        shift=WAN_CONFIGS["r2v-tiny"].sample_shift,
        sample_solver=solver,
        sampling_steps=2,
        guide_scale=4.0,
        seed=5,
        progress=False,
    )
    assert r2v.references == []
    torch.testing.assert_close(r2v.video, t2v, atol=1e-4, rtol=0)


def test_text_to_video_tasks_run_without_references(tiny_checkpoint: Path, text_to_video: WanT2V) -> None:
    config = copy.deepcopy(WAN_CONFIGS["t2v-1.3B"])
    sizes = WAN_CONFIGS["r2v-tiny"]
    config.update({name: sizes[name] for name in sizes if name in config})
    task = dataclasses.replace(TASKS["t2v-1.3B"], sizes=("48*32",), size=(48, 32))
    pipeline = R2VPipeline.from_pretrained(tiny_checkpoint, task=task, config=config, device="cpu")
    settings = {"size": (48, 32), "frame_num": 5, "sample_solver": "unipc", "seed": 5, "progress": False}
    video = pipeline.generate(
        PROMPT, sample_steps=2, sample_shift=3.0, sample_guide_scale=4.0, **settings
    ).video
    expected = text_to_video.generate(PROMPT, shift=3.0, sampling_steps=2, guide_scale=4.0, **settings)
    torch.testing.assert_close(video, expected, atol=1e-4, rtol=0)


def test_text_to_image_and_guidance_of_one(text_to_video: WanT2V, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = text_to_video.model.forward

    def counting(*args, **kwargs):  # noqa: ANN002, ANN003, ANN202
        calls.append(kwargs["seq_len"])
        return forward(*args, **kwargs)

    monkeypatch.setattr(text_to_video.model, "forward", counting)
    settings = {"size": (48, 48), "frame_num": 1, "sampling_steps": 3, "seed": 0, "progress": False}
    image = text_to_video.generate(PROMPT, guide_scale=1.0, **settings)
    assert image.shape == (3, 1, 48, 48)
    assert calls == [36] * 3
    other = text_to_video.generate(PROMPT, guide_scale=2.0, n_prompt="a small star", **settings)
    assert len(calls) == 9
    assert not torch.equal(image, other)


def test_half_precision_is_close(tiny_checkpoint: Path, references: list[Image.Image]) -> None:
    videos = [
        R2VPipeline.from_pretrained(tiny_checkpoint, device="cpu", dtype=dtype, t5_cpu=True)
        .generate(PROMPT, references[:1], seed=2, ref_guide_scale=1.0, text_guide_scale=1.0, **FEW)
        .video
        for dtype in ("fp32", "bf16")
    ]
    difference = (videos[0] - videos[1]).abs()
    assert 0 < difference.mean() < 0.02


def test_mistakes_are_named(pipeline: R2VPipeline, references: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match="9 references given: at most 8"):
        pipeline.generate(PROMPT, references[:1] * 9)
    with pytest.raises(ValueError, match="3 roles for 2 references"):
        pipeline.generate(PROMPT, references, roles=["face"] * 3)
    with pytest.raises(ValueError, match="nearest valid size is 48\\*48"):
        pipeline.generate(PROMPT, references, size=(50, 48))
    with pytest.raises(ValueError, match="5 or 9"):
        pipeline.generate(PROMPT, references, frame_num=8)
    with pytest.raises(ValueError, match="r2v-tny: unknown, did you mean r2v-tiny"):
        R2VPipeline.from_pretrained("nowhere", task="r2v-tny")
    with pytest.raises(ValueError, match="nowhere.*no such checkpoint folder"):
        R2VPipeline.from_pretrained("nowhere")


def test_all_missing_files_are_listed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    config = WAN_CONFIGS["r2v-tiny"]
    (folder / config.vae_checkpoint).unlink()
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    shutil.rmtree(folder / config.t5_tokenizer)
    names = (config.vae_checkpoint, "tokenizer.json", "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError) as caught:
        R2VPipeline.from_pretrained(folder)
    assert all(name in str(caught.value) for name in names)
    assert config.t5_checkpoint not in str(caught.value)

    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "shard-1.safetensors"}}'
    )
    with pytest.raises(ValueError, match=r"shard-1\.safetensors"):
        WanT2V(config, folder, device="cpu")


def test_other_dit_weights(tiny_checkpoint: Path, tmp_path: Path, references: list[Image.Image]) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny_checkpoint / "diffusion_pytorch_model.safetensors"
    weights = {f"pipe.dit.{name}": tensor * 0.9 for name, tensor in load_file(source).items()}
    save_file(weights, tmp_path / "release.safetensors")
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns("diffusion*"))
    other = R2VPipeline.from_pretrained(folder, device="cpu", dit_ckpt=tmp_path / "release.safetensors")
    weight = other.backbone.model.head.head.weight
    torch.testing.assert_close(weight, weights["pipe.dit.head.head.weight"])


def test_modes_for_several_processes_are_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="t5_fsdp, use_usp need several processes.*torchrun"):
        WanT2V(WAN_CONFIGS["r2v-tiny"], tiny_checkpoint, t5_fsdp=True, use_usp=True)
