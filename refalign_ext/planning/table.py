"""The table of a plan in plain text: memory by item, bytes received, what would make it fit."""

from __future__ import annotations

from collections.abc import Mapping

from refalign_ext.planning.plan import USABLE, Plan

_GIB = 2**30


def plan_table(plan: Plan) -> str:
    """The plan as a table of plain text."""
    lines = [plan.title, *(f"  {label:<8}  {text}" for label, text in plan.facts)]
    verdict = ""
    if plan.device_memory is not None:
        usable = f"{USABLE * plan.device_memory / _GIB:.1f} GiB usable of {plan.device_memory / _GIB:.1f}"
        verdict = f"  {'fits' if plan.fits else 'DOES NOT FIT'}: {usable}"
    lines += ["", *_amounts("memory of each rank (estimate)", plan.device)]
    lines[-1] += verdict
    lines += _amounts("in host memory, for each rank", plan.host)
    step = "optimizer step" if plan.trained_parameters else "denoising step"
    lines += _amounts(f"received by each rank in one {step}", plan.traffic)
    lines += [f"  note: {note}" for note in plan.notes]
    lines += [f"  would fit: {suggestion}" for suggestion in plan.suggestions]
    return "\n".join(lines)


def _amounts(title: str, items: Mapping[str, int]) -> list[str]:
    if not items:
        return []
    amounts = {**items, "in all": sum(items.values())}
    return [f"  {title}", *(f"    {_size(count)}  {name}" for name, count in amounts.items())]


def _size(count: int) -> str:
    return f"{count / _GIB:9.2f} GiB" if count >= _GIB / 10 else f"{count / 2**20:9.2f} MiB"
