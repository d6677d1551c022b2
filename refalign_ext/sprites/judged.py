"""A checkpoint folder of the sprite world, judged row by row; what lies on disk is not judged again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from refalign_ext.atomic_io import write_json
from refalign_ext.backbone import WAN_CONFIGS, file_sha256, require_files, required_files
from refalign_ext.checkpoint.reading import dit_files
from refalign_ext.sprites import evaluate as evaluator_module
from refalign_ext.sprites import judge as judge_module
from refalign_ext.sprites import world as world_module
from refalign_ext.sprites.evaluate import JudgingJob, judge_folder
from refalign_ext.sprites.judge import Answers
from refalign_ext.sprites.pixels import save_picture

_CODE = (world_module, judge_module, evaluator_module)  # other figures may come of other code
# Settings of the task that decide what is generated where a job leaves them open.
_TASK_SETTINGS = (
    *("size", "frame_num", "sample_solver", "sample_steps", "sample_shift", "sample_neg_prompt"),
    *("ref_guide_scale", "text_guide_scale"),
)


@dataclass(frozen=True)
class Judged:
    """The judge's answers about one job.

    Attributes:
        answers, table: see `judge.judge_clip` and `judge.tabulate`.
        sheet: the picture that shows references and frames.
        is_new: False if it was read from disk.
    """

    answers: Answers
    table: dict[str, dict[str, float] | None]
    sheet: Path
    is_new: bool


class JudgedFolder:
    """Judges jobs with the weights of one checkpoint folder.

    Args:
        folder: a checkpoint folder of r2v-tiny.
        dit_ckpt: another DiT, such as a checkpoint of train_refalign.py; None: the folder's.
        device: where to generate.

    Raises:
        ValueError: if VAE, text encoder or tokenizer are missing (all are listed).
    """

    def __init__(self, folder: Path, *, dit_ckpt: Path | None = None, device: str = "cpu") -> None:
        self.task = WAN_CONFIGS["r2v-tiny"]
        require_files(folder, self.task, dit=False)
        self.folder, self.dit_ckpt, self.device = folder, dit_ckpt, device

    @cached_property
    def _frozen_digests(self) -> dict[str, str]:
        names = required_files(self.folder, self.task, dit=False)
        return {name: file_sha256(self.folder / name) for name in names}

    @cached_property
    def _dit_digests(self) -> dict[str, str]:
        return {path.name: file_sha256(path) for path in dit_files(self.dit_ckpt or self.folder)}

    def fingerprint(self, what: str, job: JudgingJob) -> dict[str, Any]:
        """What answers depend on: the job, the task's settings, digests of the weights and of the judge's code."""
        weights = {} if what == "real" else self._frozen_digests
        if what == "generation":
            weights = weights | self._dit_digests
        task = {name: self.task[name] for name in _TASK_SETTINGS}
        return {
            "what": what,
            "job": asdict(job),
            "task": {**task, "size": list(self.task.size)},
            "weights": weights,
            "code": {module.__name__: file_sha256(Path(str(module.__file__))) for module in _CODE},
        }

    def judge(
        self, what: str, job: JudgingJob, stem: Path, *, rows: int = 10, progress: bool = True
    ) -> Judged:
        """The answers in `<stem>.json` if they are about the same thing, else new ones, written there and to `<stem>.png`.

        Args:
            what: see `judge_folder`.
            stem: path of both files without their endings.
            rows: clips that the picture shows.
        """
        fingerprint = self.fingerprint(what, job)
        path, sheet = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.png")
        entry = _read_entry(path)
        if is_new := entry.get("fingerprint") != fingerprint or not sheet.is_file():
            evaluation = judge_folder(
                self.folder, what, job, dit_ckpt=self.dit_ckpt, device=self.device, progress=progress
            )
            save_picture(sheet, evaluation.contact_sheet(rows))
            entry = {"table": evaluation.table(), "answers": evaluation.answers, "fingerprint": fingerprint}
            write_json(path, entry)
        return Judged(entry["answers"], entry["table"], sheet, is_new)


def clip_shares(answers: list[list[bool | None]]) -> np.ndarray:
    """Share of right answers in each clip, [clips] float; NaN where the question does not arise."""
    known = [[answer for answer in clip if answer is not None] for clip in answers]
    return np.array([np.mean(clip) if clip else np.nan for clip in known])


def _read_entry(path: Path) -> dict[str, Any]:
    """What was judged before; empty where there is nothing or something else."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entry if isinstance(entry, dict) else {}
