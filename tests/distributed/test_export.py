"""Exported files: bitwise the checkpoint's weights, read by us and by diffusers, and written in little memory."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from torch import Tensor, nn

from refalign_ext.backbone import WanModel, dit_arguments, load_dit, read_dit_checkpoint
from refalign_ext.checkpoint.checkpointer import Checkpointer
from refalign_ext.checkpoint.export import export_checkpoint
from refalign_ext.checkpoint.state import build_state
from refalign_ext.checkpoint.stored_tensors import StoredTensors
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.parallelize import TrainedModules, shard_dit, shard_projectors
from refalign_ext.distributed.sizes import ParallelSizes
from refalign_ext.projectors import ReferenceProjectors
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_checkpoint import tiny_config
from wan.utils.dit_checkpoint import diffusers_key, dit_state_dict_from_diffusers

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
CPU = torch.device("cpu")
META = {"samples_seen": 0, "settings": {}}


def modules() -> TrainedModules:
    torch.manual_seed(0)
    model = WanModel(**dit_arguments(tiny_config()))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return TrainedModules(model, ReferenceProjectors(48, 6, 2))


def model_config() -> dict:
    return {"_class_name": "WanModel", "model_type": "t2v", **dit_arguments(tiny_config())}


def write(_rank: int, world_size: int, folder: Path, averaged: bool) -> None:
    parallel = Parallel.create(ParallelSizes(world_size), CPU)
    trained = modules()
    if world_size > 1:
        shard_dit(trained.dit, parallel, precision="fp32")
        shard_projectors(trained.projectors, parallel)
    optimizer = torch.optim.AdamW(trained.dit.parameters())
    for parameter in trained.dit.parameters():
        parameter.grad = torch.ones_like(parameter)
    average = {name: value.detach().clone() for name, value in trained.dit.state_dict().items()}
    optimizer.step()
    checkpointer = Checkpointer(folder, parallel, keep_last=1)
    checkpointer.save(
        1, build_state(trained, [optimizer], average if averaged else None), META, model_config()
    )
    checkpointer.finish()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by three ranks, with optimizer state and an average that differs from what was trained."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(write, 3, 3, folder, True)
    return folder / "step-00000001"


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("layout", ["upstream", "diffusers"])
@pytest.mark.parametrize("shard_gigabytes", [5.0, 1e-4])
def test_exported_weights_are_the_checkpoints(
    checkpoint: Path, tmp_path: Path, layout: str, shard_gigabytes: float
) -> None:
    out = tmp_path / "new" / "model"
    files = export_checkpoint(
        checkpoint, out, layout=layout, projectors=True, shard_gigabytes=shard_gigabytes
    )
    expected = modules()
    found = read_dit_checkpoint(out)
    assert_same(found.state_dict, expected.dit.state_dict())
    assert_same(found.projectors, expected.projectors.state_dict())
    assert_same(load_dit(out, tiny_config()).state_dict(), expected.dit.state_dict())
    assert found.config["dim"] == 48 and found.config["num_heads"] == 2
    names = sorted(path.name for path in out.iterdir())
    if shard_gigabytes == 5:
        assert names == ["config.json", "diffusion_pytorch_model.safetensors"] and len(files) == 1
    else:
        assert len(files) > 3 and names[0] == "config.json"
        assert names[1] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
        index = json.loads((out / "diffusion_pytorch_model.safetensors.index.json").read_text())
        tensors = {**found.state_dict, **found.projectors}
        assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in tensors.values())
        for file in files:
            with safe_open(file, "pt") as shard:
                held = {name: shard.get_slice(name) for name in list(shard.keys())}
                sizes = [4 * torch.Size(piece.get_shape()).numel() for piece in held.values()]
                assert sum(sizes) <= 100_000 or len(sizes) == 1
                assert all(index["weight_map"][name] == file.name for name in held)
                assert shard.metadata() == {"format": "pt"}
    assert [path.name for path in out.parent.iterdir()] == ["model"]


def test_raw_weights_and_no_projectors(checkpoint: Path, tmp_path: Path) -> None:
    for raw in (True, False):
        export_checkpoint(checkpoint, tmp_path / str(raw), raw=raw)
    trained, average = (read_dit_checkpoint(tmp_path / name) for name in ("True", "False"))
    assert not trained.projectors and not average.projectors
    assert_same(average.state_dict, modules().dit.state_dict())
    # The step with a gradient of one moved every weight by the learning rate, 1e-3, and decayed it by 1e-5.
    for name, value in average.state_dict.items():
        torch.testing.assert_close(trained.state_dict[name], value * (1 - 1e-5) - 1e-3, atol=1e-6, rtol=0)


def test_diffusers_loads_it_and_computes_the_same(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "transformer", layout="diffusers")
    theirs, report = WanTransformer3DModel.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, config = modules().dit.eval(), tiny_config()
    video = torch.randn(config.in_dim, 2, 4, 4)
    text = torch.randn(config.text_len, config.text_dim)
    with torch.no_grad():
        (expected,) = ours([video], t=torch.tensor([7.0]), context=[text], seq_len=8)
        found = theirs.eval()(video[None], torch.tensor([7]), text[None], return_dict=False)[0][0]
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_key_maps_are_each_others_inverse() -> None:
    names = [*modules().dit.state_dict(), "blocks.1.norm2.weight", "blocks.0.input_mlp.proj.0.weight"]
    theirs = [diffusers_key(name) for name in names]
    assert list(dit_state_dict_from_diffusers(dict.fromkeys(theirs))) == names
    assert len(set(theirs)) == len(names)
    assert diffusers_key("blocks.3.self_attn.o.bias") == "blocks.3.attn1.to_out.0.bias"


def test_memory_is_that_of_one_tensor(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    alive: dict[int, int] = {}
    peak = 0
    read = StoredTensors.read

    def watched(self: StoredTensors, name: str) -> Tensor:
        nonlocal peak
        tensor = read(self, name)
        asked.append(name)
        alive[len(asked)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, len(asked))
        peak = max(peak, sum(alive.values()))
        return tensor

    monkeypatch.setattr(StoredTensors, "read", watched)
    export_checkpoint(checkpoint, tmp_path / "out", projectors=True)
    gc.collect()
    assert len(asked) == len(set(asked)) and not alive
    assert {name.split(".")[0] for name in asked} == {"average", "model"}
    assert all(name.startswith("model.projectors.") for name in asked if not name.startswith("average."))
    stored = StoredTensors(checkpoint)
    largest = max(stored.weight(name).size_in_bytes for name in asked)
    assert largest <= peak <= 2 * largest  # while one is read, the one before may still have a name


def test_what_cannot_be_exported_is_said(checkpoint: Path, tmp_path: Path) -> None:
    def attempt(path: Path = checkpoint, out: Path = tmp_path / "out", **changes: object) -> str:
        with pytest.raises(ValueError) as error:
            export_checkpoint(path, out, **changes)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()
        return str(error.value)

    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    assert "used is in use: choose another folder or empty it" in attempt(out=tmp_path / "used")
    assert "no complete training checkpoint; name a step-* folder" in attempt(tmp_path)
    checkpointer = Checkpointer(tmp_path / "run", Parallel.single(CPU), keep_last=3)
    bare = TrainedModules(modules().dit, None)
    checkpointer.save(1, build_state(bare, [], None), META, {"_class_name": "WanModel"})
    checkpointer.finish()
    assert "has no projectors: export it with --no-projectors" in attempt(
        tmp_path / "run" / "step-00000001", projectors=True
    )
    assert "config.json lacks 'window_size'" in attempt(
        tmp_path / "run" / "step-00000001", layout="diffusers"
    )
    bare.requires_grad_(False).dit.head.head.weight.requires_grad_(True)
    checkpointer.save(2, build_state(bare, [], None, trainable_only=True), META, model_config())
    checkpointer.finish()
    assert "holds only what was trained, not a whole DiT" in attempt(tmp_path / "run" / "step-00000002")


def test_a_damaged_checkpoint_leaves_nothing_behind(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, Parallel.single(CPU), keep_last=3)
    checkpointer.save(1, build_state(modules(), [], None), META, model_config())
    path = checkpointer.finish()
    shards = path / "__0_0.distcp"
    shards.write_bytes(shards.read_bytes()[: shards.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        export_checkpoint(path, tmp_path / "out", projectors=True)
    assert list(tmp_path.iterdir()) == [path]
