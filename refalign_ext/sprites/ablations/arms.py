"""The paper's tables as data: what every arm changes in the recipe, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from refalign_ext.config import recipe

RECIPE = "tiny"
BLOCKS = 6  # of r2v-tiny


@dataclass(frozen=True)
class MadeTeacher:
    """A teacher that a study trains for itself with `sprites train-teacher`; `steps`: None for the usual number."""

    kind: str
    size: str
    steps: int | None = None


@dataclass(frozen=True)
class Arm:
    """One column of a comparison; `changes` are settings under their names on the command line."""

    letter: str
    title: str
    changes: dict[str, Any] = field(default_factory=dict)
    teacher: MadeTeacher | None = None


@dataclass(frozen=True)
class Table:
    """Arms in the order in which they are shown, compared with the one called A; `base` holds for all of them."""

    title: str
    arms: tuple[Arm, ...]
    base: dict[str, Any] = field(default_factory=dict)

    @property
    def reference(self) -> Arm:
        """A, which the others are compared with."""
        return next(arm for arm in self.arms if arm.letter == "A")

    def quick(self) -> list[Arm]:
        """A and one other: enough to see that everything works."""
        return [self.reference, next(arm for arm in self.arms if arm.letter != "A")]

    def chosen(self, letters: tuple[str, ...]) -> list[Arm]:
        """The arms of these letters in the table's order; all of them for none.

        Raises:
            ValueError: for a letter that the table lacks.
        """
        known = [arm.letter for arm in self.arms]
        for letter in letters:
            if letter not in known:
                raise ValueError(f"--arm {letter}: this table has {', '.join(known)}")
        return [arm for arm in self.arms if arm.letter in letters or not letters]


_TEACHER_INPUT = {"alignment.weight": 0.0, "teacher_input": True}
_UNTRAINED = MadeTeacher("dinov3", "tiny", steps=0)
_PARTS = (
    Arm("A", "reference alignment"),
    Arm("B", "without the negative term", {"alignment.negative_weight": 0.0}),
    Arm("C", "without alignment", {"alignment.weight": 0.0}),
    Arm("D", "teacher features as input, without alignment", _TEACHER_INPUT),
)
_UNTRAINED_INPUT = Arm("E", "as D with an untrained teacher", _TEACHER_INPUT, _UNTRAINED)
_TEACHERS = (
    Arm("A", "tiny DINOv3"),
    Arm("B", "smaller DINOv3", teacher=MadeTeacher("dinov3", "small")),
    Arm("C", "larger DINOv3", teacher=MadeTeacher("dinov3", "large")),
    Arm("D", "untrained DINOv3", teacher=_UNTRAINED),
    Arm("E", "tiny SigLIP2", teacher=MadeTeacher("siglip2", "tiny")),
)
_RECIPES = (
    Arm("A", "paper, block output", {"timesteps": "paper"}),
    Arm("B", "paper, self-attention", {"timesteps": "paper", "alignment.tap": "self_attn"}),
    Arm("C", "release, block output", {"timesteps": "release"}),
    Arm("D", "release, self-attention", {"timesteps": "release", "alignment.tap": "self_attn"}),
    Arm("E", "release without the gate, block output", {"timesteps": "release_ungated"}),
)


def _depths() -> tuple[Arm, ...]:
    usual = recipe(RECIPE).alignment.depth
    arms = [Arm("K0", "none", {"alignment.weight": 0.0})]
    for depth in range(1, BLOCKS + 1):
        letter = "A" if depth == usual else f"K{depth}"
        arms.append(Arm(letter, f"{depth} block{'s' * (depth > 1)}", {"alignment.depth": depth}))
    return tuple(arms)


TABLES = {
    "2": Table("Table 2: parts of the method", (*_PARTS, _UNTRAINED_INPUT)),
    "3": Table("Table 3: teachers", _TEACHERS),
    "4": Table("Table 4: depth of the alignment", _depths()),
    "recipes": Table("Recipes and taps", _RECIPES),
    "copying": Table("Table 2 after training on regular pairs alone", _PARTS, {"regular_pairs": 1.0}),
}
