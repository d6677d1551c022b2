"""Checkpoints of LoRA runs: merged or as an adapter, they compute what the trained model does, in our classes and others'."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from refalign_ext.backbone import (
    ReferenceBackbone,
    WanModel,
    diffusers_key,
    dit_arguments,
    read_dit_checkpoint,
)
from refalign_ext.checkpoint import reading
from refalign_ext.checkpoint.adapters import files_sha256
from refalign_ext.checkpoint.export import export_adapter, export_checkpoint
from refalign_ext.checkpoint.reading import read_any_dit
from refalign_ext.checkpoint.stored_tensors import StoredTensors
from refalign_ext.cli import main
from refalign_ext.config import TrainConfig
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.parallelize import parallelize
from refalign_ext.distributed.sizes import ParallelSizes
from refalign_ext.lora import TARGETS, add_lora, is_adapter_key
from refalign_ext.training.trainer import Trainer
from tests.helpers import tiny_training
from tests.helpers.checkpoints import read_dit, read_projectors
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_training import CPU, TEXT_DIM, Source, change, encode_text

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
RANK, ALPHA = 3, 6.0
FILE = "diffusion_pytorch_model.safetensors"
ADAPTED = {
    f"blocks.{block}.{layer}.weight"
    for block in range(3)
    for layer in (
        *(f"{kind}.{leaf}" for kind in ("self_attn", "cross_attn") for leaf in "qkvo"),
        *("ffn.0", "ffn.2"),
    )
}


def settings(base: Path, out: Path, **changes: object) -> TrainConfig:
    return change(
        from_scratch=False,
        dit_ckpt=str(base),
        lora_rank=RANK,
        lora_alpha=ALPHA,
        ema_decay=0.0,
        learning_rate=0.05,
        warmup_steps=0,
        batch_size=1,
        drop_text=0.0,
        drop_references=0.0,
        drop_both=0.0,
        out=str(out),
        **changes,
    )


def adapters_on(config: TrainConfig, parallel: Parallel) -> Trainer:
    """A trainer of adapters on the model that the configuration names."""
    plain = tiny_training.build(config)
    plain.trained.dit.load_state_dict(read_any_dit(Path(config.dit_ckpt)).state_dict)
    add_lora(plain.trained.dit, RANK, ALPHA, TARGETS, seed=config.seed)
    trained = parallelize(plain.backbone, plain.trained.projectors, parallel, config)
    return Trainer(config, plain.backbone, trained, Source(), encode_text, parallel)


def predict(backbone: ReferenceBackbone) -> Tensor:
    """[4, F, H, W] for one sample with references."""
    sample = Source().sample(3)
    with torch.no_grad():
        output = backbone([sample.latents], torch.tensor([500.0]), encode_text(["a"]), [sample.references])
    return output.prediction[0]


def predict_with(weights: dict[str, Tensor], config: dict) -> Tensor:
    model = WanModel(**dit_arguments(config))
    model.load_state_dict(weights)
    return predict(ReferenceBackbone(model.eval()))


def train(_rank: int, ranks: int, base: Path, out: Path, steps: int) -> Tensor:
    """Saves a checkpoint; what the model predicts then."""
    parallel = Parallel.create(ParallelSizes(ranks), CPU) if ranks > 1 else Parallel.single(CPU)
    trainer = adapters_on(settings(base, out), parallel)
    for _ in range(steps):
        assert not trainer.train_step().skipped
    trainer.save()
    trainer.finish_saving()
    return predict(trainer.backbone)


def assert_bitwise(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = found[name].dtype == value.dtype and torch.equal(found[name], value)
        assert same and torch.equal(found[name].signbit(), value.signbit()), name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the adapters are trained on, in upstream's layout."""
    folder = tmp_path_factory.mktemp("base")
    model = tiny_training.build(change()).trained.dit
    weights = model.state_dict()
    weights["blocks.0.self_attn.q.weight"][0, 0] = -0.0
    save_file(weights, folder / FILE)
    config = {name: value for name, value in dict(model.config).items() if not name.startswith("_")}
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", **config}))
    return folder


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, Tensor]]:
    """By number of ranks: (checkpoint after two steps, what the trained model predicts)."""
    out = tmp_path_factory.mktemp("runs")
    predictions = {
        1: train(0, 1, base, out / "1", 2),
        2: run_ranks(train, 2, 2, base, out / "2", 2)[0],
    }
    path = Path("checkpoints", "step-00000002")
    return {ranks: (out / str(ranks) / path, prediction) for ranks, prediction in predictions.items()}


