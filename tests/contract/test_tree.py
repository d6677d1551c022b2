"""RefAlign on another Wan tree: the one that WAN_ROOT names, else `tests/upstream_like`; see `patched_root`.

The tree's model and ours get the same weights and must compute the same with references, in every use that is made of it.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from refalign_ext.backbone import WAN_CONFIGS, BackboneOutput, ReferenceBackbone, WanModel, dit_arguments
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.sequence_parallel import attach_sequence_parallel
from refalign_ext.distributed.sizes import ParallelSizes
from refalign_ext.pipeline import R2VPipeline
from refalign_ext.upstream.tree import WanTree
from tests.helpers.ranks import run_ranks
from tests.helpers.rebase_trees import fill
from tests.helpers.tiny_checkpoint import build, tiny_config
from tests.helpers.tiny_training import CPU, Source, change
from tests.helpers.tiny_training import build as make_trainer

ROOT = Path(__file__).resolve().parents[2]
TEXT_DIM, TEXT_LEN, LAYERS = 20, 16, 2
SIZES = {"dim": 64, "ffn_dim": 64, "freq_dim": 32, "text_dim": TEXT_DIM, "text_len": TEXT_LEN, "num_heads": 2}
TOLERANCE = 1e-5  # of the largest value
TAPS = ("block", "self_attn")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*autocast")


@pytest.fixture(scope="module")
def tree(patched_root: Path) -> WanTree:
    return WanTree(patched_root, "tree_under_test")


@pytest.fixture(scope="module")
def pair(tree: WanTree) -> Callable[..., tuple[WanModel, nn.Module]]:
    """Makes our model and the tree's with the same weights, each its own, none of them left at zero or one."""

    def make(**overrides: object) -> tuple[WanModel, nn.Module]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            ours = WanModel(**(SIZES | {"num_layers": LAYERS} | overrides)).eval()
            with torch.no_grad():
                for name, parameter in ours.named_parameters():
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn_like(parameter), alpha=0.2)
                    elif name == "head.head.weight" or name.startswith("text_embedding"):
                        nn.init.xavier_uniform_(parameter)
        return ours, tree.adopt_parameters(copy.deepcopy(ours))

    return make


def inputs(
    counts: Sequence[int], grids: Sequence[tuple[int, int, int]] | None = None, channels: int = 16
) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:
    """Latents, timesteps, texts of different lengths and references; odd grids of tokens."""
    generator = torch.Generator().manual_seed(1)
    grids = [(3, 6, 10)] * len(counts) if grids is None else grids

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    latents = [draw(channels, *grid) for grid in grids]
    references = [draw(channels, count, *grid[1:]) for count, grid in zip(counts, grids, strict=True)]
    context = [draw(3 + 5 * index, TEXT_DIM) for index in range(len(counts))]
    return latents, torch.linspace(987.654, 3.21, len(counts)), context, references


def difference(actual: Tensor, expected: Tensor) -> float:
    """Relative to the largest value, which must not be next to nothing."""
    assert actual.shape == expected.shape
    largest = expected.abs().max()
    assert largest > 1e-3, "next to nothing compares nothing"
    return ((actual - expected).abs().max() / largest).item()


def assert_same(actual: BackboneOutput, expected: BackboneOutput) -> None:
    assert len(actual.prediction) == len(expected.prediction)
    for mine, wanted in zip(actual.prediction, expected.prediction, strict=True):
        assert difference(mine, wanted) < TOLERANCE
    for mine, wanted in zip(actual.reference_tokens, expected.reference_tokens, strict=True):
        assert difference(mine, wanted) < TOLERANCE


def loss_of(output: BackboneOutput) -> Tensor:
    parts = [*output.prediction, *output.reference_tokens]
    return sum(part.square().sum() for part in parts)


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("counts", [(2, 2), (3, 0), (1, 2)], ids=str)
def test_forward_and_taps_are_equal(pair: Callable, counts: tuple[int, ...], tap: str) -> None:
    ours, theirs = pair()
    arguments = inputs(counts)
    with torch.no_grad():
        expected = ReferenceBackbone(ours)(*arguments, tap_depth=LAYERS, tap=tap)
        actual = ReferenceBackbone(theirs)(*arguments, tap_depth=LAYERS, tap=tap)
    assert len(actual.reference_tokens) == LAYERS
    assert_same(actual, expected)


def test_other_shapes_of_the_family(pair: Callable) -> None:
    """48 latent channels and other sizes of a head, as TI2V-5B has."""
    models = pair(in_dim=48, out_dim=48, dim=48)
    with torch.no_grad():
        expected, actual = (ReferenceBackbone(model)(*inputs((1, 2), channels=48)) for model in models)
    assert_same(actual, expected)


