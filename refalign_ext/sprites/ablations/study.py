"""Train and judge the arms of a table: one common start, paired seeds, resumable, shared by any number of processes."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from refalign_ext.atomic_io import FileLocked, atomic_folder, locked, write_json
from refalign_ext.backbone import file_sha256
from refalign_ext.checkpoint.checkpointer import checkpoints_in, read_meta
from refalign_ext.checkpoint.reading import read_any_dit
from refalign_ext.config import TrainConfig, configure
from refalign_ext.distributed.process_group import environment_world_size
from refalign_ext.encoders import checkpoint_folder, task_config
from refalign_ext.sprites.ablations.arms import RECIPE, TABLES, Arm, MadeTeacher, Table
from refalign_ext.sprites.ablations.judging import judge_checkpoint, judging_jobs, read_metrics
from refalign_ext.sprites.ablations.teacher_input import TEACHER_INPUT
from refalign_ext.sprites.teacher_settings import TeacherSettings
from refalign_ext.sprites.training_data import SPRITE_DATA
from refalign_ext.sprites.world import WORLD_VERSION
from refalign_ext.teachers import teacher_files
from refalign_ext.training.run import run_training
from refalign_ext.training.run_log import METRICS_FILE

logger = logging.getLogger(__name__)

START_SEED = 0  # arms have the seeds from 1 on
# Settings that make a study: they are not the user's.
OWN_SETTINGS = ("task", "data", "out", "cache", "seed", "steps", "dit_ckpt", "from_scratch", "lora_rank")
# Every sample loses its references, and a tenth its prompt too, which guidance needs.
NO_REFERENCES = {"drop_text": 0.0, "drop_references": 0.9, "drop_both": 0.1}
PREVIEWS = 4  # of a run
ARM_AVERAGE = 0.99  # an arm is short: the recipe's moving average would lag a third of it behind
_WAIT_S = 5.0


@dataclass(frozen=True)
class Study:
    """What is asked for; see the options of `ablate`.

    Attributes:
        table: key of `TABLES`.
        out: folder of all tables, with the runs, start, teachers and sprite cache that they share.
        seeds: arms are trained with the seeds 1 to `seeds`.
        settings: other settings of train_refalign.py, for the start and for every arm.
        teacher_steps: for which teachers are trained; None: as long as the command does that trains them.
    """

    table: str
    out: Path
    seeds: int
    steps: int
    start_steps: int
    clips: int
    sample_steps: int
    device: str = "auto"
    threads: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    start: Path | None = None
    teachers: Path | None = None
    teacher_steps: int | None = None

    def __post_init__(self) -> None:
        for name in OWN_SETTINGS:
            if name in self.settings:
                raise ValueError(f"--{name} is set by the study itself: leave it out")
        if environment_world_size() > 1:
            raise ValueError("ablate trains on one device: start it once for each, without torchrun")

    @property
    def arms(self) -> Table:
        return TABLES[self.table]

    @property
    def folder(self) -> Path:
        """Where this table lies; runs lie beside the tables."""
        return self.out / f"table-{self.table}"

    def changes(self, arm: Arm) -> dict[str, Any]:
        """What an arm changes of the recipe and the user's settings, without what is so anyway."""
        usual = configure(RECIPE, self.settings)
        changes = {**self.arms.base, **arm.changes}
        changes = {name: value for name, value in changes.items() if attrgetter(name)(usual) != value}
        if arm.teacher is not None:
            changes["teacher"] = self._teacher_folder(arm.teacher).name
        return dict(sorted(changes.items()))

    def arm_folder(self, arm: Arm, seed: int) -> Path:
        """Where one run lies: tables whose arms change the same share it."""
        words = [f"{name}={value}" for name, value in self.changes(arm).items()]
        return self.out / "runs" / f"seed-{seed}" / (",".join(words) or "recipe")

    def identity(self, arm: Arm, seed: int) -> dict[str, Any]:
        """What a result must be of to count as this arm's."""
        return {
            "changes": self.changes(arm),
            "seed": seed,
            "steps": self.steps,
            "clips": self.clips,
            "sample_steps": self.sample_steps,
            "settings": self.settings,
            **self._world(),
        }

    def _world(self) -> dict[str, Any]:
        """What all runs of a study rest on: replaced in between, their results could not be compared."""
        frozen, task = self._frozen(), task_config(TrainConfig())
        teacher = teacher_files(task.teacher, frozen / task.teacher_folder)[1]
        return {
            "world": WORLD_VERSION,
            "vae": file_sha256(frozen / task.vae_checkpoint),
            "text_encoder": file_sha256(frozen / task.t5_checkpoint),
            "embedded_teacher": [file_sha256(path) for path in teacher],
        }

    def _frozen(self) -> Path:
        return checkpoint_folder(configure(RECIPE, {**self.settings, "from_scratch": True}), dit=False)

    def start_settings(self) -> dict[str, Any]:
        """Of the text-to-video model that all arms of all seeds start from: references dropped, no alignment."""
        kept = {name: value for name, value in self.settings.items() if not name.startswith("alignment.")}
        return {
            **self._common(self.start_steps),
            **kept,
            "alignment.weight": 0.0,
            **NO_REFERENCES,
            "seed": START_SEED,
            "preview_every": 0,
            "out": str(self.out / f"start-{self.start_steps}"),
        }

    def arm_settings(self, arm: Arm, seed: int, start: Path) -> dict[str, Any]:
        """Of one run; arms of a seed differ in `Arm.changes`, the teacher's folder and `out`."""
        settings = {
            **self._common(self.steps),
            "ema_decay": ARM_AVERAGE,
            **self.settings,
            **self.arms.base,
            **arm.changes,
            "alignment.new_projectors": True,
            "dit_ckpt": str(start),
            "seed": seed,
            "out": str(self.arm_folder(arm, seed)),
        }
        if arm.teacher is not None:
            settings["alignment.teacher"] = f"{arm.teacher.kind}-tiny"
            settings["alignment.teacher_path"] = str(self._teacher_folder(arm.teacher) / "teacher")
        return settings

    def _common(self, steps: int) -> dict[str, Any]:
        often = max(1, steps // PREVIEWS)
        return {
            "steps": steps,
            "cache": str(self.out / "cache"),
            "save_every": often,
            "keep_last": 1,
            "preview_every": often,
            "preview_clips": 24,
            "preview_steps": self.sample_steps,
            "validate_every": often,
        }

    def _teacher_steps(self, teacher: MadeTeacher) -> int | None:
        return self.teacher_steps if teacher.steps is None else teacher.steps

    def _teacher_folder(self, teacher: MadeTeacher) -> Path:
        steps = self._teacher_steps(teacher)
        name = f"{teacher.kind}-{teacher.size}" + ("" if steps is None else f"-{steps}")
        return (self.teachers or self.out / "teachers") / name

    def run(self, arm: Arm, seed: int) -> bool:
        """Train and judge one arm, or what is left of that; False if another process is at it.

        Raises:
            ValueError: if the folder holds another study, and as `run_training`.
            KeyboardInterrupt: after a stop that was asked for.
        """
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        folder = self.arm_folder(arm, seed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with locked(folder):
                if self.result(arm, seed) is None:
                    write_json(folder / "result.json", self._run(arm, seed), indent=None)
        except FileLocked:
            return False
        return True

    def _run(self, arm: Arm, seed: int) -> dict[str, Any]:
        """What `result.json` holds."""
        folder, identity = self.arm_folder(arm, seed), self.identity(arm, seed)
        start = self._start()
        digest = weights_sha256(start)
        _claim(folder / "arm.json", {**identity, "start": digest})
        logger.info("table %s, seed %d, arm %s: %s", self.table, seed, arm.letter, arm.title)
        if arm.teacher is not None:
            self._make_teacher(arm.teacher)
        settings = self.arm_settings(arm, seed, start)
        checkpoint = self._train(settings)
        begun = time.perf_counter()
        judged = judge_checkpoint(
            self._frozen(),
            checkpoint,
            folder,
            judging_jobs(seed, self.clips, self.sample_steps),
            device=self.device,
            precision=configure(RECIPE, settings).precision,
        )
        seconds = time.perf_counter() - begun
        curve, speed = read_metrics(folder / METRICS_FILE)
        return {
            "study": identity,
            "start": digest,
            "clips_per_second": speed,
            "judging_seconds": seconds,
            "curve": curve,
            "judged": judged,
        }

    def result(self, arm: Arm, seed: int) -> dict[str, Any] | None:
        """What `run` found, or None if it has not.

        Raises:
            ValueError: if it is of another study.
        """
        path = self.arm_folder(arm, seed) / "result.json"
        if not path.is_file():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        _agree(path, found["study"], self.identity(arm, seed))
        return found

    def _start(self) -> Path:
        if self.start is not None:
            return self.start
        settings = self.start_settings()
        folder = Path(settings["out"])
        own = {name: value for name, value in settings.items() if name not in ("out", "cache")}
        identity = {**own, **self._world()}

        def make() -> None:
            _claim(folder / "start.json", identity)
            logger.info("training the common text-to-video start")
            self._train(settings)

        _once(folder, lambda: _last_checkpoint(folder, self.start_steps) is not None, make)
        _claim(folder / "start.json", identity)
        return checkpoints_in(folder / "checkpoints")[-1]

    def _train(self, settings: dict[str, Any]) -> Path:
        """The run's last checkpoint, trained or found."""
        folder = Path(settings["out"])
        if _last_checkpoint(folder, settings["steps"]) is None:
            run_training(
                RECIPE,
                settings,
                sources=(SPRITE_DATA,),
                extra_modules=(TEACHER_INPUT,),
                device=self.device,
                threads=self.threads,
            )
            # What is compiled for one arm's model would count against the next one's limit of recompilations.
            torch.compiler.reset()
            gc.collect()
        found = _last_checkpoint(folder, settings["steps"])
        assert found is not None
        return found

    def _make_teacher(self, teacher: MadeTeacher) -> None:
        from refalign_ext.sprites.train_teacher import train_teacher

        folder, steps = self._teacher_folder(teacher), self._teacher_steps(teacher)

        def make() -> None:
            logger.info("training the teacher %s", folder.name)
            settings = TeacherSettings(teacher.kind, teacher.size)
            with atomic_folder(folder) as unfinished:
                train_teacher(settings if steps is None else replace(settings, steps=steps), unfinished)

        _once(folder, lambda: (folder / "teacher" / "config.json").is_file(), make)


def _last_checkpoint(folder: Path, steps: int) -> Path | None:
    found = checkpoints_in(folder / "checkpoints")
    return found[-1] if found and read_meta(found[-1])["step"] == steps else None


def weights_sha256(start: Path) -> str:
    """SHA-256 of a model's weights, the same for every layout of them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(read_any_dit(start).state_dict.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _once(target: Path, is_done: Callable[[], bool], make: Callable[[], None]) -> None:
    """Makes what all processes need and one makes; the others wait for it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    waited = False
    while not is_done():
        try:
            with locked(target):
                if not is_done():
                    make()
        except FileLocked:
            if not waited:
                logger.info("waiting for another process to make %s", target)
            waited = True
            time.sleep(_WAIT_S)


def _claim(path: Path, identity: dict[str, Any]) -> None:
    """Write down what a folder is of, or make sure that it is of that."""
    if path.is_file():
        _agree(path, json.loads(path.read_text(encoding="utf-8")), identity)
    else:
        write_json(path, identity)


def _agree(path: Path, found: dict[str, Any], identity: dict[str, Any]) -> None:
    """Compares what a file says with an identity as JSON gives it back (lists for tuples)."""
    asked = json.loads(json.dumps(identity))
    for name in {**asked, **found}:
        if found.get(name) != asked.get(name):
            raise ValueError(
                f"{path} is of another study ({name} is {found.get(name)}, asked for {asked.get(name)}): "
                "repeat that command, or give another --out"
            )
