"""The statistics of a data set as text for a terminal."""

from __future__ import annotations

from refalign_ext.data.statistics.stats import NAMES, NUMBERS, Stats, most_frequent, summary

_SHOWN_NAMES = 12


def stats_table(stats: Stats) -> str:
    lines = [
        f"{stats.path}: {stats.clips:,} clips, {stats.hours:,.2f} hours, "
        f"{stats.names['pairs'].total():,} references",
        f"groups {stats.groups:,} (the largest has {stats.largest_group:,} clips)",
    ]
    if stats.rows > stats.clips:
        lines.append(f"{stats.rows - stats.clips:,} rows that cannot be read were left out, such as:")
        lines += [f"  {problem}" for problem in stats.problems]
    if stats.unmeasured:
        lines.append(f"{stats.unmeasured:,} clips of unknown length or size are not in the numbers on frames")
    titles = ("smallest", "5%", "median", "95%", "largest", "mean")
    lines += ["", f"{'':22}" + "".join(f"{title:>12}" for title in titles)]
    for name in (*NUMBERS, *sorted(stats.numbers.keys() - set(NUMBERS))):
        entry = summary(stats.numbers[name])
        if entry["count"]:
            values = [entry["quantiles"][share] for share in ("0", "0.05", "0.5", "0.95", "1")]
            row = "".join(f"{value:>12,.6g}" for value in (*values, entry["mean"]))
            lines.append(f"{name:22}{row}")
    measured = len(stats.numbers["frames"])
    counted = {"long enough for": (stats.long_enough, measured)}
    for name in NAMES:
        counted[name] = (most_frequent(stats.names[name], _SHOWN_NAMES), stats.names[name].total())
    for title, (counts, total) in counted.items():
        if total:
            lines += ["", title]
            lines += [f"  {name[:28]:28}{count:>12,}  {count / total:6.1%}" for name, count in counts.items()]
    return "\n".join(lines)
