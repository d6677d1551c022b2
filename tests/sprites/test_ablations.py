"""Ablations compare what they say they compare: one change an arm, the same samples, right statistics, a control."""

from __future__ import annotations

import dataclasses
import json
import runpy
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from refalign_ext.atomic_io import locked, write_json
from refalign_ext.backbone import WAN_CONFIGS
from refalign_ext.cli.ablate import USUAL
from refalign_ext.config import TrainConfig, configure, setting_fields
from refalign_ext.data.batch import EncodedSample
from refalign_ext.evaluation.intervals import mean_and_error, paired_interval, student_t
from refalign_ext.sprites.ablations import study as study_module
from refalign_ext.sprites.ablations.arms import BLOCKS, RECIPE, TABLES, Arm
from refalign_ext.sprites.ablations.drawing import curve_of
from refalign_ext.sprites.ablations.judging import judging_jobs
from refalign_ext.sprites.ablations.report import as_markdown
from refalign_ext.sprites.ablations.study import Study, weights_sha256
from refalign_ext.sprites.ablations.summary import collect, common_seeds, summarize_study
from refalign_ext.sprites.dataset import SpriteSettings, SpriteSource
from refalign_ext.teachers import TEACHERS, load_teacher
from refalign_ext.training.randomness import sample_randomness

_PARTS = {
    "B": {"alignment.negative_weight"},
    "C": {"alignment.weight"},
    "D": {"alignment.weight", "teacher_input"},
}
# All that an arm may change of A.
ALLOWED = {
    "2": {**_PARTS, "E": {"alignment.weight", "teacher_input", "alignment.teacher_path"}},
    "copying": _PARTS,
    "3": {
        "B": {"alignment.teacher_path"},
        "C": {"alignment.teacher_path"},
        "D": {"alignment.teacher_path"},
        "E": {"alignment.teacher_path", "alignment.teacher"},
    },
    "4": {
        "K0": {"alignment.weight"},
        **{f"K{depth}": {"alignment.depth"} for depth in (1, 2, 4, 5, 6)},
    },
    "recipes": {
        "B": {"alignment.tap"},
        "C": {"timesteps"},
        "D": {"alignment.tap", "timesteps"},
        "E": {"timesteps"},
    },
}


def study_of(table: str, out: Path = Path("out"), **changes) -> Study:
    return dataclasses.replace(
        Study(table, out, seeds=3, steps=100, start_steps=50, clips=20, sample_steps=5), **changes
    )


def config_of(study: Study, arm: Arm, seed: int = 1) -> TrainConfig:
    return configure(RECIPE, study.arm_settings(arm, seed, Path("start")))


def difference(one: TrainConfig, other: TrainConfig) -> set[str]:
    """Names, as on the command line, of the settings in which two configurations differ."""
    return {name for name in setting_fields() if attrgetter(name)(one) != attrgetter(name)(other)}


@pytest.mark.parametrize("table", list(TABLES))
def test_every_arm_differs_from_a_in_what_its_name_says_and_nothing_else(table: str) -> None:
    study = study_of(table)
    first = study.arms.reference
    others = [arm for arm in study.arms.arms if arm is not first]
    assert study.arms.quick() == [first, others[0]]
    assert {arm.letter for arm in others} == set(ALLOWED[table])
    for arm in others:
        changed = difference(config_of(study, first), config_of(study, arm))
        assert changed == {"out", *ALLOWED[table][arm.letter]}, arm
        assert difference(config_of(study, arm, 1), config_of(study, arm, 2)) == {"out", "seed"}


def test_the_arms_do_what_they_are_called() -> None:
    parts = {arm.letter: config_of(study_of("2"), arm) for arm in TABLES["2"].arms}
    does = {
        letter: (config.alignment.weight > 0, config.alignment.negative_weight > 0, config.teacher_input)
        for letter, config in parts.items()
    }
    assert does["A"] == (True, True, False) and does["B"] == (True, False, False)
    assert does["C"] == (False, True, False) and does["D"] == does["E"] == (False, True, True)
    assert difference(parts["D"], parts["E"]) == {"out", "alignment.teacher_path"}
    copying = {arm.letter: config_of(study_of("copying"), arm) for arm in TABLES["copying"].arms}
    for letter, config in copying.items():
        assert config.regular_pairs == 1.0
        assert difference(config, parts[letter]) == {"out", "regular_pairs"}
    depths = [config_of(study_of("4"), arm).alignment for arm in TABLES["4"].arms]
    assert [one.depth if one.weight else 0 for one in depths] == list(range(BLOCKS + 1))
    assert WAN_CONFIGS["r2v-tiny"].num_layers == BLOCKS
    recipes = [config_of(study_of("recipes"), arm) for arm in TABLES["recipes"].arms]
    assert {(one.timesteps, one.alignment.tap) for one in recipes} == {
        (timesteps, tap) for timesteps in ("paper", "release") for tap in ("block", "self_attn")
    } | {("release_ungated", "block")}
    assert all(config_of(study_of("3"), arm).alignment.teacher in TEACHERS for arm in TABLES["3"].arms)


