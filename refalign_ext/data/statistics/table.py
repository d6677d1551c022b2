"""The statistics of a data set as text for a terminal."""

from __future__ import annotations

from refalign_ext.data.statistics.stats import Stats
from refalign_ext.data.statistics.tally import Tally


def stats_table(stats: Stats) -> str:
    """The counts as text for a terminal."""
    lines = [
        f"{stats.path}: {stats.clips:,} clips, {stats.hours:,.2f} hours, {stats.pairs.total:,} references",
        f"groups {stats.groups:,} (the largest has {stats.largest_group:,} clips)",
    ]
    if stats.rows > stats.clips:
        lines.append(f"{stats.rows - stats.clips:,} rows that cannot be read were left out, such as:")
        lines += [f"  {problem}" for problem in stats.problems]
    if stats.unmeasured:
        lines.append(f"{stats.unmeasured:,} clips of unknown length or size are not in the numbers on frames")
    lines += [
        "",
        f"{'':18}"
        + "".join(f"{name:>11}" for name in ("smallest", "5%", "median", "95%", "largest", "mean")),
    ]
    named = {"seconds": stats.seconds, "frames": stats.frames, "frames per second": stats.fps}
    named |= {"words of prompt": stats.prompt_words, "prompts per clip": stats.prompts}
    for name, distribution in (named | dict(sorted(stats.scores.items()))).items():
        if distribution.count:
            values = [distribution.quantile(share) for share in (0, 0.05, 0.5, 0.95, 1)] + [distribution.mean]
            lines.append(f"{name:18}" + "".join(f"{_number(value):>11}" for value in values))
    measured = stats.frames.count
    if measured and stats.long_enough:
        lines += ["", "long enough for"]
        for name, number in stats.long_enough.items():
            lines.append(f"  {name:28}{number:>12,}  {number / measured:6.1%}")
    tallies = {"source": stats.sources, "references per clip": stats.references}
    tallies |= {"subjects per clip": stats.subjects, "pair": stats.pairs, "kind of subject": stats.kinds}
    tallies |= {"frame size": stats.sizes, "aspect ratio": stats.aspects, "class": stats.classes}
    for title, tally in tallies.items():
        lines += _tally_lines(title, tally, by_number=title.endswith("per clip"))
    return "\n".join(lines)


def _tally_lines(title: str, tally: Tally, by_number: bool, limit: int = 12) -> list[str]:
    if not tally.total:
        return []
    names = tally.to_dict(limit)
    if by_number:
        names = dict(sorted(names.items(), key=lambda item: (len(item[0]), item[0])))
    return ["", title] + [
        f"  {name[:28]:28}{number:>12,}  {number / tally.total:6.1%}" for name, number in names.items()
    ]


def _number(value: float) -> str:
    return (
        f"{value:,.0f}"
        if value == int(value) and abs(value) < 1e9
        else f"{value:,.3g}"
        if abs(value) < 100
        else f"{value:,.1f}"
    )
