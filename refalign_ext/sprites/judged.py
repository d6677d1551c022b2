"""A checkpoint folder of the sprite world, opened once and judged row by row; what lies on disk is not judged again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from refalign_ext.atomic_io import atomic_open, write_json
from refalign_ext.backbone import WAN_CONFIGS, file_sha256, require_files, required_files
from refalign_ext.checkpoint.reading import dit_files
from refalign_ext.sprites import evaluate as evaluator_module
from refalign_ext.sprites import judge as judge_module
from refalign_ext.sprites import world as world_module
from refalign_ext.sprites.evaluate import Evaluation, Job, contact_sheet, judge_folder
from refalign_ext.sprites.judge import Verdict

METRICS = ("background", *Verdict.__dataclass_fields__)
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
        answers: metric -> for each clip the answers True, False or None (the question does not arise), one for the
            clip (`background`) or one for each subject.
        table: metric -> share with its 95% interval and count; see `judge.summarize`.
        sheet: the picture that shows references and frames.
        is_new: False if it was read from disk.
    """

    answers: dict[str, list[list[bool | None]]]
    table: dict[str, dict[str, float]]
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

    def fingerprint(self, what: str, job: Job) -> dict[str, Any]:
        """What answers depend on: the job, the task's settings, digests of the weights and of the judge's code."""
        weights = {} if what == "real" else self._frozen_digests
        if what == "generation":
            weights = weights | self._dit_digests
        return {
            "what": what,
            "job": asdict(job),
            "task": {name: _plain(self.task[name]) for name in _TASK_SETTINGS},
            "weights": weights,
            "code": {module.__name__: file_sha256(Path(str(module.__file__))) for module in _CODE},
        }

    def judge(self, what: str, job: Job, stem: Path, *, rows: int = 10, progress: bool = True) -> Judged:
        """The answers in `<stem>.json` if they are about the same thing, else new ones, written there and to `<stem>.png`.

        Args:
            what: see `judge_folder`.
            stem: path of both files without their endings.
            rows: clips that the picture shows.
        """
        fingerprint = self.fingerprint(what, job)
        path, sheet = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.png")
        entry = _read(path)
        if is_new := entry.get("fingerprint") != fingerprint or not sheet.is_file():
            evaluation = judge_folder(
                self.folder, what, job, dit_ckpt=self.dit_ckpt, device=self.device, progress=progress
            )
            with atomic_open(sheet) as file:
                Image.fromarray(contact_sheet(evaluation, rows=rows)).save(file, format="PNG")
            entry = {
                "table": _without_empty(evaluation.table()),
                "answers": answers_of(evaluation),
                "fingerprint": fingerprint,
            }
            write_json(path, entry)
        return Judged(entry["answers"], entry["table"], sheet, is_new)


def answers_of(evaluation: Evaluation) -> dict[str, list[list[bool | None]]]:
    """Every answer of the judge by metric, clip and subject; see `Judged`."""
    found: dict[str, list[list[bool | None]]] = {
        "background": [[bool(right)] for right in evaluation.backgrounds]
    }
    for name in Verdict.__dataclass_fields__:
        found[name] = [
            [None if (answer := getattr(verdict, name)) is None else bool(answer) for verdict in verdicts]
            for verdicts in evaluation.verdicts
        ]
    return found


def clip_shares(answers: list[list[bool | None]]) -> np.ndarray:
    """Share of right answers in each clip, [clips] float; NaN where the question does not arise."""
    shares = []
    for clip in answers:
        known = [answer for answer in clip if answer is not None]
        shares.append(float(np.mean(known)) if known else float("nan"))
    return np.array(shares)


def percent(row: dict[str, float] | None) -> str:
    """`95.0 [92-97]` for a row of a table, `-` for none."""
    if row is None:
        return "-"
    low = max(row["low"], 0.0)  # by rounding it can be less
    return f"{100 * row['share']:.1f} [{100 * low:.0f}-{100 * row['high']:.0f}]"


def _read(path: Path) -> dict[str, Any]:
    """What was judged before; empty where there is nothing or something else."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entry if isinstance(entry, dict) else {}


def _without_empty(table: dict[str, dict[str, float]]) -> dict[str, dict[str, float] | None]:
    """JSON knows no nan, which is what the share of no answers is."""
    return {name: row if row["count"] else None for name, row in table.items()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