def test_all_start_from_one_model_that_never_saw_a_reference() -> None:
    settings = {"batch_size": 4, "alignment.weight": 0.5}
    starts = [study_of(table, settings=settings).start_settings() for table in TABLES]
    assert all(start == starts[0] for start in starts)
    start = configure(RECIPE, starts[0])
    assert start.from_scratch and start.alignment.weight == 0 and start.batch_size == 4
    assert start.drop_references + start.drop_both == pytest.approx(1.0)
    empty = EncodedSample("", "", torch.zeros(1), torch.zeros(1), None)
    chances = [sample_randomness(empty, index, start) for index in range(200)]
    assert not any(chance.keep_references for chance in chances)
    assert 0.03 < np.mean([not chance.keep_text for chance in chances]) < 0.2
    arm = config_of(study_of("2", settings=settings), TABLES["2"].arms[0])
    assert (arm.dit_ckpt, arm.from_scratch, arm.alignment.weight) == ("start", False, 0.5)


class Calls:
    """A stand-in for the VAE's encoder or the teacher: deterministic, and counts what it was given."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.count = scale, 0

    def encode(self, videos: Tensor) -> Tensor:
        self.count += len(videos)
        return self.scale * videos[:, :, ::4, ::16, ::16]

    def features(self, images: Tensor) -> Tensor:
        self.count += len(images)
        return self.scale * images[:, :, ::16, ::16].flatten(2).mT


def source(folder: Path, seed: int, vae: Calls | None = None, teacher: Calls | None = None, **changes):
    settings = SpriteSettings(
        clips=24, views=2, frames=9, height=48, width=48, regular_pairs=0.3, counts=(0.5, 0.3, 0.2)
    )
    return SpriteSource(
        dataclasses.replace(settings, **changes),
        seed,
        (vae or Calls()).encode,
        teacher.features if teacher else None,
        folder,
        "vae",
        f"teacher {teacher.scale}" if teacher else "",
        progress=False,
    )


def test_arms_of_a_seed_see_the_same_samples_noise_and_timesteps(tmp_path: Path) -> None:
    vae, teachers = Calls(), (Calls(), Calls(2.0), None)
    sources = [source(tmp_path, 1, vae, teacher) for teacher in teachers]
    for step in range(6):
        rows = [one.samples(step, range(4 * step, 4 * step + 4)) for one in sources]
        for first, second, bare in zip(*rows, strict=True):
            assert first.name == second.name == bare.name and first.prompt == bare.prompt
            assert torch.equal(first.latents, second.latents) and torch.equal(first.latents, bare.latents)
            assert torch.equal(first.references, second.references)
            assert torch.equal(first.references, bare.references)
            assert torch.equal(2 * first.features, second.features) and bare.features is None
            # The features are those of the references that the sample shows.
            seen = first.references.flatten(2).permute(1, 2, 0)
            assert torch.equal(seen, first.features)
    for table in ("2", "3", "4", "copying"):
        study = study_of(table)
        configs = [config_of(study, arm) for arm in study.arms.arms]
        for index in (0, 7, 1000):
            chances = [sample_randomness(first, index, config) for config in configs]
            for chance in chances[1:]:
                assert torch.equal(chance.noise, chances[0].noise)
                assert chance.timestep == chances[0].timestep
                assert (chance.keep_text, chance.keep_references) == (
                    chances[0].keep_text,
                    chances[0].keep_references,
                )


@pytest.mark.parametrize("changes", [{}, {"free_colors": True}, {"regular_pairs": 1.0}])
def test_another_seed_or_teacher_reuses_what_is_encoded(tmp_path: Path, changes: dict) -> None:
    vae, teacher = Calls(), Calls()
    source(tmp_path, 1, vae, teacher, **changes).prepare()
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(files) == 2
    assert vae.count == 24 + teacher.count  # clips and references, each once

    silent, other = Calls(), Calls(3.0)
    again = source(tmp_path, 2, silent, teacher, **changes)
    orders = [
        [sample.name for sample in one.samples(0, range(8))]
        for one in (source(tmp_path, 1, silent, teacher, **changes), again)
    ]
    assert orders[0] != orders[1]
    source(tmp_path, 2, silent, other, **changes).prepare()
    assert silent.count == 0 and other.count == teacher.count
    assert all(path.read_bytes() == content for path, content in files.items())
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    source(tmp_path, 1).prepare()
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"0" * 100)
    with pytest.raises(ValueError, match=f"{path.name} is damaged .*delete it and run again"):
        source(tmp_path, 1).prepare()


def test_means_errors_and_paired_intervals_by_hand() -> None:
    center, error = mean_and_error([0.1, 0.2, 0.3])
    assert center == pytest.approx(0.2) and error == pytest.approx(0.1 / 3**0.5)
    assert mean_and_error([0.4]) == (0.4, None)
    # differences 0.4, 0.2, 0.3: mean 0.3, deviation 0.1, error 0.1 / sqrt 3, t(2) = 4.303
    center, low, high = paired_interval([0.9, 0.8, 0.7], [0.5, 0.6, 0.4])
    assert (center, low, high) == pytest.approx((0.3, 0.3 - 0.24843, 0.3 + 0.24843), abs=1e-4)
    assert paired_interval([0.9], [0.5]) == (pytest.approx(0.4), None, None)
    # The last digit of the printed tables, which published intervals were computed with.
    assert [student_t(freedom) for freedom in (1, 2, 10, 30, 120)] == [12.706, 4.303, 2.228, 2.042, 1.980]


def result_of(colors: float, copied: float | None = None) -> dict:
    row = {"share": colors, "low": 0.0, "high": 1.0, "count": 20}
    table = dict.fromkeys(
        ("found", "colors", "pattern", "shape", "motion", "size", "background", "swapped"), row
    )
    table["copied_pose"] = None if copied is None else {**row, "share": copied}
    return {
        "judged": {job: {"table": table, "answers": {}} for job in ("one", "two", "shuffled")},
        "curve": {
            "4": {"judge_1/colors": colors / 2, "validation/flow": 1 - colors / 2},
            "8": {"judge_1/colors": colors, "validation/flow": 1 - colors},
        },
        "clips_per_second": 10.0,
        "judging_seconds": 1.0,
    }


def test_the_summary_pairs_seeds_and_leaves_out_what_did_not_arise() -> None:
    study = study_of("2")
    found = {
        "A": {1: result_of(0.9, 0.5), 2: result_of(0.8), 3: result_of(0.7, 0.1)},
        "B": {1: result_of(0.5, 0.4), 3: result_of(0.4, 0.2)},
    }
    arms = summarize_study(study, found)["arms"]
    colors = arms["A"]["figures"]["one"]["colors"]
    assert (colors["mean"], colors["standard_error"]) == pytest.approx((0.8, 0.1 / 3**0.5))
    assert "a_minus_this" not in colors and colors["by_seed"] == {1: 0.9, 2: 0.8, 3: 0.7}
    effect = arms["B"]["figures"]["one"]["colors"]["a_minus_this"]
    assert effect["seeds"] == [1, 3]
    # differences 0.4 and 0.3: mean 0.35, deviation 0.0707, error 0.05, t(1) = 12.706
    assert (effect["mean"], effect["low"], effect["high"]) == pytest.approx(
        (0.35, 0.35 - 0.6353, 0.35 + 0.6353), abs=1e-4
    )
    assert arms["A"]["figures"]["one"]["copied_pose"]["by_seed"] == {1: 0.5, 3: 0.1}
    assert arms["A"]["figures"]["one"]["copied_scale"] is None
    assert arms["C"]["seeds"] == [] and arms["C"]["figures"]["two"]["colors"] is None
    flow = arms["B"]["figures"]["validation"]["flow_error"]
    assert flow["by_seed"] == {1: 0.5, 3: 0.6} and flow["a_minus_this"]["mean"] == pytest.approx(-0.35)
    text = as_markdown(study, summarize_study(study, found), ["table.png"])
    assert "| A | 0.2000 ± 0.0577 |" in text and "| B | -0.3500 [-0.9853, +0.2853] |" in text
    assert "| A | 80.0 ± 5.8 | 80.0 ± 5.8 | 80.0 ± 5.8 |" in text
    assert "| B | +35.0 [-28.5, +98.5] |" in text
    assert "| C | without alignment | not finished |" in text
    assert text.endswith("\n![table](table.png)\n") and common_seeds(found) == [1, 3]
    assert curve_of(found["A"], "judge_1/colors") == ([4, 8], pytest.approx([0.4, 0.8]))


def test_runs_from_different_starts_are_not_compared(tmp_path: Path) -> None:
    study = study_of("2", tmp_path)
    for letter, start in (("A", "one"), ("B", "one"), ("C", "other")):
        arm = arm_of("2", letter)
        entry = {"study": study.identity(arm, 1), "start": start}
        write_json(study.arm_folder(arm, 1) / "result.json", entry)
    with pytest.raises(ValueError, match="recipe and .*weight=0.0 started from different models: delete"):
        collect(study)
    write_json(study.arm_folder(arm, 1) / "result.json", {**entry, "start": "one"})
    assert {letter: list(seeds) for letter, seeds in collect(study).items()} == {"A": [1], "B": [1], "C": [1]}


def test_errors_at_other_timesteps_are_not_compared() -> None:
    study = study_of("recipes")
    found = {letter: {1: result_of(0.5)} for letter in "ABC"}
    flows = {
        letter: arm["figures"]["validation"]["flow_error"]
        for letter, arm in summarize_study(study, found)["arms"].items()
    }
    assert "a_minus_this" in flows["B"] and "a_minus_this" not in flows["C"]


def test_jobs_are_the_same_for_all_arms_of_a_seed_and_others_for_another() -> None:
    wanted = judging_jobs(1, 20, 5)
    assert wanted == judging_jobs(1, 20, 5) and wanted["one"].seed != judging_jobs(2, 20, 5)["one"].seed
    assert {name: (job.clips, job.subjects, job.references) for name, job in wanted.items()} == {
        "one": (20, 1, "own"),
        "two": (20, 2, "own"),
        "shuffled": (5, 1, "shuffled"),
    }
    assert {(job.split, job.pair, job.sample_steps) for job in wanted.values()} == {("held_out", "cross", 5)}


def arm_of(table: str, letter: str) -> Arm:
    return next(arm for arm in TABLES[table].arms if arm.letter == letter)


def test_tables_share_the_runs_that_change_the_same() -> None:
    def folder(table: str, letter: str, **settings) -> str:
        study = study_of(table, settings={f"alignment.{name}": value for name, value in settings.items()})
        return study.arm_folder(arm_of(table, letter), 1).relative_to("out").as_posix()

    assert folder("2", "A") == folder("3", "A") == folder("4", "A") == "runs/seed-1/recipe"
    assert folder("2", "C") == folder("4", "K0") == "runs/seed-1/alignment.weight=0.0"
    assert folder("copying", "C") == "runs/seed-1/alignment.weight=0.0,regular_pairs=1.0"
    assert folder("3", "B") == "runs/seed-1/teacher=dinov3-small"
    every = {folder(table, arm.letter) for table in TABLES for arm in TABLES[table].arms}
    assert len(every) == sum(len(table.arms) for table in TABLES.values()) - 3
    # With a depth of the user's own the recipe's is a change, and his is none.
    assert folder("4", "A", depth=2) == "runs/seed-1/alignment.depth=3"
    assert folder("4", "K2", depth=2) == folder("2", "A", depth=2) == "runs/seed-1/recipe"


def test_shared_runs_are_equal_in_every_setting() -> None:
    seen: dict[Path, tuple[TrainConfig, dict]] = {}
    for table in TABLES:
        for arm in TABLES[table].arms:
            study = study_of(table)
            found = (config_of(study, arm), study.identity(arm, 1))
            assert seen.setdefault(study.arm_folder(arm, 1), found) == found


def test_results_of_another_study_are_refused(tmp_path: Path) -> None:
    study, arm = study_of("2", tmp_path), TABLES["2"].arms[0]
    assert study.result(arm, 1) is None
    write_json(study.arm_folder(arm, 1) / "result.json", {"study": study.identity(arm, 1)})
    assert study.result(arm, 1) is not None and study.run(arm, 1)
    with pytest.raises(ValueError, match="another study .steps is 100, asked for 7.* give another --out"):
        study_of("2", tmp_path, steps=7).run(arm, 1)
    with pytest.raises(ValueError, match="another study .settings is"):
        study_of("2", tmp_path, settings={"batch_size": 4}).run(arm, 1)
    with pytest.raises(ValueError, match="another study .sample_steps is 5, asked for 6"):
        study_of("2", tmp_path, sample_steps=6).run(arm, 1)


def test_an_arm_that_another_process_trains_is_left_alone(tmp_path: Path) -> None:
    study, arm = study_of("2", tmp_path), TABLES["2"].arms[0]
    study.arm_folder(arm, 1).parent.mkdir(parents=True)
    with locked(study.arm_folder(arm, 1)):
        assert not study.run(arm, 1)
    assert not study.arm_folder(arm, 1).exists()


def test_what_all_processes_need_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, made = tmp_path / "sub" / "start", []
    for _ in range(2):
        study_module._once(target, lambda: bool(made), lambda: made.append("here"))
    assert made == ["here"]
    made.clear()
    waited = []

    def other_process_finishes(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            made.append("there")

    monkeypatch.setattr(study_module.time, "sleep", other_process_finishes)
    with locked(target):
        study_module._once(target, lambda: bool(made), lambda: made.append("here"))
    assert made == ["there"] and len(waited) == 3


def test_a_teacher_is_made_once_and_loads(tmp_path: Path) -> None:
    study = study_of("3", tmp_path)
    untrained = next(arm for arm in study.arms.arms if arm.letter == "D")
    study._make_teacher(untrained.teacher)
    settings = config_of(study, untrained).alignment
    assert Path(settings.teacher_path) == tmp_path / "teachers" / "dinov3-tiny-0" / "teacher"
    assert load_teacher(settings.teacher, settings.teacher_path).dim == 128
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    study._make_teacher(untrained.teacher)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert not list((tmp_path / "teachers").glob("*.part"))


PUBLISHED = Path(__file__).resolve().parents[2] / "docs" / "ablations"


@pytest.mark.parametrize("folder", sorted(PUBLISHED.glob("table-*")), ids=lambda folder: folder.name)
def test_published_tables_are_what_their_runs_say(folder: Path) -> None:
    """Also that the runs belong to the embedded model and the arms as they are now, so that a study can go on from them."""
    study = Study(
        folder.name.removeprefix("table-"), PUBLISHED, **{**USUAL, "start_steps": 0}, sample_steps=10
    )
    found = collect(study)
    published = json.loads((folder / "table.json").read_text())
    assert {arm["folder"] for arm in published.pop("runs")} == {
        study.arm_folder(arm, seed).relative_to(PUBLISHED).as_posix()
        for arm in study.arms.arms
        for seed in found.get(arm.letter, {})
    }
    assert json.loads(json.dumps(summarize_study(study, found))) == published


def compare(*words: str) -> Result:
    script = PUBLISHED.parents[1] / "benchmarks" / "ablation_pairs.py"
    return CliRunner().invoke(runpy.run_path(str(script))["main"], words)


def test_any_two_arms_of_a_published_table_are_compared() -> None:
    published = json.loads((PUBLISHED / "table-2" / "table.json").read_text())["arms"]["D"]["figures"]
    shown = compare(str(PUBLISHED / "table-2"), "A", "D")
    assert shown.exit_code == 0, shown.output
    wanted = {key: 100 * published["two"]["colors"]["a_minus_this"][key] for key in ("mean", "low", "high")}
    assert "two colors: {mean:+.1f} [{low:+.1f}, {high:+.1f}], seeds 1, 2, 3".format(**wanted) in shown.stdout
    assert "validation flow_error: +0.0090 [+0.0036, +0.0144]" in shown.stdout
    recipes = str(PUBLISHED / "table-recipes")
    assert "validation" in compare(recipes, "C", "E").stdout
    assert "validation" not in compare(recipes, "A", "C").stdout  # other timesteps
    unknown = compare(recipes, "A", "Z")
    assert unknown.exit_code == 2 and "Z: this table has A, B, C, D, E" in unknown.stderr


def test_published_runs_started_from_the_published_model() -> None:
    starts = {json.loads(path.read_text())["start"] for path in PUBLISHED.glob("runs/*/*/result.json")}
    assert starts == {weights_sha256(PUBLISHED / "start")}
