"""TokenLayout against loops over single tokens, on random batches."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from refalign_ext.layout import SampleLayout, TokenLayout

PATCH = (1, 2, 2)


def tensors(
    samples: list[SampleLayout], patch: tuple[int, int, int] = PATCH
) -> tuple[list[Tensor], list[Tensor]]:
    """Latents and references of the given layouts, four channels each."""
    sizes = [(sample.height * patch[1], sample.width * patch[2]) for sample in samples]
    latents = [torch.zeros(4, sample.frames, *size) for sample, size in zip(samples, sizes, strict=True)]
    references = [
        torch.zeros(4, sample.references, *size) for sample, size in zip(samples, sizes, strict=True)
    ]
    return latents, references


def random_samples(seed: int, one_grid: bool) -> list[SampleLayout]:
    draw = random.Random(seed)
    grid = (draw.randint(1, 4), draw.randint(1, 4))
    return [
        SampleLayout(
            draw.randint(1, 4),
            draw.choice((0, 0, 1, 2, 3, 8)),
            *(grid if one_grid else (draw.randint(1, 4), draw.randint(1, 4))),
        )
        for _ in range(draw.randint(1, 5))
    ]


def token_kinds(sample: SampleLayout, seq_len: int) -> list[tuple[str, int, int]]:
    """What every token of a padded sample is: (kind, number of the frame or reference, place in the frame)."""
    per_frame = sample.height * sample.width
    kinds = [("video", frame, place) for frame in range(sample.frames) for place in range(per_frame)]
    kinds += [("reference", m, place) for m in range(sample.references) for place in range(per_frame)]
    return kinds + [("padding", 0, 0)] * (seq_len - len(kinds))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("multiple", [1, 2, 8])
def test_masks_and_sizes_equal_a_loop(seed: int, multiple: int) -> None:
    samples = random_samples(seed, one_grid=False)
    layout = TokenLayout.of(*tensors(samples), PATCH, multiple)
    assert layout.samples == tuple(samples)
    longest = max((s.frames + s.references) * s.height * s.width for s in samples)
    assert layout.seq_len % multiple == 0
    assert longest <= layout.seq_len < longest + multiple

    videos = layout.video_token_mask()
    assert videos.dtype == torch.bool
    assert videos.shape == (len(samples), layout.seq_len)
    for row, sample in zip(videos, samples, strict=True):
        kinds = token_kinds(sample, layout.seq_len)
        assert row.tolist() == [kind == "video" for kind, _, _ in kinds]
        assert sample.video_tokens == sum(kind == "video" for kind, _, _ in kinds)
        assert sample.reference_tokens == sum(kind == "reference" for kind, _, _ in kinds)
        assert sample.tokens == sample.video_tokens + sample.reference_tokens
    assert layout.most_video_tokens == int(videos.sum(1).max())
    assert layout.is_uniform == (len(set(videos.sum(1).tolist())) == 1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("same", [False, True], ids=["samples differ", "samples alike"])
def test_gather_references_equals_a_loop(seed: int, same: bool) -> None:
    samples = random_samples(seed, one_grid=True)
    if same:
        samples = samples[:1] * len(samples)
    layout = TokenLayout.of(*tensors(samples), PATCH, multiple=4)
    tokens = torch.randn(len(samples), layout.seq_len, 3, generator=torch.Generator().manual_seed(seed))
    gathered = layout.gather_references(tokens)
    most = max(sample.references for sample in samples)
    expected = torch.zeros(len(samples), most, samples[0].tokens_per_frame, 3)
    for b, sample in enumerate(samples):
        for place_in_row, (kind, m, place) in enumerate(token_kinds(sample, layout.seq_len)):
            if kind == "reference":
                expected[b, m, place] = tokens[b, place_in_row]
    assert torch.equal(gathered, expected)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_reference_spans_and_cuts_equal_a_loop(seed: int, ranks: int) -> None:
    samples = random_samples(seed, one_grid=False)
    layout = TokenLayout.of(*tensors(samples), PATCH, multiple=ranks)
    tokens = torch.randn(len(samples), layout.seq_len, 3, generator=torch.Generator().manual_seed(seed))
    pieces: list[list[Tensor]] = [[] for _ in samples]
    ranges = [layout.tokens_of_rank(rank, ranks) for rank in range(ranks)]
    assert {len(held) for held in ranges} == {layout.seq_len // ranks}
    assert [token for held in ranges for token in range(held.start, held.stop)] == list(range(layout.seq_len))
    for held in ranges:
        spans = layout.reference_spans(held)
        mine = tokens[:, held.start : held.stop]
        cut = layout.cut_references(mine, held)
        expected = []
        for b, (sample, (first, count)) in enumerate(zip(samples, spans, strict=True)):
            kinds = token_kinds(sample, layout.seq_len)
            places = [i for i in range(held.start, held.stop) if kinds[i][0] == "reference"]
            flat = [kinds[i][1] * sample.tokens_per_frame + kinds[i][2] for i in places]
            assert flat == list(range(first, first + count))
            assert count or first == 0
            expected += [tokens[b, i] for i in places]
            pieces[b] += [tokens[b, i] for i in places]
        assert cut.shape == (len(expected), 3)
        assert torch.equal(cut, torch.stack(expected) if expected else torch.zeros(0, 3))
    for row, sample, piece in zip(tokens, samples, pieces, strict=True):
        whole = row[sample.video_tokens : sample.tokens]
        assert torch.equal(torch.stack(piece) if piece else torch.zeros(0, 3), whole)


def test_different_grids_cannot_be_gathered() -> None:
    layout = TokenLayout.of(*tensors([SampleLayout(1, 1, 2, 3), SampleLayout(1, 1, 3, 2)]), PATCH)
    assert layout.is_uniform, "6 video tokens each, and yet the grids differ"
    with pytest.raises(ValueError, match=r"different grids \[\(2, 3\), \(3, 2\)\]"):
        layout.gather_references(torch.zeros(2, layout.seq_len, 1))
    with pytest.raises(ValueError, match="bucket by size"):
        layout.require_one_grid()


def test_other_patches() -> None:
    samples = [SampleLayout(2, 1, 3, 5)]
    layout = TokenLayout.of(*tensors(samples, (1, 4, 1)), (1, 4, 1))
    assert layout == TokenLayout(tuple(samples), 45) and hash(layout) == hash(TokenLayout(tuple(samples), 45))


GOOD = torch.zeros(4, 2, 4, 6)


@pytest.mark.parametrize(
    ("latents", "references", "patch", "message"),
    [
        ([GOOD], [], PATCH, "1 latents, references for 0 samples"),
        ([], [], PATCH, "the batch is empty"),
        ([GOOD], [GOOD], (2, 2, 2), r"\(2, 2, 2\) merges frames"),
        ([GOOD, GOOD], [GOOD, GOOD[0]], PATCH, r"sample 1: .*\[C, M, H, W\]"),
        ([GOOD[None]], [GOOD[None]], PATCH, r"sample 0: .*\[C, F, H, W\]"),
        ([GOOD], [GOOD[:3]], PATCH, r"references \(3, 2, 4, 6\)"),
        ([GOOD], [GOOD[:, :, :2]], PATCH, r"references \(4, 2, 2, 6\) .*of the same C, H and W"),
        ([GOOD[:, :0]], [GOOD], PATCH, "hold no video"),
        ([GOOD[..., :0]], [GOOD[..., :0]], PATCH, "hold no video"),
        ([GOOD[..., :5]], [GOOD[..., :5]], PATCH, "do not divide by the patch"),
        ([GOOD[:, :, :3]], [GOOD[:, :, :3]], PATCH, "do not divide by the patch"),
    ],
)
def test_mistakes_are_named(
    latents: list[Tensor], references: list[Tensor], patch: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TokenLayout.of(latents, references, patch)
