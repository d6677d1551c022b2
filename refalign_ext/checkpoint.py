"""Training checkpoints: written aside and renamed, so that what has its final name is whole.

A checkpoint is a folder `step-00001000` with the DiT in upstream's layout (`diffusion_pytorch_model.safetensors` and
`config.json`, so that `generate.py --dit_ckpt FOLDER` takes it as it is), the moving average, the projectors, the
optimizer and the run's settings.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DIT_FILE = "diffusion_pytorch_model.safetensors"
RAW_FILE = "raw_weights.safetensors"
PROJECTORS_FILE = "projectors.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "trainer.json"
_NAME = re.compile(r"step-(\d+)")
_UNREADABLE = (OSError, RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError)


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if (path / STATE_FILE).is_file()), key=_step_of)


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Rename checkpoints beyond `step` to `abandoned-step-*`: the run goes on from there, and they are not its own.

    Otherwise `--resume auto` would later jump to them, and they would count as the newest to keep. Returns the new names.
    """
    moved = []
    for path in checkpoints_in(folder):
        if _step_of(path) > step:
            target = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            moved.append(path.rename(target))
    return moved


def resolve_resume(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `--resume` names: `auto` (the newest or none), `off`, or a folder.

    Raises:
        ValueError: if a named folder is no complete checkpoint.
    """
    if resume == "off":
        return None
    if resume == "auto":
        found = checkpoints_in(folder)
        return found[-1] if found else None
    path = Path(resume)
    if not (path / STATE_FILE).is_file():
        raise ValueError(
            f"--resume {path}: no complete checkpoint there (it lacks {STATE_FILE}); name a step-* folder"
        )
    return path


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    dit: Mapping[str, Tensor],
    dit_config: Mapping[str, Any],
    average: Mapping[str, Tensor] | None,
    projectors: Mapping[str, Tensor] | None,
    optimizers: list[dict[str, Any]],
    settings: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Write one checkpoint and remove the oldest beyond `keep_last`; returns its folder.

    With a moving average, that is what `diffusion_pytorch_model.safetensors` holds (it is what one generates with) and
    the trained weights themselves go to `raw_weights.safetensors`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    final = folder / f"step-{step:08d}"
    aside = final.with_suffix(".part")
    for leftover in folder.glob("step-*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)

    def write(tensors: Mapping[str, Tensor], name: str) -> None:
        plain = {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
        try:
            save_file(plain, aside / name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{aside / name} cannot be written ({error}): free some space") from error

    write(dit if average is None else average, DIT_FILE)
    if average is not None:
        write(dit, RAW_FILE)
    if projectors is not None:
        write(projectors, PROJECTORS_FILE)
    (aside / "config.json").write_text(json.dumps(dict(dit_config), indent=2) + "\n")
    torch.save(optimizers, aside / OPTIMIZER_FILE)
    (aside / STATE_FILE).write_text(json.dumps({"step": step, "settings": settings}, indent=2) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    for old in checkpoints_in(folder)[:-keep_last]:
        shutil.rmtree(old)
    return final


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint: `step`, `settings`, `dit`, `average`, `projectors`, `optimizers`.

    Raises:
        ValueError: if a file is missing or cut short.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = json.loads((path / STATE_FILE).read_text())
        weights = load_file(path / DIT_FILE)
        has_average = (path / RAW_FILE).exists()
        return {
            "step": state["step"],
            "settings": state["settings"],
            "dit": load_file(path / RAW_FILE) if has_average else weights,
            "average": weights if has_average else None,
            "projectors": load_file(path / PROJECTORS_FILE) if (path / PROJECTORS_FILE).exists() else None,
            "optimizers": torch.load(path / OPTIMIZER_FILE, weights_only=True, map_location="cpu"),
        }
    except (*_UNREADABLE, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"checkpoint {path} is damaged or incomplete ({reason}): name an earlier one with --resume FOLDER"
        ) from error


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
