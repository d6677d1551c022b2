"""What users see stays as it was recorded: flags, tensor names, videos, losses and manifests.

`python tests/snapshots/record.py` records anew what is meant to change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.snapshots.taking import KINDS, RECORDED, Taking, recorded

pytestmark = pytest.mark.timeout(600)

PIXELS = 2e-3  # of values in [-1, 1]; another CPU rounds differently
LEVELS = 2.0  # of 255, in an encoded video
LOSSES = 1e-3  # of the value itself


@pytest.fixture(scope="module")
def taking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Taking]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taking = Taking(tmp_path_factory.mktemp("snapshots").resolve())
    yield taking
    taking.close()
    torch.set_num_threads(threads)


def differences(
    before: Any, now: Any, place: str, *, relative: float = 0.0, absolute: float = 0.0, may_grow: bool = False
) -> list[str]:
    """One line for each place where `now` is not as `before`; dictionaries may have new keys if `may_grow`."""
    options = {"relative": relative, "absolute": absolute, "may_grow": may_grow}
    if isinstance(before, dict) and isinstance(now, dict):
        lines = [f"{place}: {key} is gone" for key in before if key not in now]
        lines += [f"{place}: {key} is new" for key in now if key not in before and not may_grow]
        shared = [key for key in before if key in now]
        return lines + [
            line
            for key in shared
            for line in differences(before[key], now[key], f"{place}, {key}", **options)
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [
            line for number, (a, b) in pairs for line in differences(a, b, f"{place} [{number}]", **options)
        ]
    if isinstance(before, float) and isinstance(now, float):
        is_same = now == pytest.approx(before, rel=relative, abs=absolute)
    else:
        is_same = before == now and type(before) is type(now)
    return [] if is_same else [f"{place}: {before!r} was recorded, {now!r} is found"]


def told(lines: list[str]) -> str:
    return "\n".join([*lines[:40], f"{len(lines)} differences"])


def test_every_recorded_file_is_compared() -> None:
    assert sorted(path.stem for path in RECORDED.iterdir()) == sorted(KINDS)


def test_no_flag_and_no_command_is_gone(taking: Taking) -> None:
    before, now = recorded("flags"), taking.take("flags")
    lines = [f"{name}: the command is gone" for name in before if name not in now]
    for name, flags in before.items():
        lines += [f"{name}: {flag} is gone" for flag in flags if flag not in now.get(name, flags)]
    assert not lines, told(lines)


def test_the_same_seed_gives_the_same_video(taking: Taking) -> None:
    before, now = recorded("latents"), taking.take("latents")
    hashes = [
        f"{name}: sha256 {before[name].pop('sha256')} was recorded, {now[name].pop('sha256')} is found"
        for name in before
    ]
    lines = differences(before, now, "video", absolute=PIXELS)
    assert not lines, told(lines + hashes)


def test_generate_writes_the_same(taking: Taking) -> None:
    before, now = recorded("generated"), taking.take("generated")
    gone = sorted(set(before.pop("settings")) - set(now.pop("settings")))
    lines = [f"video.json: {name} is gone" for name in gone]
    lines += differences(before, now, "generate.py", absolute=LEVELS)
    assert not lines, told(lines)


def test_data_sets_become_the_same_manifests_shards_and_caches(taking: Taking) -> None:
    lines = differences(recorded("manifests"), taking.take("manifests"), "data")
    assert not lines, told(lines)


def test_training_has_the_same_losses(taking: Taking) -> None:
    before, now = recorded("losses"), taking.take("losses")
    lines = differences(before, now, "metrics.jsonl", relative=LOSSES, absolute=1e-6, may_grow=True)
    assert not lines, told(lines)


def test_checkpoints_name_the_same_settings(taking: Taking) -> None:
    lines = differences(recorded("settings"), taking.take("settings"), "trainer.json", may_grow=True)
    assert not lines, told(lines)


def test_tensors_have_the_same_names_and_shapes(taking: Taking) -> None:
    lines = differences(recorded("keys"), taking.take("keys"), "tensors")
    assert not lines, told(lines)
