"""Settings on a command line become values of their fields' types."""

from __future__ import annotations

from typing import Any

import click
import pytest

from refalign_ext.cli.settings import read_settings


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {}),
        ("--steps 9 --data x.jsonl", {"steps": 9, "data": "x.jsonl"}),
        ("--steps=9 --alignment.depth=3", {"steps": 9, "alignment.depth": 3}),
        ("--compile --steps 9", {"compile": True, "steps": 9}),
        ("--steps 9 --compile", {"compile": True, "steps": 9}),
        ("--compile true --t5_cpu no", {"compile": True, "t5_cpu": False}),
        ("--compile=false", {"compile": False}),
        ("--betas 0.9,0.95", {"betas": (0.9, 0.95)}),
        ("--sampling.bucket_frames 81,49", {"sampling.bucket_frames": (81, 49)}),
        ("--data_mix=", {"data_mix": ()}),
        ("--learning_rate 5e-5 --seed -1", {"learning_rate": 5e-5, "seed": -1}),
        ("--recipe tiny", {"recipe": "tiny"}),
    ],
)
def test_values(line: str, expected: dict[str, Any]) -> None:
    found = read_settings(line.split())
    assert found == expected
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in expected.items()
    }


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--stepz 3", "--stepz"),
        ("stray", "stray"),
        ("--steps", "--steps"),
        ("--steps 1.5", "1.5"),
        ("--sampling.bucket_frames 81,4.5", "81,4.5"),
        ("--compile maybe", "maybe"),
        ("--alignment 3", "--alignment"),
    ],
)
def test_mistakes_are_named(line: str, named: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        read_settings(line.split())
    assert named in caught.value.format_message()
