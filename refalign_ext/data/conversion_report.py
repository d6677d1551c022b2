"""What a conversion kept and what it dropped, by reason, with a few names for each reason."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refalign_ext.atomic_io import atomic_open

KINDS = ("clips", "references")
EXAMPLES = 5  # names kept for each reason: the counts say how many there are
LONGEST_NAME = 200


class ConversionReport:
    """Counts for clips and for references apart; memory grows with the number of reasons, not of rows.

    Attributes:
        kept: kind -> how many; dropped: kind -> reason -> how many.
        examples: kind -> reason -> the first names, at most `EXAMPLES`.
        incomplete: file -> why only a part of it was read.
        next_step: what is left to do before there is a manifest; None if it is written.
    """

    def __init__(self) -> None:
        self.kept: dict[str, int] = dict.fromkeys(KINDS, 0)
        self.dropped: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
        self.examples: dict[str, dict[str, list[str]]] = {kind: {} for kind in KINDS}
        self.incomplete: dict[str, str] = {}
        self.next_step: str | None = None

    def keep(self, kind: str, count: int = 1) -> None:
        """Counts "clips" or "references" that are in the manifest."""
        self.kept[kind] += count

    def drop(self, kind: str, reason: str, name: str, count: int = 1) -> None:
        """Counts what is not in the manifest, under a short reason such as "too_short"; `name` is what to look for."""
        if not count:
            return
        counts = self.dropped[kind]
        counts[reason] = counts.get(reason, 0) + count
        names = self.examples[kind].setdefault(reason, [])
        if len(names) < EXAMPLES:
            # Names of files need not be UTF-8, and JSON can name half of a surrogate pair: the report holds text.
            name = name.encode("utf-8", "backslashreplace").decode("utf-8")
            names.append(name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}...")

    def total(self, kind: str) -> int:
        """All that were seen: kept and dropped."""
        return self.kept[kind] + sum(self.dropped[kind].values())

    def merge(self, other: ConversionReport) -> None:
        """Adds another report; examples of this one come first."""
        for kind in KINDS:
            self.kept[kind] += other.kept[kind]
            for reason, count in other.dropped[kind].items():
                self.dropped[kind][reason] = self.dropped[kind].get(reason, 0) + count
                names = self.examples[kind].setdefault(reason, [])
                names += other.examples[kind].get(reason, [])[: EXAMPLES - len(names)]
        self.incomplete |= other.incomplete

    def to_dict(self) -> dict[str, Any]:
        """For JSON: `{"clips": {"kept", "dropped": {reason: {"count", "examples"}}}, "references": ..., "incomplete"}`."""
        entry: dict[str, Any] = {}
        for kind in KINDS:
            dropped = {
                reason: {"count": self.dropped[kind][reason], "examples": self.examples[kind].get(reason, [])}
                for reason in sorted(self.dropped[kind])
            }
            entry[kind] = {"kept": self.kept[kind], "dropped": dropped}
        return entry | {"incomplete": dict(sorted(self.incomplete.items()))}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> ConversionReport:
        """The report that `to_dict` described."""
        report = cls()
        for kind in KINDS:
            report.kept[kind] = entry[kind]["kept"]
            for reason, item in entry[kind]["dropped"].items():
                report.dropped[kind][reason] = item["count"]
                report.examples[kind][reason] = list(item["examples"])
        report.incomplete = dict(entry["incomplete"])
        return report

    def table(self) -> str:
        """The counts as text for a terminal, the most frequent reason first."""
        lines = []
        for kind in KINDS:
            share = self.kept[kind] / max(self.total(kind), 1)
            lines.append(f"{kind}: {self.kept[kind]:,} of {self.total(kind):,} kept ({share:.1%})")
            counts = sorted(self.dropped[kind].items(), key=lambda item: (-item[1], item[0]))
            width = max((len(reason) for reason, _ in counts), default=0)
            for reason, count in counts:
                name = next(iter(self.examples[kind].get(reason, [])), "")
                lines.append(f"  {reason:<{width}}  {count:>12,}  such as {name}".rstrip())
        lines += [f"incomplete: {name}: {why}" for name, why in sorted(self.incomplete.items())]
        return "\n".join(lines + ([self.next_step] if self.next_step else []))

    def write(self, path: Path) -> None:
        """Writes `to_dict` as JSON, whole or not at all."""
        with atomic_open(path) as file:
            file.write(json.dumps(self.to_dict(), indent=1, ensure_ascii=False).encode() + b"\n")


def report_path(manifest: Path) -> Path:
    """Where the report of a manifest is stored."""
    return manifest.with_name(manifest.name + ".report.json")


def no_clips_message(source: object, report: ConversionReport) -> str:
    """The error of a conversion that kept no clip: the most frequent reason with an example."""
    if not report.dropped["clips"]:
        return f"{source}: it has no rows"
    reason, count = max(report.dropped["clips"].items(), key=lambda item: item[1])
    example = report.examples["clips"][reason][0]
    return f"{source}: no clip can be used: {count} x {reason}, such as {example}"
