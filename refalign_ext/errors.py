"""What a command line says about an error."""

from __future__ import annotations

import os
import traceback

from refalign_ext.backbone import is_out_of_memory


def describe_error(error: BaseException, memory_advice: str) -> str | None:
    """One line for the user, or None for a RuntimeError that no advice is known for.

    REFALIGN_TRACEBACK=1 prints the traceback first.

    Args:
        error: what ended the program.
        memory_advice: the line for a device or machine that ran out of memory.
    """
    if os.environ.get("REFALIGN_TRACEBACK") == "1":
        traceback.print_exception(error)
    if is_out_of_memory(error):
        return memory_advice
    return None if isinstance(error, RuntimeError) else " ".join(str(error).split())