@pytest.fixture(scope="module")
def checkpoint(runs: dict[int, tuple[Path, Tensor]]) -> Path:
    return runs[1][0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_merged_model_computes_what_was_trained(
    runs: dict[int, tuple[Path, Tensor]], ranks: int, base: Path, tmp_path: Path
) -> None:
    checkpoint, expected = runs[ranks]
    assert all(is_adapter_key(name) for name in StoredTensors(checkpoint).names("model.dit."))
    export_checkpoint(checkpoint, tmp_path / "up", projectors=True)
    found, before = read_dit_checkpoint(tmp_path / "up"), read_dit_checkpoint(base)
    start = predict_with(before.state_dict, before.config)
    torch.testing.assert_close(predict_with(found.state_dict, found.config), expected, atol=1e-5, rtol=1e-5)
    assert (expected - start).abs().max() > 1e-2
    assert list(found.state_dict) == list(before.state_dict)
    changed = {
        name for name, value in found.state_dict.items() if not torch.equal(value, before.state_dict[name])
    }
    assert changed == ADAPTED
    assert_bitwise(found.projectors, read_projectors(checkpoint))
    assert len(found.projectors) == 4
    with safe_open(tmp_path / "up" / FILE, "pt") as file:
        digest = hashlib.sha256((base / FILE).read_bytes()).hexdigest()
        assert file.metadata() == {"format": "pt", "base_model": str(base), "base_model_sha256": digest}

    files = export_checkpoint(checkpoint, tmp_path / "theirs", layout="diffusers", shard_gigabytes=1e-5)
    assert len(files) > 1
    theirs = read_dit_checkpoint(tmp_path / "theirs")
    assert_bitwise(theirs.state_dict, found.state_dict)
    assert not theirs.projectors
    read = read_any_dit(checkpoint)
    assert_bitwise(read.state_dict, found.state_dict)
    assert_bitwise(read.projectors, found.projectors)
    assert read.config["dim"] == 24 and base / FILE in read.files


def test_peft_loads_the_adapter(runs: dict[int, tuple[Path, Tensor]], base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    checkpoint, expected = runs[2]
    (file,) = export_adapter(checkpoint, tmp_path / "adapter")
    names = sorted(path.name for path in file.parent.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    assert file.stat().st_mode == (file.parent / names[0]).stat().st_mode
    before = read_dit_checkpoint(base)
    model = WanModel(**dit_arguments(before.config))
    model.load_state_dict(before.state_dict)
    wrapped = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    torch.testing.assert_close(
        predict(ReferenceBackbone(wrapped.base_model.model)), expected, atol=1e-5, rtol=1e-5
    )
    config = json.loads((file.parent / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (RANK, ALPHA, str(base))
    assert {f"{layer}.weight" for layer in config["target_modules"]} == ADAPTED
    assert config["target_modules"] == sorted(config["target_modules"])
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["base_model_sha256"] == files_sha256([base / FILE])


def test_diffusers_loads_the_adapter(checkpoint: Path, base: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "merged", layout="diffusers")
    (file,) = export_adapter(checkpoint, tmp_path / "adapter", layout="diffusers")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["pytorch_lora_weights.safetensors"]
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["base_model"] == str(base)
    merged, model, plain = (WanTransformer3DModel.from_pretrained(tmp_path / "merged") for _ in range(3))
    before = read_dit_checkpoint(base).state_dict
    for one in (model, plain):
        one.load_state_dict({diffusers_key(name): value for name, value in before.items()})
    model.load_lora_adapter(str(tmp_path / "adapter"), weight_name=file.name)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 4, 4, generator=generator),
        "timestep": torch.tensor([400]),
        "encoder_hidden_states": torch.randn(1, 16, TEXT_DIM, generator=generator),
    }
    with torch.no_grad():
        found, expected, without = (one.eval()(**inputs).sample for one in (model, merged, plain))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - without).abs().max() > 1e-2


@pytest.mark.parametrize("form", ["step folder", "upstream", "diffusers"])
def test_every_form_of_our_adapter_is_read_as_a_lora(
    checkpoint: Path, base: Path, tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    lora = checkpoint
    if form != "step folder":
        export_adapter(checkpoint, lora := tmp_path / form, layout=form)
    expected, start = read_any_dit(checkpoint).state_dict, read_dit_checkpoint(base)
    found = read_any_dit(base, loras=[str(lora)])
    assert list(found.state_dict) == list(start.state_dict) and found.config == start.config
    for name, value in found.state_dict.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-6, msg=name)
    assert not caplog.records

    half = read_any_dit(base, loras=[f"{lora}:0.25", f"{lora}:0.25"]).state_dict
    for name, value in half.items():
        middle = (start.state_dict[name] + expected[name]) / 2
        torch.testing.assert_close(value, middle, atol=1e-6, rtol=1e-6, msg=name)

    shutil.copytree(base, tmp_path / "other")
    changed = {name: value + 1 for name, value in start.state_dict.items()}
    save_file(changed, tmp_path / "other" / FILE)
    read_any_dit(tmp_path / "other", loras=[str(lora)])
    (warning,) = caplog.messages
    assert str(base) in warning and str(tmp_path / "other") in warning


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/latest"])
def test_a_run_means_its_newest_checkpoint(checkpoint: Path, inside: str) -> None:
    path = checkpoint.parents[1] / inside
    assert reading.newest_of_run(path) == checkpoint
    assert reading.dit_files(path) == reading.dit_files(checkpoint) != []
    assert_bitwise(read_any_dit(path).state_dict, read_any_dit(checkpoint).state_dict)


def test_what_was_trained_on_a_model_with_a_lora_is_merged_into_that(
    checkpoint: Path, base: Path, tmp_path: Path
) -> None:
    changed = save_file(read_any_dit(base, loras=[f"{checkpoint}:0.5"]).state_dict, tmp_path / FILE)
    assert changed is None
    trainer = adapters_on(
        settings(tmp_path / FILE, tmp_path / "run", lora=f"{checkpoint}:0.5"), Parallel.single(CPU)
    )
    trainer.train_step()
    trainer.save()
    trainer.finish_saving()
    expected = predict(trainer.backbone)
    step = tmp_path / "run" / "checkpoints" / "step-00000001"
    meta = json.loads((step / "trainer.json").read_text())
    meta["settings"]["dit_ckpt"] = str(base)
    (step / "trainer.json").write_text(json.dumps(meta))
    found = predict_with(read_any_dit(step).state_dict, read_dit_checkpoint(base).config)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_adapter_gives_the_base_bitwise(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {name: value.to(dtype) for name, value in load_file(base / FILE).items()}
    save_file(weights, tmp_path / "base.safetensors")
    train(0, 1, tmp_path / "base.safetensors", tmp_path / "run", 0)
    path = tmp_path / "run" / "checkpoints" / "step-00000000"
    assert_bitwise(read_dit(path), weights)
    export_checkpoint(path, tmp_path / "out")
    assert_bitwise(load_file(tmp_path / "out" / FILE), weights)


def test_an_adapter_of_an_adapter_of_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """Each run started from the one before, the first of them with a moving average of all weights."""
    whole = tiny_training.build(change(out=str(tmp_path / "whole"), learning_rate=0.02, warmup_steps=0))
    whole.train_step()
    whole.save()
    start = whole.finish_saving()
    average = {name: value.clone() for name, value in whole.ema.state_dict().items()}
    assert not torch.equal(average["head.head.weight"], whole.trained.dit.state_dict()["head.head.weight"])
    expected = [average]
    for number in range(2):
        config = settings(start, tmp_path / str(number), seed=number)
        trainer = adapters_on(config, Parallel.single(CPU))
        trainer.train_step()
        trainer.save()
        start = trainer.finish_saving()
        expected.append(trainer.ema.full_state_dict())
    found = read_dit(start)
    assert_bitwise(found, expected[-1])
    name = "blocks.0.ffn.0.weight"
    assert len({float(weights[name].sum()) for weights in expected}) == 3
    export_checkpoint(start, tmp_path / "out")
    assert_bitwise(load_file(tmp_path / "out" / FILE), found)


def test_a_base_that_is_gone(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths start where the training ran."""
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    shutil.copytree(base, there / "model")
    elsewhere.mkdir()
    monkeypatch.chdir(there)
    train(0, 1, Path("model"), there / "run", 1)
    path = there / "run" / "checkpoints" / "step-00000001"
    expected = read_dit(path)
    monkeypatch.chdir(elsewhere)
    for attempt in (
        lambda: read_dit(path),
        lambda: read_any_dit(path),
        lambda: export_checkpoint(path, Path("out")),
    ):
        with pytest.raises(ValueError) as error:
            attempt()
        assert f"{path} is an adapter of model, which is not here" in str(error.value)
        assert f"python -m refalign_ext export {path} --base MODEL --out FOLDER" in str(error.value)
    assert not list(elsewhere.iterdir())
    # The adapter itself needs no base, and then has no fingerprint of it.
    (file,) = export_adapter(path, Path("adapter"))
    assert json.loads(Path("adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "model"
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "base_model": "model"}
    result = CliRunner().invoke(main, ["export", str(path), "--out", "out", "--base", str(there / "model")])
    assert result.exit_code == 0, result.output
    assert_bitwise(load_file(elsewhere / "out" / FILE), expected)


def test_mistakes_are_said_in_one_line(checkpoint: Path, base: Path, tmp_path: Path) -> None:
    def attempt(path: Path, *options: str) -> str:
        result = CliRunner().invoke(main, ["export", str(path), "--out", str(tmp_path / "out"), *options])
        assert result.exit_code == 2 and result.output.count("\n") == 1, result.output
        assert not list(tmp_path.glob("out*"))
        return result.output

    whole = tiny_training.build(change(out=str(tmp_path / "whole")))
    whole.save()
    full = whole.finish_saving()
    assert "holds a whole DiT, no adapter: export it without --adapter" in attempt(full, "--adapter")
    assert "holds a whole DiT, no adapter: leave --base out" in attempt(full, "--base", str(base))
    assert "--adapter and --projectors exclude each other" in attempt(checkpoint, "--adapter", "--projectors")
    assert "--base nowhere does not exist: name the model" in attempt(checkpoint, "--base", "nowhere")
    assert "--base nowhere does not exist" in attempt(checkpoint, "--base", "nowhere", "--adapter")
    assert "cannot be its own base" in attempt(checkpoint, "--base", str(checkpoint))
    weights = load_file(base / FILE)
    name = "blocks.2.ffn.0.weight"
    save_file({**weights, name: torch.zeros(40, 24)}, tmp_path / "wider.safetensors")
    message = "adapter of blocks.2.ffn.0 is for a layer of [32, 24] and this one has [40, 24]"
    assert message in attempt(checkpoint, "--base", str(tmp_path / "wider.safetensors"))
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "less.safetensors")
    message = "lacks 1 layers of the adapter, such as blocks.2.ffn.0"
    assert message in attempt(checkpoint, "--base", str(tmp_path / "less.safetensors"))

    copied = shutil.copytree(checkpoint, tmp_path / "copied")
    meta = json.loads((copied / "trainer.json").read_text())
    for changes, message in (
        ({"from_scratch": True, "dit_ckpt": None}, "is an adapter of random weights: name the model"),
        ({"lora_rank": 0}, "its settings have no lora_rank and lora_alpha"),
        ({"lora_rank": RANK + 1}, "which is not of rank 4: the adapter is damaged"),
    ):
        changed = meta | {"settings": meta["settings"] | changes}
        (copied / "trainer.json").write_text(json.dumps(changed))
        assert message in attempt(copied)


def test_merging_holds_one_layer(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: set[int] = set()
    most, merged = 0, 0
    merge = reading.merged_weight

    def watched(*arguments: object) -> Tensor:
        nonlocal most, merged
        tensor = merge(*arguments)
        merged += 1
        alive.add(merged)
        weakref.finalize(tensor, alive.discard, merged)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(reading, "merged_weight", watched)
    export_checkpoint(checkpoint, tmp_path / "out", projectors=True)
    gc.collect()
    assert merged == len(ADAPTED) and not alive
    assert most <= 2  # while one is made, the one before may still have a name