def test_samples_of_different_sizes_do_not_attend_to_padding(pair: Callable) -> None:
    ours, theirs = pair()
    arguments = inputs((1, 2), [(3, 6, 10), (2, 4, 6)])
    with torch.no_grad():
        expected = ReferenceBackbone(ours)(*arguments)
        actual = ReferenceBackbone(theirs)(*arguments)
        alone = ReferenceBackbone(theirs)(*(part[1:] for part in arguments)).prediction[0]
    assert_same(actual, expected)
    assert difference(actual.prediction[1], alone) < TOLERANCE


def test_gradients_are_equal(pair: Callable) -> None:
    """Those of the tree's model with activations recomputed, too."""

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        loss_of(ReferenceBackbone(model)(*inputs((2, 1)), tap_depth=LAYERS)).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    ours, theirs = pair()
    expected, found = gradients(ours), gradients(theirs)
    theirs.enable_gradient_checkpointing()
    recomputed = gradients(theirs)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(recomputed[name], found[name])
        if not name.endswith("attn.k.bias"):  # a shift of all keys alike changes no attention: rounding
            assert difference(found[name], wanted) < 1e-4, name


def test_attaching_and_detaching_leaves_the_model_as_it_was(pair: Callable) -> None:
    _, model = pair()
    arguments = inputs((2, 1))
    keys = list(model.state_dict())

    def plain() -> list[Tensor]:
        return model(arguments[0], t=arguments[1], context=arguments[2], seq_len=3 * 3 * 5)

    with torch.no_grad():
        before = plain()
        backbone = ReferenceBackbone(model)
        attached = backbone(*arguments).prediction
        assert all(torch.equal(mine, wanted) for mine, wanted in zip(plain(), before, strict=True))
        assert backbone.detach() is model
        assert all(torch.equal(mine, wanted) for mine, wanted in zip(plain(), before, strict=True))
    assert difference(attached[0], before[0]) > 0.01
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, *, k_lens: Tensor | None = None, **options: object
) -> Tensor:
    """Attention without padding, in place of the kernel that needs CUDA."""
    assert k_lens is None or int(k_lens.min()) == k.shape[1]
    return nn.functional.scaled_dot_product_attention(
        *(u.transpose(1, 2).float() for u in (q, k, v))
    ).transpose(1, 2)


@pytest.mark.parametrize("batch", [1, 2])
def test_patches_change_no_number(
    tree: WanTree, untouched_root: Path, released_root: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """With one kernel for both, the patched model gives the very numbers of the released one.

    For one sample that is the release untouched; where it takes no batches, the unit that mends that is on both sides.
    """
    released = WanTree(released_root if batch > 1 else untouched_root, f"released_tree_{batch}")
    ours = WanModel(**SIZES, num_layers=LAYERS)
    nn.init.xavier_uniform_(ours.head.head.weight)
    latents, timesteps, context, _ = inputs((0,) * batch)
    outputs = []
    for one in (released, tree):
        monkeypatch.setattr(one.module("modules.model"), "flash_attention", plain_attention)
        with torch.no_grad():
            outputs.append(
                one.adopt_parameters(ours)(latents, t=timesteps, context=context, seq_len=3 * 3 * 5)
            )
    for actual, expected in zip(*outputs, strict=True):
        assert expected.abs().max() > 0.01
        # Wan2.2 spreads the one timestep first, so that a matrix product of its embedding has another shape.
        assert torch.equal(actual, expected) if batch > 1 else difference(actual, expected) < 1e-6


@pytest.mark.parametrize(
    "float32_parts",
    [WanModel.float32_modules, ("time_embedding", "time_projection", "head")],
    ids=["load", "fsdp"],
)
def test_a_half_model_computes_under_autocast(pair: Callable, float32_parts: tuple[str, ...]) -> None:
    """With the parts in float32 that loading keeps so, and with fewer, as sharding does."""
    ours, theirs = pair()
    arguments = inputs((2, 1))
    with torch.no_grad():
        expected = ReferenceBackbone(ours)(*arguments).prediction[0]
        for name, parameter in theirs.named_parameters():
            if not set(float32_parts) & set(name.split(".")):
                parameter.data = parameter.data.bfloat16()
        actual = ReferenceBackbone(theirs)(*arguments).prediction[0]
    assert actual.dtype == torch.float32
    assert 0 < difference(actual, expected) < 0.05


def test_the_rotary_table_survives_meta_initialisation(tree: WanTree, pair: Callable) -> None:
    _, adopted = pair()
    built = tree.get("modules.model", "WanModel")(**SIZES, num_layers=1)
    assert adopted.freqs.dtype == built.freqs.dtype == torch.complex128
    assert (adopted.freqs - built.freqs).abs().max() < 1e-12
    assert not any(parameter.is_meta for parameter in adopted.parameters())


@pytest.mark.parametrize("task", ["t2v-1.3B", "t2v-14B"])
def test_checkpoint_keys_and_shapes_are_equal(tree: WanTree, task: str) -> None:
    arguments = dit_arguments(WAN_CONFIGS[task])
    with torch.device("meta"):
        ours, theirs = WanModel(**arguments), tree.get("modules.model", "WanModel")(**arguments)
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}


