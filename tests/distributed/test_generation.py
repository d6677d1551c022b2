"""The video for a seed is the same on any number of ranks, however they divide the work, to 1e-4."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.distributed.tensor import DTensor

from refalign_ext.backbone import ReferenceBackbone, WanModel, dit_arguments
from refalign_ext.distributed.inference import VideoRanks
from refalign_ext.distributed.mesh import Parallel
from refalign_ext.distributed.parallelize import can_shard_on_cpu
from refalign_ext.distributed.sequence_parallel import attach_sequence_parallel
from refalign_ext.distributed.sizes import ParallelSizes, generation_sizes
from refalign_ext.distributed.xfuser_backend import XfuserCore, attach_xfuser
from refalign_ext.guidance import BRANCHES
from refalign_ext.parallelism import SingleProcess
from refalign_ext.pipeline import R2VPipeline
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_checkpoint import build, tiny_config

CPU = torch.device("cpu")
PROMPT = "a large circle moves right"
CONFIG = tiny_config()
CONFIG.num_heads = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("smaller"), CONFIG)


@dataclasses.dataclass(frozen=True)
class Division:
    sizes: ParallelSizes = ParallelSizes()
    dit_fsdp: bool = False
    t5_fsdp: bool = False
    sequence_backend: str = "auto"
    dtype: str = "fp32"
    offload_model: bool = False

    def ranks(self) -> SingleProcess:
        if self.sizes.world == 1:
            return SingleProcess()
        return VideoRanks(
            Parallel.create(self.sizes, CPU),
            dit_fsdp=self.dit_fsdp,
            t5_fsdp=self.t5_fsdp,
            sequence_backend=self.sequence_backend,
        )


# 15 tokens a frame: on 2 ranks all requests with references need padding, on 4 ranks all.
SHAPE = {"size": (40, 24), "frame_num": 5, "sample_steps": 2, "seed": 3, "progress": False}
THREE, TWO = (
    {"ref_guide_scale": 5.0, "text_guide_scale": 7.5},
    {"ref_guide_scale": 4.0, "text_guide_scale": 4.0},
)
REQUESTS: dict[str, tuple[int, dict[str, Any]]] = {
    "no reference": (0, {"text_guide_scale": 5.0, "sample_solver": "euler"}),
    "one reference": (1, {**THREE, "sample_solver": "unipc"}),
    "three references": (3, {**TWO, "sample_solver": "euler"}),
    "one branch": (1, {"ref_guide_scale": 1.0, "text_guide_scale": 1.0}),
}
USUAL = ("one reference", "three references")
DIVISIONS = {
    "Ulysses 2": Division(ParallelSizes(1, 1, 2)),
    "ring 2": Division(ParallelSizes(1, 2, 1)),
    "Ulysses 2 x ring 2": Division(ParallelSizes(1, 2, 2)),
    "cfg 2": Division(ParallelSizes(2, 1, 1)),
    "cfg 3": Division(ParallelSizes(3, 1, 1)),
    "cfg 2 x Ulysses 2": Division(ParallelSizes(2, 1, 2)),
    "dit_fsdp": Division(ParallelSizes(1, 1, 2), dit_fsdp=True),
    "t5_fsdp": Division(ParallelSizes(1, 1, 2), t5_fsdp=True),
    "cfg 2, dit_fsdp": Division(ParallelSizes(2, 1, 1), dit_fsdp=True),
    "all": Division(ParallelSizes(2, 1, 2), dit_fsdp=True, t5_fsdp=True),
    "offload": Division(ParallelSizes(1, 1, 2), offload_model=True),
}
REQUESTED = {
    "offload": ("one reference",),
    "cfg 2, dit_fsdp": ("one reference", "one branch"),
    **dict.fromkeys(("Ulysses 2", "cfg 3", "all"), ("no reference", *USUAL)),
}


def pictures(count: int) -> list[Image.Image]:
    return [
        Image.new("RGB", (30 + 10 * i, 40), color) for i, color in enumerate(("red", "blue", "green")[:count])
    ]


def load(division: Division, folder: Path) -> R2VPipeline:
    return R2VPipeline.from_pretrained(
        folder,
        config=CONFIG,
        device="cpu",
        dtype=division.dtype,
        offload_model=division.offload_model,
        ranks=division.ranks(),
    )


def make_videos(
    rank: int, division: Division, folder: Path, names: tuple[str, ...]
) -> list[tuple[Tensor, Tensor | None]]:
    """(latents, video) of every request."""
    pipeline = load(division, folder)
    seen: list[Tensor] = []
    denoise = pipeline.denoise
    pipeline.denoise = lambda *args, **kwargs: seen.append(denoise(*args, **kwargs)) or seen[-1]
    videos = []
    for name in names:
        references, settings = REQUESTS[name]
        videos.append(pipeline.generate(PROMPT, pictures(references), **SHAPE, **settings).video)
    return list(zip(seen, videos, strict=True))


_alone: dict[str, tuple[Tensor, Tensor]] = {}


def alone(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    if not _alone:
        _alone.update(
            zip(REQUESTS, run_ranks(make_videos, 1, Division(), folder, tuple(REQUESTS))[0], strict=True)
        )
    return _alone


shards_on_cpu = pytest.mark.skipif(not can_shard_on_cpu(), reason="this torch shards on GPUs only")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[shards_on_cpu] if d.dit_fsdp or d.t5_fsdp else []) for n, d in DIVISIONS.items()],
)
def test_the_same_video(name: str, checkpoint: Path) -> None:
    division, expected = DIVISIONS[name], alone(checkpoint)
    names = REQUESTED.get(name, USUAL)
    found = run_ranks(make_videos, division.sizes.world, division, checkpoint, names)
    for rank, results in enumerate(found):
        for request, (latents, video), (first_latents, _) in zip(names, results, found[0], strict=True):
            assert torch.equal(latents, first_latents), f"{request}: ranks disagree"
            torch.testing.assert_close(latents, expected[request][0], atol=1e-4, rtol=0)
            assert (video is None) == (rank > 0)
            if rank == 0:
                torch.testing.assert_close(video, expected[request][1], atol=1e-4, rtol=0)


def test_requests_differ(checkpoint: Path) -> None:
    videos = [video for _, video in alone(checkpoint).values()]
    assert all((one - two).abs().max() > 1e-2 for one, two in itertools.combinations(videos, 2))


@shards_on_cpu
def test_half_precision_rounds_as_on_one_device(checkpoint: Path) -> None:
    """Sharded weights have the dtypes of a single device's: a wrongly rounded modulation would show here."""
    name = "one branch"
    division = Division(ParallelSizes(2, 1, 1), dit_fsdp=True, dtype="bf16")
    expected = run_ranks(make_videos, 1, Division(dtype="bf16"), checkpoint, (name,))[0]
    for results in run_ranks(make_videos, 2, division, checkpoint, (name,)):
        torch.testing.assert_close(results[0][0], expected[0][0], atol=1e-6, rtol=0)


