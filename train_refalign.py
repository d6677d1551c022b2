"""Train reference-to-video with reference alignment. Without arguments: r2v-tiny on the sprite world, on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from refalign_ext.cli.train import train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code (2 with one line on standard error for mistakes, 130 for Ctrl-C)."""
    return train.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
