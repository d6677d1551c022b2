"""The table of a plan in plain text: who holds what, memory by item, bytes received, what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from refalign_ext.planning.plan import USABLE, Plan

_GIB = 2**30


def describe(plan: Plan) -> str:
    """The plan as a table of plain text."""
    rows = [*plan.facts, *_rank_rows(plan)]
    width = max(len(label) for label, _ in rows)
    lines = [plan.title, *(f"  {label:<{width}}  {text}".rstrip() for label, text in rows)]
    lines += ["", "  memory of each rank (estimate)"]
    lines += _amounts(plan.device)
    usable = ""
    if plan.device_memory is not None:
        limit = USABLE * plan.device_memory
        verdict = "fits" if plan.fits else "DOES NOT FIT"
        usable = f"  {verdict}: {limit / _GIB:.1f} GiB usable of {plan.device_memory / _GIB:.1f}"
    lines.append(f"    {_size(plan.device_total)}  in all{usable}")
    if plan.host:
        lines += ["  in host memory, for each rank"]
        lines += _amounts(plan.host)
    if plan.traffic:
        step = "optimizer step" if plan.trained_parameters else "denoising step"
        lines += [f"  received by each rank in one {step}"]
        lines += [*_amounts(plan.traffic), f"    {_size(sum(plan.traffic.values()))}  in all"]
    lines += [f"  note: {note}" for note in plan.notes]
    lines += [f"  would fit: {suggestion}" for suggestion in plan.suggestions]
    return "\n".join(lines)


def _rank_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """Who holds what; of many groups the first two and the last."""
    sizes = plan.sizes
    if sizes.world == 1:
        return
    name = "data group" if plan.trained_parameters else "branch group"
    shown = range(sizes.data) if sizes.data <= 4 else [0, 1, sizes.data - 1]
    previous = -1
    for group in shown:
        if group != previous + 1:
            yield "...", ""
        previous = group
        first = group * sizes.sequence
        text = _ranks(first, sizes.sequence)
        if sizes.ulysses > 1 and sizes.ring > 1:
            members = [
                _ranks(first + part * sizes.ulysses, sizes.ulysses).removeprefix("ranks ")
                for part in range(sizes.ring)
            ]
            listed = members if len(members) <= 4 else [*members[:2], "...", members[-1]]
            text += f"; heads divided within {' | '.join(listed)}, keys and values gathered across"
        elif sizes.ulysses > 1:
            text += "; heads divided among them"
        elif sizes.ring > 1:
            text += "; keys and values gathered among them"
        yield f"{name} {group}", text
    if sizes.sequence > 1:
        held = plan.tokens_per_rank
        first = min(plan.video_tokens // held, sizes.sequence - 1)
        tokens = f"{held:,} of a sample's tokens per rank, in order"
        if plan.reference_tokens:
            tokens += f"; references on {_ranks(first, sizes.sequence - first)} of each group"
        yield "tokens", tokens
    if plan.trained_parameters:
        yield "weights", f"each rank keeps 1/{sizes.world} of weights, gradients and optimizer state"


def _ranks(first: int, count: int) -> str:
    return f"rank {first}" if count == 1 else f"ranks {first}-{first + count - 1}"


def _amounts(items: Mapping[str, int]) -> list[str]:
    return [f"    {_size(count)}  {name}" for name, count in items.items()]


def _size(count: int) -> str:
    return f"{count / _GIB:9.2f} GiB" if count >= _GIB / 10 else f"{count / 2**20:9.2f} MiB"
