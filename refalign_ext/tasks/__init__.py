"""The table of tasks: everything that generates, plans or trains asks it. Imports no torch.

A new task is a row of `TASKS`; a new kind of task is a file beside `text.py` with a subclass of `Task`, and a row.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refalign_ext.tasks.embedded import EmbeddedReferenceToVideo
from refalign_ext.tasks.reference import ReferenceToVideo
from refalign_ext.tasks.task import Conditions, Task
from refalign_ext.tasks.text import TextToImage, TextToVideo

__all__ = ["DEFAULT_TASK", "TASKS", "Conditions", "Task", "find_task", "register_tasks"]

_T2V_SMALL, _T2V_LARGE = "Wan-AI/Wan2.1-T2V-1.3B", "Wan-AI/Wan2.1-T2V-14B"
_SIZES_480 = ("480*832", "832*480")
_SIZES_720 = ("720*1280", "1280*720", *_SIZES_480)

_TASKS = (
    EmbeddedReferenceToVideo(
        name="r2v-tiny",
        base="r2v-tiny",
        bundled=Path(__file__).resolve().parents[2] / "assets" / "r2v-tiny",
        sizes=("48*48",),
        size=(48, 48),
        frame_num=9,
        fps=8,
        magnify=8,
        sample_steps=20,
        sample_shift=6.0,
        text_guide_scale=5.0,
        teacher="dinov3-tiny",
    ),
    ReferenceToVideo(name="r2v-1.3B", base="t2v-1.3B", download=_T2V_SMALL, sizes=_SIZES_480),
    ReferenceToVideo(name="r2v-14B", base="t2v-14B", download=_T2V_LARGE, sizes=_SIZES_720),
    TextToVideo(name="t2v-1.3B", base="t2v-1.3B", download=_T2V_SMALL, sizes=_SIZES_480, size=(832, 480)),
    TextToVideo(name="t2v-14B", base="t2v-14B", download=_T2V_LARGE, sizes=_SIZES_720, size=(1280, 720)),
    TextToImage(
        name="t2i-14B",
        base="t2i-14B",
        download=_T2V_LARGE,
        sizes=(*_SIZES_720, "1024*1024"),
        size=(1280, 720),
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
DEFAULT_TASK = "r2v-tiny"
# Upstream's tasks that are not here yet.
_LATER_TASKS = ("i2v-14B", "flf2v-14B", "vace-1.3B", "vace-14B")


def find_task(name: str, family: str | None = None, refused: Mapping[str, str] | None = None) -> Task:
    """A row of the table.

    Args:
        name: as --task takes it.
        family: the kind of task that it has to be; None: any.
        refused: tasks that a Wan tree suggests and that there are not, with the reason.

    Raises:
        ValueError: with the reason and the tasks there are.
    """
    known = [task.name for task in TASKS.values() if family in (None, task.family)]
    if name in known:
        return TASKS[name]
    choices = f"choose one of {', '.join(known)}"
    if refused and name in refused:
        raise ValueError(f"--task {name}: {refused[name]}")
    if name in TASKS:
        raise ValueError(f"--task {name}: a task of the family {family} is needed, {choices}")
    if name in _LATER_TASKS:
        raise ValueError(f"--task {name} is not available yet, {choices}")
    close = difflib.get_close_matches(name, known, n=1)
    raise ValueError(f"--task {name}: unknown, {f'did you mean {close[0]}? ' if close else ''}{choices}")


def register_tasks(
    configs: dict[str, Any], sizes: dict[str, tuple[int, int]], supported: dict[str, tuple[str, ...]]
) -> None:
    """Adds the tasks that are not Wan's own to Wan's tables, those of this repository or of an official checkout.

    Safe to call twice.
    """
    for task in TASKS.values():
        configs[task.name] = task.configuration(configs)
        supported.setdefault(task.name, task.sizes)
        for name in task.sizes:
            width, height = name.split("*")
            sizes.setdefault(name, (int(width), int(height)))
