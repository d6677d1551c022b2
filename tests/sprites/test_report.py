"""The report's rows and gates, and the grid of guidance scales: what is written, and that nothing is judged twice."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refalign_ext.sprites import judged as judged_module
from refalign_ext.sprites.evaluate import Evaluation, JudgingJob, judge_folder
from refalign_ext.sprites.guidance_grid import clips_at, judge_grid, rise
from refalign_ext.sprites.judge import METRIC_NAMES
from refalign_ext.sprites.judged import Judged, JudgedFolder
from refalign_ext.sprites.report import (
    GATES,
    ROWS,
    Gate,
    color_chance,
    gate_results,
    make_report,
)
from refalign_ext.sprites.world import render_clip, sample_clip, sample_reference, subjects_of
from tests.helpers import tiny_checkpoint as checkpoints

QUICK = JudgingJob(clips=2, sample_steps=1)


class Counting:
    """`judge_folder` on real clips of the job, counting the calls: generating them would only take longer."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, JudgingJob]] = []

    def __call__(self, folder: Path, what: str, job: JudgingJob, **settings: object) -> Evaluation:
        self.asked.append((what, job))
        found = Evaluation()
        for index in range(job.clips):
            rng = np.random.default_rng([job.seed, job.subjects, index])
            clip = sample_clip(rng, subjects_of(job.split), job.subjects)
            references = [sample_reference(rng, performance, 48, 48) for performance in clip.performances]
            shown = clip
            if job.references == "shuffled" or (job.ref_guide_scale or 9) < 3:
                shown = sample_clip(np.random.default_rng(index), subjects_of("palette"), job.subjects)
            video, _ = render_clip(shown, 9, 48, 48)
            found.add(video, clip, references)
        return found


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting()
    monkeypatch.setattr(judged_module, "judge_folder", counting)
    return counting


def test_a_generated_row_is_judged_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    first = JudgedFolder(tiny_checkpoint).judge("generation", QUICK, tmp_path / "row")
    assert first.is_new and first.sheet == tmp_path / "row.png" and Image.open(first.sheet).width > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["row.json", "row.png"]
    assert set(first.answers) == set(first.table) == set(METRIC_NAMES)
    assert [len(clip) for clip in first.answers["colors"]] == [1, 1]
    again = JudgedFolder(tiny_checkpoint).judge("generation", QUICK, tmp_path / "row")
    assert not again.is_new and (again.table, again.answers) == (first.table, first.answers)


