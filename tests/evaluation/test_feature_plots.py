"""Reference tokens: the numbers know clusters from noise, and what is drawn is what the model computed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from refalign_ext.backbone import WAN_CONFIGS
from refalign_ext.evaluation import feature_plots
from refalign_ext.evaluation.feature_drawing import embed
from refalign_ext.evaluation.feature_plots import PlotRequest
from refalign_ext.evaluation.features import encode_samples, reference_tokens, tokens_with_content
from refalign_ext.evaluation.separability import (
    SampleTokens,
    compare_tokens,
    neighbor_accuracy,
    summarize_tokens,
    variance_ratio,
)
from refalign_ext.pipeline import R2VPipeline
from refalign_ext.sprites.feature_samples import sprite_samples
from tests.helpers import tiny_checkpoint as checkpoints

plot_features = partial(feature_plots.plot_features, make_samples=sprite_samples)
LABELS = torch.arange(3).repeat_interleave(40)
VIEWS = torch.arange(2).repeat(60)


def clusters(spread: float, seed: int = 0) -> torch.Tensor:
    """120 tokens [S, D] around three orthogonal directions."""
    noise = torch.randn(120, 16, generator=torch.Generator().manual_seed(seed))
    return torch.eye(16)[LABELS] + spread * noise


def shuffled() -> torch.Tensor:
    return LABELS[torch.randperm(120, generator=torch.Generator().manual_seed(1))]


def test_separated_clusters_score_high_and_shuffled_labels_at_chance() -> None:
    near, far = variance_ratio(clusters(0.3), LABELS), variance_ratio(clusters(0.02), LABELS)
    assert far > 50 > near > 0.3
    assert variance_ratio(clusters(0.02), shuffled()) == pytest.approx(2 / 117, abs=0.03)
    assert neighbor_accuracy(clusters(0.02), LABELS) == (1.0, pytest.approx(39 / 119))
    share, chance = neighbor_accuracy(clusters(1.0), shuffled())
    assert share == pytest.approx(chance, abs=0.12)


def test_neighbors_in_other_views_are_not_of_the_own_picture() -> None:
    # Each view of a subject points its own way, which is near no other view of the same subject.
    ways = torch.eye(16)[LABELS + 3 * VIEWS] + 0.01 * clusters(1.0)
    assert neighbor_accuracy(ways, LABELS)[0] == 1.0
    share, chance = neighbor_accuracy(ways, LABELS, VIEWS)
    assert chance == pytest.approx(1 / 3) and share < 0.7
    assert neighbor_accuracy(clusters(0.02), LABELS, VIEWS)[0] == 1.0


@pytest.mark.parametrize(
    ("tokens", "labels", "views"),
    [
        (torch.ones(4, 2), torch.zeros(4, dtype=torch.long), None),
        (torch.ones(3, 2), torch.tensor([0, 0, 1]), None),
        (torch.ones(4, 2), torch.tensor([0, 0, 1]), None),
        (torch.eye(4), torch.tensor([0, 0, 1, 1]), torch.zeros(4)),
    ],
)
def test_what_cannot_be_told_apart_is_refused(tokens, labels, views) -> None:
    with pytest.raises(ValueError):
        neighbor_accuracy(tokens, labels, views)


def test_summary_and_difference_are_over_samples() -> None:
    good = [SampleTokens(clusters(0.05, seed), LABELS, VIEWS) for seed in range(3)]
    bad = [replace(sample, references=shuffled()) for sample in good]
    numbers = summarize_tokens(good)
    assert numbers["variance_ratio"]["samples"] == 3 and numbers["variance_ratio"]["standard_error"] > 0
    assert numbers["subject_accuracy"]["mean"] == 1.0
    gap = compare_tokens(good, bad)["neighbor_accuracy"]
    assert gap["mean"] > 0.5 and gap["mean"] > 3 * gap["standard_error"]
    one = summarize_tokens([SampleTokens(clusters(0.05), LABELS, torch.zeros_like(VIEWS))])
    assert one["subject_accuracy"] is None and one["neighbor_accuracy"]["standard_error"] is None


def test_embeddings_keep_clusters_together() -> None:
    for method in ("t-SNE", "PCA"):
        points, note = embed(clusters(0.02), method, seed=0)
        assert points.shape == (120, 2) and note
        # PCA is about directions here, which t-SNE's points are not: distances are compared within the picture.
        centers = torch.stack([torch.from_numpy(points)[label == LABELS].mean(0) for label in range(3)])
        found = torch.cdist(torch.from_numpy(points), centers).argmin(1)
        assert (found == LABELS).float().mean() > 0.98
    with pytest.raises(ValueError, match="too few"):
        embed(clusters(0.1)[:3], "PCA", seed=0)


def test_white_patches_are_left_out() -> None:
    image = Image.new("RGB", (24, 16), (255, 255, 255))
    assert not tokens_with_content(image, (8, 8)).any()
    image.putpixel((9, 3), (200, 255, 255))
    image.putpixel((23, 15), (255, 255, 0))
    image.putpixel((0, 15), (252, 252, 252))
    assert tokens_with_content(image, (8, 8)).tolist() == [False, True, False, False, False, True]


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path) -> R2VPipeline:
    return R2VPipeline.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.mark.parametrize("tap", ["block", "self_attn"])
def test_tokens_are_those_that_the_backbone_taps(pipeline: R2VPipeline, tap: str) -> None:
    samples = sprite_samples(pipeline.config, clips=1, subjects=2, views=2, seed=3)
    encoded, count = encode_samples(pipeline, samples, most_tokens=1000, seed=0)
    assert count["kept"] + count["white"] == count["total"] == 2 * 2 * 36 and 0 < count["white"] < 144
    shape = tuple(encoded[0].latents.shape)
    found = reference_tokens(pipeline, encoded, blocks=(1, 4), timesteps=(600.0,), shape=shape, tap=tap)
    assert set(found) == {(600.0, 1), (600.0, 4)}
    (sample,) = found[600.0, 4]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    first = encoded[0].views[0]
    taps = pipeline.backbone(
        [0.4 * encoded[0].latents + 0.6 * noise],
        torch.tensor([600.0]),
        [first.conditions.prompt],
        [first.conditions.references],
        tap_depth=5,
        tap=tap,
    ).reference_tokens
    wanted = torch.nn.functional.normalize(taps[4][0][first.kept], dim=1)
    assert torch.allclose(sample.tokens[sample.views == 0].float(), wanted, atol=2e-3)
    assert sample.references[sample.views == 0].tolist() == first.kept.nonzero()[:, 0].tolist()


def test_thinning_out_keeps_the_same_tokens_every_time(pipeline: R2VPipeline) -> None:
    samples = sprite_samples(pipeline.config, clips=1, subjects=2, views=1, seed=3)
    (first,), count = encode_samples(pipeline, samples, most_tokens=5, seed=0)
    (again,), _ = encode_samples(pipeline, samples, most_tokens=5, seed=0)
    assert first.views[0].kept.sum(1).tolist() == [5, 5] and count["thinned"] > 0
    assert torch.equal(first.views[0].kept, again.views[0].kept)


def request(folder: Path, **changes: object) -> PlotRequest:
    usual = PlotRequest("r2v-tiny", folder, {"one": None}, clips=2, views=2, device="cpu", blocks=(0, 5))
    return replace(usual, **changes)


def test_pictures_of_ones_own_at_two_noise_levels(tiny_checkpoint: Path, tmp_path: Path) -> None:
    paths = []
    for name, color in (("red", (220, 40, 40)), ("blue", (45, 80, 230))):
        paths.append(tmp_path / f"{name}.png")
        Image.new("RGB", (60, 30), color).save(paths[-1])
    entry = plot_features(
        request(tiny_checkpoint, references=tuple(paths), prompt="a", blocks=(0,), timesteps=(400.0, 1000.0)),
        tmp_path / "out",
    )
    assert (tmp_path / "out" / "features-t400.png").is_file() and (
        tmp_path / "out" / "features-t1000.png"
    ).is_file()
    levels = entry["checkpoints"]["one"]
    assert levels["400"]["0"] != levels["1000"]["0"]
    assert entry["tokens"]["white"] > 0 and levels["400"]["0"]["subject_accuracy"] is None


def test_large_tasks_go_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """r2v-1.3B with a small network of ten blocks, in bfloat16: fewer frames, thinned tokens."""
    config = checkpoints.tiny_config(size=(64, 32))
    config.num_layers = 10
    monkeypatch.setitem(WAN_CONFIGS, "r2v-1.3B", config)
    folder = checkpoints.build(tmp_path / "large", config)
    for name, color in (("red", (220, 40, 40)), ("blue", (45, 80, 230))):
        Image.new("RGB", (64, 32), color).save(tmp_path / f"{name}.png")
    entry = plot_features(
        request(
            folder,
            task="r2v-1.3B",
            references=(tmp_path / "red.png", tmp_path / "blue.png"),
            blocks=None,
            frame_num=5,
            most_tokens=12,
            dtype="bf16",
        ),
        tmp_path / "out",
    )
    assert entry["tokens"] == {"total": 64, "white": 0, "thinned": 40, "kept": 24}
    assert list(entry["checkpoints"]["one"]["750"]) == [str(block) for block in range(10)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": (0, 6)}, "--blocks 0,6: r2v-tiny has the blocks 0 to 5"),
        ({"timesteps": (0.0,)}, "--timestep 0"),
        ({"timesteps": (1001.0,)}, "--timestep 1001"),
        ({"subjects": 1}, "--subjects 1"),
        ({"references": (Path("one.png"),)}, "--ref"),
        ({"task": "r2v-1.3B"}, "--task r2v-1.3B needs pictures"),
        ({"task": "t2v-1.3B"}, "--task t2v-1.3B.*r2v-tiny"),
    ],
)
def test_requests_that_do_not_fit_are_refused_before_anything_is_written(
    tiny_checkpoint: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plot_features(request(tiny_checkpoint, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()
