"""A run goes on, on any number of ranks and any division of them, as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tests.helpers.tiny_training as tiny
from refalign_ext.backbone import WanModel
from refalign_ext.checkpoint.state import build_state
from refalign_ext.checkpoint.stored_tensors import StoredTensors
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.parallelize import gather_full_tensors, parallelize
from refalign_ext.distributed.sizes import ParallelSizes
from refalign_ext.lora import add_lora, split_state_dict
from refalign_ext.training.trainer import Trainer
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_training import CPU, build, change

pytestmark = pytest.mark.timeout(400)

ALONE = ParallelSizes()
SETTINGS: dict[str, dict[str, Any]] = {
    "muon": {"optimizer": "muon"},  # with AdamW for all that is not a block's matrix
    "adamw": {},
    "lora": {"lora_rank": 2, "ema_decay": 0.0, "from_scratch": False},
}
# Muon orthogonalises in bf16, where rounding noise in a gradient may tip the last bit.
TOLERANCES = {"adamw": 1e-6, "muon": 1e-4, "lora": 1e-6}
# Ranks (data x ring x Ulysses) and the step up to which they go.
CHAIN = ((ParallelSizes(2, 1, 2), 2), (ParallelSizes(2), 3), (ALONE, 4), (ParallelSizes(1, 1, 2), 5))
LAST = 5


def make(sizes: ParallelSizes, out: Path, kind: str) -> Trainer:
    settings = {"out": str(out), "batch_size": 1, "global_batch_size": 4, "steps": LAST, "keep_last": 9}
    config = change(**{**settings, **SETTINGS[kind]})

    def with_adapters(backbone, *others):  # noqa: ANN001, ANN002, ANN202
        if config.lora_rank:
            add_lora(backbone.model, config.lora_rank, 4.0, "q,k,v,o", seed=1)
        return parallelize(backbone, *others)

    tiny.parallelize = with_adapters
    trainer = build(config, None, Parallel.create(sizes, CPU), heads=4)
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            if "eps" in group:
                group["eps"] = 1e-5  # Adam would blow up the rounding noise of gradients that are zero
    return trainer


def go_on(
    rank: int, sizes: ParallelSizes, out: Path, kind: str, start: Path | None, end: int
) -> tuple[list[float], list[str]]:
    """Losses up to step `end`, saved there, and what differed from the checkpoint after loading it."""
    trainer = make(sizes, out, kind)
    different = []
    if start is not None:
        trainer.load(start)
        different = differences(trainer, start)
        assert (trainer.step, trainer.samples_seen) == (int(start.name[-8:]), 4 * int(start.name[-8:]))
    losses = [trainer.train_step().values["loss/total"] for _ in range(end - trainer.step)]
    trainer.save()
    trainer.finish_saving()
    return losses, different


def differences(trainer: Trainer, path: Path) -> list[str]:
    """Names of tensors that are not, bit by bit, what the checkpoint holds."""
    only_adapters = trainer.config.lora_rank > 0
    state = build_state(
        trainer.trained, trainer.optimizers, trainer.ema.average, trainable_only=only_adapters
    )
    stored = StoredTensors(path)
    held = {
        f"{part}.{name}": value
        for part, tensors in state.items()
        for name, value in gather_full_tensors(tensors).items()
    }
    assert held.keys() == stored.tensors.keys()
    return [name for name, value in held.items() if not torch.equal(value.cpu(), stored.read(name))]


def run(sizes: ParallelSizes, out: Path, kind: str, start: Path | None, end: int) -> tuple[list[float], Path]:
    """The losses, the same on all ranks, and the checkpoint of step `end`."""
    results = run_ranks(go_on, sizes.world, sizes, out, kind, start, end)
    for losses, different in results:
        assert losses == results[0][0]
        assert different == []
    return results[0][0], out / "checkpoints" / f"step-{end:08d}"


@pytest.mark.parametrize(
    "kind", ["muon", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("adamw", "lora"))]
)
def test_any_number_of_ranks_goes_on_from_what_any_number_wrote(tmp_path: Path, kind: str) -> None:
    expected, _ = run(ALONE, tmp_path / "uninterrupted", kind, None, LAST)
    found, checkpoint = [], None
    for sizes, end in CHAIN:
        losses, checkpoint = run(sizes, tmp_path / "run", kind, checkpoint, end)
        found += losses
    assert len(found) == LAST
    assert found == pytest.approx(expected, rel=TOLERANCES[kind], abs=0)


def write_half(folder: Path) -> Path:
    """A file of the tiny model's weights in bf16, but for what stays in float32, as weights are published."""
    model = build(change(weight=0.0)).trained.dit
    tensors = {
        name: value.detach().to(
            torch.float32 if name.startswith(WanModel.float32_modules) else torch.bfloat16, copy=True
        )
        for name, value in model.state_dict().items()
    }
    save_file(tensors, folder / "half.safetensors")
    return folder / "half.safetensors"


def start_from_half(
    rank: int, sizes: ParallelSizes, file: Path, lora_rank: int
) -> tuple[list[float], set[torch.dtype], list[str]]:
    """Losses of two steps, the dtypes that are trained, and names of weights that were not the file's at the start."""
    config = change(batch_size=4 // sizes.data, lora_rank=lora_rank, ema_decay=0.0, from_scratch=False)

    def from_file(backbone, projectors, parallel, config):  # noqa: ANN001, ANN202
        backbone.model.load_state_dict(load_file(file), assign=True)
        if parallel.is_alone:
            backbone.model.float()
        if lora_rank:
            add_lora(backbone.model, lora_rank, 4.0, "q,k,v,o", seed=1)
        return parallelize(backbone, projectors, parallel, config)

    tiny.parallelize = from_file
    trainer = build(config, None, Parallel.create(sizes, CPU))
    weights = gather_full_tensors(split_state_dict(trainer.trained.dit.state_dict())[0])
    held = load_file(file)
    different = [name for name, value in held.items() if not torch.equal(weights[name], value.float())]
    dtypes = {value.dtype for value in trainer.trained.parameters()}
    return [trainer.train_step().values["loss/total"] for _ in range(2)], dtypes, different


@pytest.mark.parametrize("lora_rank", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_weights_in_half_precision_are_trained_in_float32_and_their_file_stays(
    tmp_path: Path, lora_rank: int
) -> None:
    file = write_half(tmp_path)
    before = file.read_bytes()
    [(expected, _, _)] = run_ranks(start_from_half, 1, ALONE, file, lora_rank)
    for losses, dtypes, different in run_ranks(start_from_half, 2, ParallelSizes(2), file, lora_rank):
        assert (dtypes, different) == ({torch.float32}, [])
        assert losses == pytest.approx(expected, rel=1e-5)
    assert file.read_bytes() == before
