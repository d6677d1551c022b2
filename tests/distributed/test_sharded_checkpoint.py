"""Distributed checkpoints: any number of ranks reads what any number wrote, and nothing half-written counts."""

from __future__ import annotations

import hashlib
import os
import pickle
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from refalign_ext.backbone import WanModel
from refalign_ext.checkpoint.checkpointer import Checkpointer, checkpoints_in, read_meta
from refalign_ext.checkpoint.state import build_state, restore_state
from refalign_ext.checkpoint.stored_tensors import StoredTensors
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.parallelize import (
    TrainedModules,
    gather_full_tensors,
    shard_dit,
    shard_projectors,
)
from refalign_ext.distributed.sizes import ParallelSizes
from refalign_ext.projectors import ReferenceProjectors
from refalign_ext.training.muon import Muon
from tests.helpers.checkpoints import read_dit
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
CPU = torch.device("cpu")
# Biases of 10 and modulations of 1 row do not divide among 4 ranks evenly.
SIZES = {
    **{"dim": 36, "num_heads": 2, "ffn_dim": 42, "freq_dim": 12, "text_dim": 10, "text_len": 4},
    **{"in_dim": 4, "out_dim": 4, "num_layers": 1},
}
META = {"samples_seen": 12, "settings": {"steps": 9}}
CONFIG = {"_class_name": "WanModel", **SIZES}


def make(
    parallel: Parallel, seed: int = 0
) -> tuple[TrainedModules, list[torch.optim.Optimizer], dict[str, Tensor]]:
    """Sharded modules, their optimizer in a list, and a moving average."""
    torch.manual_seed(seed)
    dit, projectors = WanModel(**SIZES), ReferenceProjectors(SIZES["dim"], 6, 1)
    nn.init.normal_(dit.head.head.weight, std=0.1)
    if not parallel.is_alone:
        shard_dit(dit, parallel, precision="fp32")
        shard_projectors(projectors, parallel)
    trained = TrainedModules(dit, projectors)
    average = {name: value.detach().clone() for name, value in dit.state_dict().items()}
    return trained, [torch.optim.AdamW(trained.parameters(), lr=1e-2)], average


