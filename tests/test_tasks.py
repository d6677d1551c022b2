"""The table of tasks: agrees with Wan's own tables, and joins them."""

from __future__ import annotations

import pytest

from refalign_ext.backbone import SIZE_CONFIGS, SUPPORTED_SIZES, WAN_CONFIGS
from refalign_ext.request import DTYPES, SOLVERS
from refalign_ext.tasks import TASKS, find_task
from wan.configs import TASKS as WAN_TASKS
from wan.utils import runtime, solvers


def test_the_table_agrees_with_wans() -> None:
    assert set(TASKS) == set(WAN_CONFIGS) == set(SUPPORTED_SIZES)
    assert set(WAN_TASKS) < set(TASKS)
    for task in TASKS.values():
        assert SUPPORTED_SIZES[task.name] == task.sizes
        assert set(task.sizes) <= set(SIZE_CONFIGS)
        assert WAN_CONFIGS[task.name].sample_fps == task.fps
        assert all(isinstance(getattr(task, scale), float) for scale in task.scales)
        assert task.bundled is None or task.bundled.is_dir()
    assert (tuple(solvers.SOLVERS), ("auto", *runtime.DTYPES)) == (SOLVERS, DTYPES)


def test_reference_tasks_grow_from_wans() -> None:
    for size in ("1.3B", "14B"):
        ours, theirs = WAN_CONFIGS[f"r2v-{size}"], WAN_CONFIGS[f"t2v-{size}"]
        assert all(ours[name] == value for name, value in theirs.items() if name != "__name__")
        assert (ours.ref_guide_scale, ours.text_guide_scale, ours.sample_solver) == (5.0, 7.5, "euler")
        assert ours.vae is not theirs.vae


@pytest.mark.parametrize(
    ("name", "family", "message"),
    [
        ("r2v-tny", None, r"did you mean r2v-tiny\?"),
        ("i2v-14B", None, "not available yet, choose one of"),
        ("t2v-1.3B", "r2v", "family r2v is needed, choose one of r2v-tiny, r2v-1.3B, r2v-14B$"),
        ("r2v-A14B", None, "as a pair$"),
    ],
)
def test_other_names_are_refused(name: str, family: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"--task {name}.*{message}"):
        find_task(name, family, refused={"r2v-A14B": "refused as a pair"})


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("r2v-tiny", {"sample_steps": 0}, "sample_steps is 0: give 1"),
        ("r2v-tiny", {"sample_shift": 0.0}, "give 0.01 to 100"),
        ("r2v-tiny", {"seed": 2**63}, "below"),
        ("r2v-tiny", {"sample_solver": "ddim"}, "'ddim': choose one of"),
        ("r2v-tiny", {"references": ["a.png"] * 9}, "9 references given: at most 8"),
        ("r2v-tiny", {"references": ["a.png"], "roles": ["face"] * 2}, "2 roles for 1 references"),
        ("r2v-tiny", {"sample_guide_scale": 4.0}, "has --ref_guide_scale and --text_guide_scale"),
        ("r2v-tiny", {"inputs": (("image", "a.png"),)}, "--image: task r2v-tiny does not take it"),
        ("t2v-1.3B", {"references": ["a.png"]}, "--ref: task t2v-1.3B does not take it"),
        ("t2v-1.3B", {"size": (1280, 720)}, r"give 480\*832 or 832\*480"),
        ("t2i-14B", {"frame_num": 5}, "makes one image"),
    ],
)
def test_requests_that_do_not_work_are_refused(task: str, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TASKS[task].request("a prompt", **given)


def test_a_request_has_the_tasks_defaults() -> None:
    request = TASKS["r2v-tiny"].request("up", ["a.png"], sample_steps=3, frame_num=None)
    assert (request.size, request.frame_num, request.sample_steps) == ((48, 48), 9, 3)
    assert (request.ref_guide_scale, request.text_guide_scale) == (5.0, 5.0)
    assert "sample_guide_scale" not in request.settings()
