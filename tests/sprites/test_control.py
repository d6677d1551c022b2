"""Jobs with shuffled references: the control that a model which copies its references must fail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from refalign_ext.backbone import WAN_CONFIGS
from refalign_ext.sprites.evaluate import JudgingJob, SpriteEvaluator
from refalign_ext.sprites.pixels import to_video_tensor
from refalign_ext.sprites.world import SpriteClip, render_clip

TASK = WAN_CONFIGS["r2v-tiny"]


class Vae:
    device = torch.device("cpu")


class Copyist(SpriteEvaluator):
    """A model that does all that its prompt says with the colours and patterns of the references it is given."""

    def __init__(self) -> None:
        super().__init__(TASK, Vae(), lambda prompts: [])  # type: ignore[arg-type]

    def _sample(self, backbone, job: JudgingJob, start: int, drawn: list, reference_input) -> Tensor:  # noqa: ANN001
        own = {id(references): clip for clip, references in (self.kept[i] for i in range(job.clips))}
        videos = []
        for clip, references in drawn:
            shown = own[id(references)].performances
            cast = tuple(
                replace(wanted, subject=replace(given.subject, shape=wanted.subject.shape))
                for wanted, given in zip(clip.performances, shown, strict=True)
            )
            videos.append(render_clip(replace(clip, performances=cast), TASK.frame_num, 48, 48)[0])
        return torch.stack([to_video_tensor(video) for video in videos])

    def draw_all(self, job: JudgingJob) -> list:
        self.kept: dict[int, tuple[SpriteClip, list]] = {}
        return super().draw_all(job)

    def draw(self, job: JudgingJob, index: int) -> tuple[SpriteClip, list]:
        self.kept[index] = super().draw(job, index)
        return self.kept[index]


class Model(nn.Module):
    """Only what the attachment of references asks for; `Copyist` runs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.head = self.patch_embedding = nn.Identity()
        self.patch_size, self.num_heads, self.dim = (1, 2, 2), 1, 8
        block = nn.Module()
        block.self_attn = block.cross_attn = block.ffn = nn.Identity()
        block.modulation = nn.Parameter(torch.zeros(1))
        self.blocks.append(block)


@pytest.mark.parametrize("subjects", [1, 2])
def test_a_copyist_is_right_with_its_own_references_and_below_chance_with_shuffled_ones(
    subjects: int,
) -> None:
    tables = {
        references: Copyist()
        .generate(Model(), JudgingJob(30, subjects, seed=3, references=references))
        .table()
        for references in ("own", "shuffled")
    }
    own, shuffled = tables["own"], tables["shuffled"]
    for name in ("colors", "pattern", "motion", "background"):
        assert own[name]["share"] > 0.95, name
    assert shuffled["colors"]["share"] <= 1 / 15  # of fifteen pairs of six colours
    assert shuffled["pattern"]["share"] <= 1 / 45
    for name in (
        "found",
        "motion",
        "background",
        "size",
    ):  # what the prompt says is none of the references' business
        assert shuffled[name]["share"] > 0.95, name


def test_shuffled_references_are_those_of_another_clip_of_other_colours() -> None:
    evaluator = Copyist()
    own = evaluator.draw_all(JudgingJob(30))
    given = evaluator.draw_all(JudgingJob(30, references="shuffled"))
    assert [clip for clip, _ in own] == [clip for clip, _ in given]
    for (clip, mine), (_, theirs) in zip(own, given, strict=True):
        shown = next(c for c, references in own if np.array_equal(references[0][0], theirs[0][0]))
        assert not np.array_equal(mine[0][0], theirs[0][0])
        assert not shown.performances[0].subject.colors & clip.performances[0].subject.colors


def test_cut_out_references_have_the_tilt_of_their_clip() -> None:
    evaluator = Copyist()
    for pair, same in (("regular", True), ("cross", False)):
        for clip, references in evaluator.draw_all(JudgingJob(10, pair=pair)):
            assert (references[0][1] == clip.performances[0].angle) == same
            assert (clip.performances[0].angle != 0) == same


def test_one_clip_cannot_be_shuffled() -> None:
    with pytest.raises(ValueError, match="2 clips or more"):
        JudgingJob(1, references="shuffled")