def test_anything_that_answers_depend_on_makes_them_new(
    tiny_checkpoint: Path, tmp_path: Path, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, stem = JudgedFolder(tiny_checkpoint), tmp_path / "row"

    def is_new(folder: JudgedFolder, what: str = "generation", job: JudgingJob = QUICK) -> bool:
        return folder.judge(what, job, stem).is_new

    assert is_new(folder) and not is_new(folder)
    assert is_new(folder, job=replace(QUICK, seed=8)) and is_new(folder, what="reconstruction")
    assert not is_new(folder, what="reconstruction")
    assert is_new(folder) and not is_new(folder)
    other = checkpoints.build(tmp_path / "other", seed=1)
    assert is_new(JudgedFolder(tiny_checkpoint, dit_ckpt=other))
    assert is_new(folder)
    monkeypatch.setitem(folder.task, "ref_guide_scale", 2.5)
    assert is_new(folder)
    code = tmp_path / "judge.py"
    code.write_text("another judge")
    monkeypatch.setattr(judged_module.judge_module, "__file__", str(code))
    assert is_new(folder) and not is_new(folder)
    (tmp_path / "row.png").unlink()
    assert is_new(folder)
    (tmp_path / "row.json").write_text("[1")
    assert is_new(folder)


def test_report_has_every_row_and_gate_and_resumes(
    tiny_checkpoint: Path, tmp_path: Path, counting: Counting
) -> None:
    judge = JudgedFolder(tiny_checkpoint)
    path = make_report(judge, QUICK, tmp_path)
    assert counting.asked == [(row.what, row.job(QUICK)) for row in ROWS]
    entry = json.loads((tmp_path / "report.json").read_text())
    assert entry["base"] == asdict(QUICK) and list(entry["rows"]) == [row.name for row in ROWS]
    # Real clips meet every gate; the last one is the control's, for which the stand-in shows other subjects.
    assert len(entry["gates"]) == len(GATES) and all(gate["met"] for gate in entry["gates"])
    assert entry["gates"][-1]["figure"]["share"] == 0.0
    text = path.read_text()
    assert f"{len(GATES)} of {len(GATES)} gates met" in text and "not met" not in text
    for row in ROWS:
        assert (
            f"![{row.title}](rows/{row.name}.png)" in text
            and (tmp_path / "rows" / f"{row.name}.png").is_file()
        )
    (tmp_path / "rows" / "generation-2.json").unlink()
    counting.asked.clear()
    make_report(judge, QUICK, tmp_path)
    assert counting.asked == [("generation", replace(QUICK, subjects=2))] and path.read_text() == text


def test_gates_are_those_of_rows_that_are_judged_and_can_fail() -> None:
    names = {row.name for row in ROWS}
    assert len(names) == len(ROWS) and all(
        gate.row in names and gate.metric in METRIC_NAMES for gate in GATES
    )
    assert Gate("a", "colors", 0.7).is_met(0.7) and not Gate("a", "colors", 0.7).is_met(0.69)
    assert Gate("a", "swapped", 0.1, at_most=True).is_met(0.1)
    assert not Gate("a", "swapped", 0.1, at_most=True).is_met(0.11)
    row = {"share": 0.5, "low": 0.4, "high": 0.6, "count": 9}
    half = Judged({}, dict.fromkeys(METRIC_NAMES, row), Path(), True)
    assert not any(result["met"] for result in gate_results(dict.fromkeys(names, half)))
    nothing = Judged({}, dict.fromkeys(METRIC_NAMES), Path(), True)
    assert not any(result["met"] for result in gate_results(dict.fromkeys(names, nothing)))
    assert 1 / 15 < color_chance() < 0.15


def test_grid_of_scales(tiny_checkpoint: Path, tmp_path: Path, counting: Counting) -> None:
    judge = JudgedFolder(tiny_checkpoint)
    job = JudgingJob(clips=3, seed=7)
    entry = judge_grid(judge, job, (1, 9, 5), (7.5, 1), tmp_path)
    scales = [(found.ref_guide_scale, found.text_guide_scale) for _, found in counting.asked]
    assert scales == [(1, 1), (1, 7.5), (5, 1), (5, 7.5), (9, 1), (9, 7.5)]
    assert entry["scales"] == {"image": [1, 5, 9], "text": [1, 7.5]}
    assert json.loads((tmp_path / "guidance.json").read_text()) == entry
    text = (tmp_path / "guidance.md").read_text()
    # The stand-in shows the references' subjects from an image scale of 3 on, whatever the text scale.
    assert "| image 1 to 9 | colors | 0.0 | 100.0 | +100.0 [+100, +100] | 100.0 at 5" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| image 1 to 9 | colors")]
    assert line.endswith("| rises |")
    (line,) = [line for line in text.splitlines() if line.startswith("| text 1 to 7.5 | motion")]
    assert line.endswith("| **does not rise** |")
    assert Image.open(tmp_path / "guidance.png").width > 800
    assert (tmp_path / "cells" / "image-5-text-7.5.png").is_file()
    (tmp_path / "cells" / "image-5-text-7.5.json").unlink()
    counting.asked.clear()
    judge_grid(judge, job, (1, 5, 9), (1, 7.5), tmp_path)
    assert len(counting.asked) == 1 and (tmp_path / "guidance.md").read_text() == text


def cells(image: dict[float, list[bool]]) -> dict[tuple[float, float], Judged]:
    """A grid in which only the image scale counts: for each scale the answers of single-subject clips."""
    found = {}
    for scale, answers in image.items():
        for text in (1.0, 9.0):
            given = {"colors": [[answer] for answer in answers], "swapped": [[None] for _ in answers]}
            found[scale, text] = Judged(given, {}, Path(), True)
    return found


def test_differences_are_paired_by_clip() -> None:
    grid = cells(
        {1.0: [False, False, True, False], 5.0: [True, True, True, True], 9.0: [True, True, False, True]}
    )
    found = rise(grid, "image", "colors")
    assert found["shares"] == {"1": 0.25, "5": 1.0, "9": 0.75} and found["best"] == 5.0
    assert found["lowest_to_best"]["mean"] == pytest.approx(0.75)
    gap = found["lowest_to_highest"]
    # Clips changed by +1, +1, -1, +1.
    assert gap["mean"] == pytest.approx(0.5) and gap["high"] - gap["mean"] == pytest.approx(1.96 * 1 / 2)
    flat = rise(grid, "text", "colors")["lowest_to_highest"]
    assert (flat["mean"], flat["low"], flat["high"]) == (0, 0, 0)
    assert rise(grid, "image", "swapped")["lowest_to_highest"] is None
    assert np.isnan(clips_at(grid, "image", 1.0, "swapped")).all()
    assert clips_at(grid, "image", 1.0, "colors").tolist() == [
        0,
        0,
        1,
        0,
    ]  # clips, not clips times text scales


@pytest.mark.parametrize("scales", [(5.0,), (1.0, 1.0), (-1.0, 2.0), (1.0, float("nan"))])
def test_scales_that_make_no_grid_are_refused(tiny_checkpoint: Path, tmp_path: Path, scales: tuple) -> None:
    with pytest.raises(ValueError, match="--text_scales"):
        judge_grid(JudgedFolder(tiny_checkpoint), QUICK, (1, 5), scales, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_precision_generates_the_same_but_for_rounding(tiny_checkpoint: Path) -> None:
    full, half = (
        np.stack(
            judge_folder(
                tiny_checkpoint,
                "generation",
                JudgingJob(2, sample_steps=2),
                precision=precision,
                progress=False,
            ).videos
        ).astype(int)
        for precision in ("fp32", "bf16")
    )
    difference = np.abs(full - half)
    assert difference.max() > 0 and difference.mean() < 2 < full.std()