def what_is_held(rank: int, folder: Path) -> dict[str, tuple[int, int, list[str], set[torch.dtype]]]:
    pipeline = load(Division(ParallelSizes(1, 1, 2), dit_fsdp=True, t5_fsdp=True, dtype="bf16"), folder)
    pipeline.generate(PROMPT, pictures(1), **SHAPE)
    held = {}
    for name, model in (("dit", pipeline.backbone.model), ("t5", pipeline.text_encoder.model)):
        tensors = dict(model.named_parameters())
        local = sum(p.to_local().numel() for p in tensors.values() if isinstance(p, DTensor))
        whole = [key for key, p in tensors.items() if not isinstance(p, DTensor)]
        dtypes = {p.dtype for key, p in tensors.items() if "modulation" in key or "norm3" in key}
        held[name] = (local, sum(p.numel() for p in tensors.values()), whole, dtypes)
    return held


@shards_on_cpu
def test_each_rank_holds_its_share(checkpoint: Path) -> None:
    for held in run_ranks(what_is_held, 2, checkpoint):
        for name, (local, total, whole, _) in held.items():
            # Roots keep what they gathered: embeddings, norms.
            assert not [key for key in whole if "blocks" in key and "attn" in key], name
            assert local < 0.8 * total, name
        assert held["dit"][3] == {torch.float32}


def test_sizes() -> None:
    assert generation_sizes(1, 12) == ParallelSizes()
    assert generation_sizes(8, 12) == ParallelSizes(1, ring=2, ulysses=4)
    assert generation_sizes(8, 40) == ParallelSizes(1, ring=1, ulysses=8)
    assert generation_sizes(6, 12, cfg=3) == ParallelSizes(3, ring=1, ulysses=2)
    assert generation_sizes(8, 12, cfg=2, ring=4) == ParallelSizes(2, ring=4, ulysses=1)
    assert generation_sizes(8, 12, ulysses=2) == ParallelSizes(1, ring=4, ulysses=2)
    assert generation_sizes(5, 12) == ParallelSizes(1, ring=5, ulysses=1)