def test_a_few_guided_steps_make_the_same_video(tree: WanTree, tmp_path: Path) -> None:
    config = tiny_config()
    loaded = R2VPipeline.from_pretrained(build(tmp_path / "checkpoint", config), config=config, device="cpu")
    references = [Image.new("RGB", (48, 48), colour) for colour in ("red", "blue")]
    videos = []
    for adopted in (False, True):
        if adopted:
            loaded.backbone = ReferenceBackbone(tree.adopt_parameters(loaded.backbone.detach()))
        result = loaded.generate("a red circle", references, seed=3, sample_steps=3, progress=False)
        videos.append(result.video)
    assert difference(videos[1], videos[0]) < 1e-4


def sequence_gradients(
    rank: int, root: Path, ulysses: int, ring: int
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Prediction and gradients of one step of which this rank holds a part of the tokens."""
    torch.manual_seed(0)
    ours = WanModel(**SIZES, num_layers=LAYERS)
    nn.init.xavier_uniform_(ours.head.head.weight)
    model = WanTree(root, "tree_under_test").adopt_parameters(ours)
    backbone = ReferenceBackbone(model)
    attach_sequence_parallel(backbone, Parallel.create(ParallelSizes(1, ring, ulysses), CPU))
    output = backbone(*inputs((2, 1)))
    loss_of(output).backward()
    return [p.detach() for p in output.prediction], {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2)], ids=["ulysses", "ring"])
def test_two_ranks_share_a_sequence(patched_root: Path, ulysses: int, ring: int) -> None:
    """Predictions equal those of one device, and so do gradients averaged over the ranks."""
    ((expected, wanted),) = run_ranks(sequence_gradients, 1, patched_root, 1, 1)
    results = run_ranks(sequence_gradients, 2, patched_root, ulysses, ring)
    for predictions, _ in results:
        for actual, reference in zip(predictions, expected, strict=True):
            assert difference(actual, reference) < TOLERANCE
    for name, reference in wanted.items():
        if name.endswith("attn.k.bias"):
            continue
        averaged = torch.stack([gradients[name] for _, gradients in results]).mean(dim=0)
        assert difference(averaged, reference) < 1e-4, name


PROGRAM = """
import json, sys
from refalign_ext import backbone
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.pipeline import R2VPipeline
from tests.helpers.rebase_trees import fill
from tests.helpers.tiny_training import CPU, Source, build, change

assert backbone.TREE is not None and backbone.WanModel.__module__ == "wan_tree.modules.model"
assert {"r2v-tiny", "r2v-1.3B", "r2v-14B"} <= set(backbone.TREE.get("configs", "WAN_CONFIGS"))
assert backbone.WAN_CONFIGS is backbone.TREE.get("configs", "WAN_CONFIGS")
config = backbone.WAN_CONFIGS["r2v-tiny"]
video = R2VPipeline.from_pretrained(sys.argv[1], task="r2v-tiny", device="cpu").generate(
    "a red circle", seed=1, sample_steps=2, progress=False).video
assert video.shape[0] == 3 and video.isfinite().all()
trainer = build(change(), Source(), Parallel.single(CPU))
assert type(trainer.backbone.model) is backbone.WanModel
fill(trainer.trained)
print(json.dumps([trainer.train_step().values["loss/total"] for _ in range(2)]))
"""


def test_wan_root_selects_the_tree(patched_root: Path, tiny_checkpoint: Path) -> None:
    """Generation and training in a process of their own, as a user runs them; the losses are those of our model."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tiny_checkpoint)],
        cwd=ROOT,
        env={**os.environ, "WAN_ROOT": str(patched_root), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    trainer = make_trainer(change(), Source(), Parallel.single(CPU))
    assert type(trainer.backbone.model) is WanModel
    fill(trainer.trained)
    assert found == pytest.approx([trainer.train_step().values["loss/total"] for _ in found], rel=1e-4)