def train(
    trained: TrainedModules, optimizers: list[torch.optim.Optimizer], average: dict[str, Tensor], seed: int
) -> None:
    """One step with a real forward and backward pass."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(4, 2, 4, 4, generator=generator)
    text = torch.randn(3, 10, generator=generator)
    (output,) = trained.dit([video], t=torch.tensor([500.0]), context=[text], seq_len=8)
    tokens = torch.randn(1, 2, 4, 36, generator=generator)
    projected = trained.projectors([tokens] * trained.projectors.depth)
    (output.square().mean() + sum(part.square().mean() for part in projected)).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for name, value in trained.dit.state_dict().items():
            average[name].lerp_(value, 0.3)


def digests(
    trained: nn.Module, optimizers: list[torch.optim.Optimizer], average: dict[str, Tensor] | None
) -> dict[str, str]:
    """A hash of every whole tensor. All ranks call it."""
    found = {}
    for part, tensors in build_state(trained, optimizers, average).items():
        for name, whole in gather_full_tensors(tensors).items():
            content = whole.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            found[f"{part}.{name}"] = hashlib.sha256(content.tobytes()).hexdigest()
    return found


def parallel_of(world_size: int) -> Parallel:
    return Parallel.create(ParallelSizes(world_size), CPU) if world_size > 1 else Parallel.single(CPU)


def save_alone(folder: Path) -> Path:
    """A checkpoint of one step of one process."""
    run = make(Parallel.single(CPU))
    train(*run, seed=1)
    checkpointer = Checkpointer(folder, Parallel.single(CPU), keep_last=2)
    checkpointer.save(1, build_state(*run), META, CONFIG)
    path = checkpointer.finish()
    assert path is not None
    return path


def save_and_train_on(_rank: int, world_size: int, folder: Path) -> dict[str, str]:
    parallel = parallel_of(world_size)
    run = make(parallel)
    train(*run, seed=1)
    before = digests(*run)
    checkpointer = Checkpointer(folder, parallel, keep_last=2)
    for step in (1, 2):
        checkpointer.save(step, build_state(*run), META, CONFIG)
        train(*run, seed=2)
        for parameter in run[0].parameters():
            parameter.data.zero_()
        if step == 1:
            after = digests(*run)
    checkpointer.finish()
    assert before != after and checkpointer.finish() is None
    other = make(parallel, seed=5)
    restore_state(folder / "step-00000001", *other)
    assert digests(*other) == before
    restore_state(folder / "step-00000002", *other)
    assert digests(*other) == after
    return before


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    write = torch.distributed.checkpoint.FileSystemWriter.write_data

    def slow(*given: Any) -> Any:
        time.sleep(0.3)
        return write(*given)

    monkeypatch.setattr(torch.distributed.checkpoint.FileSystemWriter, "write_data", slow)
    if world_size == 1:
        save_and_train_on(0, 1, tmp_path)
    else:
        run_ranks(save_and_train_on, world_size, world_size, tmp_path)
    assert read_meta(tmp_path / "step-00000001") == {"step": 1, **META}


def fail_on_one_rank(rank: int, folder: Path) -> dict[str, tuple[str, list[str], float]]:
    """What each of three failures says on this rank, which checkpoints there are then, and after how many seconds."""
    parallel = parallel_of(2)
    run = make(parallel)
    train(*run, seed=1)
    state = build_state(*run)
    found = {}
    for how in ("full", "late", "file"):
        out = folder / how
        checkpointer = Checkpointer(out, parallel, keep_last=2)
        checkpointer.save(1, state, META, CONFIG)
        checkpointer.finish()
        parallel.barrier()
        with pytest.MonkeyPatch.context() as patch:
            if how == "full" and rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            if how == "late" and rank == 0:
                patch.setattr(Path, "rename", _refuse_to_rename)
            if how == "file":
                checkpointer.folder = out / "step-00000001" / "trainer.json"
            began = time.monotonic()
            checkpointer.save(2, state, META, CONFIG)
            with pytest.raises(OSError) as error:
                checkpointer.save(3, state, META, CONFIG)
            checkpointer.finish()  # said once is enough
            complete = sorted(path.name for path in checkpoints_in(out))
            found[how] = str(error.value), complete, time.monotonic() - began
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        parallel.barrier()
    return found


def _refuse_to_rename(self: Path, target: Path) -> Path:
    raise OSError(28, "No space left on device")


def test_an_error_on_one_rank_ends_all(tmp_path: Path) -> None:
    results = run_ranks(fail_on_one_rank, 2, tmp_path)
    for how in ("full", "late", "file"):
        for message, complete, seconds in (result[how] for result in results):
            assert message.startswith("checkpoint ") and "step-00000002 could not be written" in message
            assert "GiB are free there, make room or choose another --out" in message
            assert "\n" not in message and len(message) < 600
            assert complete == ["step-00000001"] and seconds < 60  # far below the time-out of the ranks
        assert ("rank 1" in results[0][how][0]) == (how == "full")


def die_while_writing(rank: int, folder: Path) -> str:
    parallel = parallel_of(2)
    run = make(parallel)
    checkpointer = Checkpointer(folder, parallel, keep_last=2)
    if rank == 1:
        torch.distributed.checkpoint.FileSystemWriter.write_data = lambda *given: os._exit(9)  # type: ignore[method-assign]
    checkpointer.save(1, build_state(*run), META, CONFIG)
    try:
        checkpointer.finish()
    except OSError as error:
        (folder / "message").write_text(str(error))
    return "done"


def test_a_rank_that_dies_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 1 died"):
        run_ranks(die_while_writing, 2, tmp_path, timeout=20)
    assert checkpoints_in(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step-00000001.part"]
    save_alone(tmp_path)
    assert not (tmp_path / "step-00000001.part").exists()


def test_machines_that_do_not_share_the_folder_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refalign_ext.checkpoint.checkpointer._SHARED_FOLDER_SECONDS", 0.0)
    with pytest.raises(
        AssertionError, match="does not see all of __1_0.distcp: all machines need the same --out"
    ):
        run_ranks(write_elsewhere, 2, tmp_path)
    assert checkpoints_in(tmp_path / "0") == []


def write_elsewhere(rank: int, folder: Path) -> None:
    parallel = parallel_of(2)
    checkpointer = Checkpointer(folder / str(rank), parallel, keep_last=2)
    checkpointer.save(1, build_state(*make(parallel)), META, CONFIG)
    checkpointer.finish()


def refuse_on_every_rank(rank: int, path: Path) -> list[str]:
    """What loading says: whole, with another path on rank 1, and with a piece that is cut short."""
    parallel = parallel_of(2)
    run = make(parallel)
    said = []
    for how in ("whole", "elsewhere", "cut"):
        if how == "cut" and rank == 0:
            (path / "__0_0.distcp").write_bytes((path / "__0_0.distcp").read_bytes()[:-2000])
        parallel.barrier()
        try:
            restore_state(path.with_name("elsewhere") if how == "elsewhere" and rank == 1 else path, *run)
            said.append("loaded")
        except ValueError as error:
            said.append(str(error))
    return said


def test_all_ranks_refuse_what_one_cannot_read(checkpoint: Path) -> None:
    first, second = run_ranks(refuse_on_every_rank, 2, checkpoint)
    assert first == second and first[0] == "loaded"
    assert "elsewhere is damaged or incomplete" in first[1]
    # A missing piece is noticed while reading, on whichever rank reads it.
    assert "damaged or incomplete" in first[2] and "\n" not in first[2]


def _frozen_but_one(trained: TrainedModules) -> TrainedModules:
    trained.requires_grad_(False)
    trained.dit.head.head.weight.requires_grad_(True)
    return trained


def train_a_part(rank: int, world_size: int, folder: Path) -> dict[str, str]:
    parallel = parallel_of(world_size)
    trained, _, average = make(parallel)
    optimizers = [torch.optim.AdamW([_frozen_but_one(trained).dit.head.head.weight], lr=1e-2)]
    if world_size == 2:
        train(trained, optimizers, average, seed=1)
        checkpointer = Checkpointer(folder, parallel, keep_last=1)
        checkpointer.save(1, build_state(trained, optimizers, None, trainable_only=True), META, CONFIG)
        checkpointer.finish()
    else:
        restore_state(folder / "step-00000001", trained, optimizers, None)
    return digests(trained, optimizers, None)


def test_only_what_is_trained_can_be_saved(tmp_path: Path) -> None:
    saved = run_ranks(train_a_part, 2, 2, tmp_path)[0]
    assert train_a_part(0, 1, tmp_path) == saved
    held = sorted(StoredTensors(tmp_path / "step-00000001").tensors)
    name = "dit.head.head.weight"
    states = [f"optimizers.AdamW.{name}.{entry}" for entry in ("exp_avg", "exp_avg_sq", "step")]
    assert held == [f"model.{name}", *states, "optimizers.AdamW.parameter_count"]
    with pytest.raises(ValueError, match=r"does not fit this run \(its AdamW has 1 parameters"):
        restore_state(tmp_path / "step-00000001", *make(Parallel.single(CPU)))


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_alone(tmp_path_factory.mktemp("run"))


@pytest.fixture
def checkpoint(saved_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_once, tmp_path / saved_once.name)


def _without_projectors(run: tuple) -> tuple:
    trained = TrainedModules(run[0].dit, None)
    return trained, [torch.optim.AdamW(trained.parameters())], run[2]


def _wider(run: tuple) -> tuple:
    trained = TrainedModules(WanModel(**{**SIZES, "ffn_dim": 44}), run[0].projectors)
    return trained, [torch.optim.AdamW(trained.parameters())], dict(trained.dit.state_dict())


def _deeper(run: tuple) -> tuple:
    trained = TrainedModules(WanModel(**{**SIZES, "num_layers": 2}), run[0].projectors)
    return trained, [], None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_without_projectors, r"its AdamW has \d+ parameters, this run's \d+"),
        (lambda run: (run[0], [Muon([run[0].dit.blocks[0].ffn[0].weight])], run[2]), "no state of Muon"),
        (lambda run: (run[0], [], run[2]), "unexpected, first optimizers.AdamW.dit.blocks.0"),
        (
            _wider,
            r"of another shape, first model.dit.blocks.0.ffn.0.weight is \[42, 36\] instead of \[44, 36\]",
        ),
        (_deeper, "27 missing, first model.dit.blocks.1"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    checkpoint: Path, change: Callable[[tuple], tuple], reason: str
) -> None:
    with pytest.raises(
        ValueError, match=f"checkpoint {checkpoint} does not fit this run .*{reason}"
    ) as error:
        restore_state(checkpoint, *change(make(Parallel.single(CPU))))
    assert str(error.value).endswith("use the settings it was trained with, --resume off or another --out")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.marker,))


def test_metadata_runs_no_code(checkpoint: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = _Evil(marker)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    run = make(Parallel.single(CPU))
    for read in (lambda: restore_state(checkpoint, *run), lambda: read_dit(checkpoint)):
        with pytest.raises(ValueError, match="damaged or incomplete .*not allowed.*--resume FOLDER"):
            read()
    assert not marker.exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())
    assert marker.exists()  # so the file would have


def _objects(metadata: Any) -> None:
    metadata.state_dict_metadata["model.dit.head.modulation"] = BytesStorageMetadata()


def _other_folder(metadata: Any) -> None:
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere/__0_0.distcp"


def _missing_piece(metadata: Any) -> None:
    metadata.state_dict_metadata["model.dit.head.modulation"].chunks.clear()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_objects, "is no tensor"),
        (_other_folder, "is no file of this"),
        (_missing_piece, "pieces of model.dit.head.modulation are missing"),
    ],
)
def test_metadata_names_whole_tensors_of_its_own_folder_only(
    checkpoint: Path, change: Callable[[Any], None], reason: str
) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    change(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=f"damaged or incomplete .*{reason}"):
        restore_state(checkpoint, *make(Parallel.single(CPU)))
