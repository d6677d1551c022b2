"""Records the snapshots that test_snapshots.py compares with: python tests/snapshots/record.py [KIND ...]

Do this only for a change that is meant to show, and read the difference before committing it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.snapshots.taking import KINDS, ROOT, Taking, write


def main(kinds: list[str]) -> int:
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        print(f"unknown: {', '.join(unknown)}; choose from {', '.join(KINDS)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        taking = Taking(Path(folder).resolve())
        try:
            for kind in kinds or KINDS:
                print(write(kind, taking.take(kind)).relative_to(ROOT), flush=True)
        finally:
            taking.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