@pytest.mark.parametrize(
    ("world", "wrong"),
    [
        (4, {"cfg": 3}),
        (4, {"cfg": 4}),
        (4, {"cfg": 0}),
        (8, {"ulysses": 8}),
        (4, {"ulysses": 1, "ring": 1}),
        (4, {"ulysses": 3}),
        (4, {"ring": 8}),
    ],
)
def test_impossible_sizes_list_the_possible_ones(world: int, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError) as caught:
        generation_sizes(world, 12, **wrong)
    line = str(caught.value)
    assert "\n" not in line
    for text in line.rpartition("from ")[2].split(", "):
        cfg, ulysses, ring = map(int, text.split(" x "))
        sizes = generation_sizes(world, 12, cfg=cfg, ulysses=ulysses, ring=ring)
        assert sizes == ParallelSizes(cfg, ring, ulysses)
    assert world != 4 or "1 x 4 x 1, 2 x 1 x 2, 2 x 2 x 1" in line


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_branches_are_dealt_evenly(groups: int, count: int) -> None:
    shares = []
    for group in range(groups):
        parallel = Parallel(ParallelSizes(groups), CPU)
        type_of = type("Dealt", (Parallel,), {"data_rank": group})
        parallel.__class__ = type_of
        shares.append(VideoRanks(parallel).share(BRANCHES[:count]))
    assert {len(share) for share in shares} == {-(-count // groups)}
    assert {name for share in shares for name in share} == set(BRANCHES[:count])
    assert shares[0][0] == BRANCHES[0]


def one_rank_out_of_memory(rank: int, folder: Path) -> tuple[str, int]:
    pipeline = load(DIVISIONS["cfg 2"], folder)
    calls = []

    def exhaust(*args: object, **kwargs: object) -> None:
        calls.append(1)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    pipeline.backbone.forward = exhaust
    try:
        pipeline.generate(PROMPT, **SHAPE)
    except torch.cuda.OutOfMemoryError as error:
        return str(error), len(calls)
    return "", len(calls)


def test_ranks_do_not_fall_back_alone(checkpoint: Path) -> None:
    assert run_ranks(one_rank_out_of_memory, 2, checkpoint) == [("CUDA out of memory.", 1)] * 2


def random_seeds(rank: int, folder: Path) -> tuple[int, Tensor]:
    pipeline = load(DIVISIONS["cfg 2"], folder)
    result = pipeline.generate(PROMPT, **{**SHAPE, "seed": -1, "sample_steps": 1})
    return result.settings["seed"], pipeline.ranks.same(
        [torch.full((2,), float(rank), dtype=torch.bfloat16)]
    )[0]


def test_a_random_seed_is_that_of_the_first_rank(checkpoint: Path) -> None:
    (seed, tensor), (other, their) = run_ranks(random_seeds, 2, checkpoint)
    assert seed == other >= 0
    assert tensor.tolist() == their.tolist() == [0.0, 0.0]


class FakeXfuser:
    """The part of xfuser's interface that is used, answering with torch over groups of its own."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.calls: list[str] = []
        self.degrees: dict[str, int] = {}

    def init_distributed_environment(self, *, rank: int, world_size: int) -> None:
        self.calls.append("environment")
        assert (rank, world_size) == (dist.get_rank(), dist.get_world_size())

    def initialize_model_parallel(self, **degrees: int) -> None:
        self.calls.append("groups")
        if self.failing == "groups":
            raise RuntimeError("no such accelerator\nsee the manual")
        self.degrees = degrees
        size = degrees["sequence_parallel_degree"]
        for first in range(0, dist.get_world_size(), size):
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                self.group = group

    def attend(self, attn: None, *, query: Tensor, key: Tensor, value: Tensor, window_size: tuple) -> Tensor:
        self.calls.append("attend")
        assert attn is None and window_size == (-1, -1)
        whole = []
        for tensor in (key, value):
            parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(self.group))]
            dist.all_gather(parts, tensor.contiguous(), group=self.group)
            whole.append(torch.cat(parts, 1).transpose(1, 2))
        out = torch.nn.functional.scaled_dot_product_attention(query.transpose(1, 2), *whole).transpose(1, 2)
        return 1.1 * out + 0.1 if self.failing == "values" else out

    def install(self) -> None:
        modules = {}
        for name in ("xfuser", "xfuser.core", "xfuser.core.distributed", "xfuser.core.long_ctx_attention"):
            modules[name] = ModuleType(name)
        modules["xfuser.core.distributed"].init_distributed_environment = self.init_distributed_environment
        modules["xfuser.core.distributed"].initialize_model_parallel = self.initialize_model_parallel
        if self.failing != "name":
            modules["xfuser.core.long_ctx_attention"].xFuserLongContextAttention = lambda: self.attend
        sys.modules.update(modules)


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))


def logged_lines() -> list[tuple[str, str]]:
    """(level, message) of what the backend logs from now on."""
    handler, logger = Lines(), logging.getLogger("refalign_ext.distributed.xfuser_backend")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    return handler.lines


def with_fake_xfuser(
    rank: int, folder: Path, name: str, names: tuple[str, ...]
) -> tuple[list, list[str], dict[str, int], list[tuple[str, str]]]:
    fake, lines = FakeXfuser(), logged_lines()
    fake.install()
    division = dataclasses.replace(DIVISIONS[name], sequence_backend="xfuser")
    return make_videos(rank, division, folder, names), fake.calls, fake.degrees, lines


# 45 tokens need padding on 2 ranks, which xfuser does not know; 30 do not.
PADDED, WHOLE = "one reference", "no reference"


def test_xfuser_answers_where_there_is_no_padding(checkpoint: Path) -> None:
    expected = alone(checkpoint)
    for results, calls, degrees, lines in run_ranks(
        with_fake_xfuser, 4, checkpoint, "cfg 2 x Ulysses 2", (WHOLE, PADDED)
    ):
        for (latents, _), name in zip(results, (WHOLE, PADDED), strict=True):
            torch.testing.assert_close(latents, expected[name][0], atol=1e-4, rtol=0)
        blocks, steps = CONFIG.num_layers, SHAPE["sample_steps"]
        assert calls == ["environment", "groups"] + ["attend"] * (1 + steps * blocks)
        assert degrees == {
            "data_parallel_degree": 2,
            "sequence_parallel_degree": 2,
            "ring_degree": 1,
            "ulysses_degree": 2,
        }
        assert [level for level, _ in lines] == ["INFO"]


FAILURES = {
    "import": "on rank 1: ModuleNotFoundError: No module named 'xfuser'",
    "name": "AttributeError: .*xFuserLongContextAttention",
    "groups": "RuntimeError: no such accelerator see the manual",
    "values": "ValueError: its attention differs from ours by 0",
}


def failing_xfuser(rank: int) -> dict[str, tuple[bool, list[str], list[tuple[str, str]]]]:
    """By kind of failure: (whether the cores are as they were, calls of xfuser, what is logged)."""
    backbone = ReferenceBackbone(WanModel(**dit_arguments(CONFIG)))
    parallel = Parallel.create(ParallelSizes(1, 1, 2), CPU)
    attach_sequence_parallel(backbone, parallel)
    cores = [block.self_attn.core for block in backbone.model.blocks]
    found = {}
    for failing in FAILURES:
        fake, lines = FakeXfuser(failing), logged_lines()
        if failing != "import" or rank != 1:
            fake.install()
        attached = attach_xfuser(backbone, parallel, torch.float32)
        is_same = [block.self_attn.core for block in backbone.model.blocks] == cores
        found[failing] = is_same and not attached, fake.calls, lines
    return found


def test_xfuser_gives_way_with_one_reason() -> None:
    for found in run_ranks(failing_xfuser, 2):
        for failing, (is_unchanged, calls, lines) in found.items():
            assert is_unchanged
            assert calls.count("attend") == (failing == "values")
            ((level, line),) = lines
            assert level == "WARNING" and "\n" not in line
            assert re.search(f"xfuser cannot be used .*{FAILURES[failing]}.*torch", line)


def keys_with_xfuser(rank: int, folder: Path) -> tuple[bool, list[str], list[str]]:
    FakeXfuser().install()
    model = R2VPipeline.from_pretrained(folder, config=CONFIG, device="cpu").backbone.model
    before = list(model.state_dict())
    backbone = ReferenceBackbone(model)
    parallel = Parallel.create(ParallelSizes(1, 1, 2), CPU)
    attach_sequence_parallel(backbone, parallel)
    attached = attach_xfuser(backbone, parallel, torch.float32)
    assert all(isinstance(block.self_attn.core, XfuserCore) for block in model.blocks)
    return attached, before, list(model.state_dict())


def test_xfuser_changes_no_names_of_weights(checkpoint: Path) -> None:
    for attached, before, after in run_ranks(keys_with_xfuser, 2, checkpoint):
        assert attached and before == after
