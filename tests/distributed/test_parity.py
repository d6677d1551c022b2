"""Any division of the work among ranks gives the losses, gradients and weights of one device, to 1e-5."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from refalign_ext.distributed import collectives
from refalign_ext.distributed.mesh import DATA, Parallel
from refalign_ext.distributed.parallelize import gather_full_tensors
from refalign_ext.distributed.sizes import ParallelSizes
from refalign_ext.training.trainer import Trainer
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_training import CPU, Source, build, change

# 15 tokens a frame and 4 heads: no length here divides by 2, 4 or 8, so every division pads.
SIZE, SAMPLES = (3, 6, 10), 4
LAYOUTS = {
    "1x2 Ulysses": ParallelSizes(1, 1, 2),
    "1x2 ring": ParallelSizes(1, 2, 1),
    "2x1": ParallelSizes(2, 1, 1),
    "2x2 Ulysses": ParallelSizes(2, 1, 2),
    "2x2 ring": ParallelSizes(2, 2, 1),
    "1x4 Ulysses": ParallelSizes(1, 1, 4),
    "1x4 Ulysses 2 x ring 2": ParallelSizes(1, 2, 2),
    "1x4 ring": ParallelSizes(1, 4, 1),
    "4x1": ParallelSizes(4, 1, 1),
    "2x4 Ulysses 2 x ring 2": ParallelSizes(2, 2, 2),
    "2x4 Ulysses": ParallelSizes(2, 1, 4),
}
REFERENCES = {
    "varying": (1, 3, 0, 2),
    "first half of the batch only": (2, 1, 0, 0),
    "last sample only": (0, 0, 0, 3),
}


def make(sizes: ParallelSizes, references: tuple[int, ...], **changes: object) -> Trainer:
    settings = {
        "batch_size": SAMPLES // sizes.data,
        "clip_norm": 0.0,
        "schedule": "constant",
        "warmup_steps": 0,
    }
    settings |= {"drop_text": 0.0, "drop_references": 0.0, "drop_both": 0.0}
    config = change(**{**settings, **changes})
    parallel = Parallel.create(sizes, CPU)
    trainer = build(config, Source(references=references, size=SIZE), parallel, heads=4)
    for group in trainer.optimizers[0].param_groups:
        group["eps"] = 1e-5  # the biases of keys have gradients of rounding noise, which Adam would blow up
    return trainer


class Keeper(torch.optim.SGD):
    """Keeps the whole gradients that a step would use and changes no weight."""

    def step(self, closure=None):  # noqa: ANN001, ANN201 - torch's own signature
        self.kept = gather_full_tensors(
            {str(i): p.grad for i, p in enumerate(self.param_groups[0]["params"])}
        )


def gradients(
    rank: int, sizes: ParallelSizes, references: tuple[int, ...], changes: dict
) -> tuple[dict, dict]:
    trainer = make(sizes, references, **changes)
    named = dict(trainer.trained.named_parameters())
    keeper = Keeper(named.values(), lr=0.0)
    keeper.param_groups[0]["base_lr"] = 0.0
    trainer.optimizers = [keeper]
    values = trainer.train_step().values
    return values, dict(zip(named, keeper.kept.values(), strict=True))


def two_steps(
    rank: int, sizes: ParallelSizes, references: tuple[int, ...], changes: dict
) -> tuple[list, dict]:
    trainer = make(sizes, references, clip_norm=0.5, learning_rate=0.01, **changes)
    values = [trainer.train_step().values for _ in range(2)]
    values.append(trainer.validate())
    return values, gather_full_tensors(
        {**trainer.trained.state_dict(), **{f"average.{k}": v for k, v in trainer.ema.average.items()}}
    )


_alone: dict[tuple, tuple] = {}


def alone(function, references: tuple[int, ...], **changes: object) -> tuple:  # noqa: ANN001
    key = (function.__name__, references, tuple(sorted(changes.items())))
    if key not in _alone:
        _alone[key] = function(0, ParallelSizes(), references, changes)
    return _alone[key]


def assert_equal(found: tuple[object, dict], expected: tuple[object, dict], tolerance: float = 1e-5) -> None:
    values, tensors = found
    rows = [values] if isinstance(values, dict) else values
    expected_rows = [expected[0]] if isinstance(expected[0], dict) else expected[0]
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row.keys() == expected_row.keys()
        for name, value in expected_row.items():
            assert row[name] == pytest.approx(value, rel=tolerance, abs=1e-6), name
    assert tensors.keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        difference = (tensors[name] - tensor).abs().max().item()
        assert difference <= tolerance * max(1.0, tensor.abs().max().item()), f"{name}: {difference}"


@dataclass(frozen=True)
class Case:
    """What ranks do in one start after the other, each of which would cost seconds.

    Attributes:
        what: `gradients` or `two_steps`.
        references: of the samples in turn.
        changes: settings that one device has too; divided: those of the ranks alone.
    """

    what: Callable[..., tuple]
    references: tuple[int, ...] = REFERENCES["varying"]
    changes: dict[str, object] = field(default_factory=dict)
    divided: dict[str, object] = field(default_factory=dict)
    tolerance: float = 1e-5


def gradients_of(*names: str) -> list[Case]:
    return [Case(gradients, REFERENCES[name]) for name in names]


# Where references are matters to ranks with samples of their own.
CASES = {
    "1x2 Ulysses": [
        *gradients_of("varying"),
        Case(
            two_steps,
            changes={"cpu_offload": True, "activation_checkpointing": "full", "drop_references": 0.5},
        ),
        Case(two_steps, changes={"tap": "self_attn", "activation_checkpointing": "selective"}),
        Case(two_steps, changes={"weight": 0.0}),
    ],
    "1x2 ring": gradients_of("varying"),
    "2x1": [
        *gradients_of(*REFERENCES),
        # Muon orthogonalises in bf16, where rounding noise in a gradient may tip the last bit.
        Case(two_steps, changes={"optimizer": "muon"}, tolerance=1e-3),
        Case(two_steps, divided={"global_batch_size": SAMPLES, "batch_size": 1}),  # accumulation equals ranks
    ],
    "2x2 Ulysses": gradients_of(*REFERENCES),
    "2x2 ring": [*gradients_of(*REFERENCES), Case(two_steps)],
    "1x4 Ulysses": gradients_of("varying"),
    "1x4 Ulysses 2 x ring 2": gradients_of("varying"),
    "2x4 Ulysses 2 x ring 2": gradients_of("varying"),
    # near relatives of others
    "4x1": gradients_of(*REFERENCES),
    "1x4 ring": [*gradients_of("varying"), Case(two_steps)],
    "2x4 Ulysses": gradients_of(*REFERENCES),
}
SLOW = ("4x1", "1x4 ring", "2x4 Ulysses")


def run_cases(rank: int, layout: str) -> list[tuple]:
    return [
        case.what(rank, LAYOUTS[layout], case.references, {**case.changes, **case.divided})
        for case in CASES[layout]
    ]


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES]
)
def test_losses_gradients_and_weights_are_those_of_one_device(layout: str) -> None:
    for results in run_ranks(run_cases, LAYOUTS[layout].world, layout):
        for case, found in zip(CASES[layout], results, strict=True):
            expected = alone(case.what, case.references, **case.changes)
            if case.what is gradients:
                assert all(gradient.abs().max() > 0 for gradient in expected[1].values())
            try:
                assert_equal(found, expected, case.tolerance)
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from None


def wrong_shards(rank: int, sizes: ParallelSizes, references: tuple[int, ...]) -> tuple[dict, dict]:
    """FSDP over the data ranks alone."""
    Parallel.shards = property(lambda self: self._meshes[DATA])
    return gradients(rank, sizes, references, {})


def wrong_gather(rank: int, sizes: ParallelSizes, references: tuple[int, ...]) -> tuple[dict, dict]:
    """A gather whose backward takes its own piece of the gradient and forgets the other ranks'."""

    def backward(ctx, gradient):  # noqa: ANN001, ANN202
        return gradient[torch.distributed.get_rank(ctx.group)].contiguous(), None

    collectives._AllGather.backward = staticmethod(backward)
    return gradients(rank, sizes, references, {})


@pytest.mark.parametrize("wrong", [wrong_shards, wrong_gather])
def test_the_known_wrong_ways_are_noticed(wrong) -> None:  # noqa: ANN001
    counts = REFERENCES["varying"]
    found = run_ranks(wrong, 2, LAYOUTS["1x2 Ulysses"], counts)
    expected = alone(gradients, counts)
    for result in found:
        with pytest.raises(AssertionError):
            assert_equal(result, expected)
