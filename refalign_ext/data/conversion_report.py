"""What a conversion kept and what it dropped, by reason, with a few names for each reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refalign_ext.atomic_io import atomic_open

KINDS = ("clips", "references")
EXAMPLES = 5  # names kept for each reason: the counts say how many there are
LONGEST_NAME = 200


class Unusable(ValueError):
    """Why a row or one of its references cannot be used: the reason to count under, and what is wrong."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(str(detail))
        self.reason = reason


class ConversionReport:
    """Counts for clips and for references apart; memory grows with the number of reasons, not of rows.

    Attributes:
        kept: kind -> how many; dropped: kind -> reason -> how many.
        examples: kind -> reason -> the first names, at most `EXAMPLES`.
        incomplete: file -> why only a part of it was read.
        next_step: what is left to do before there is a manifest; None if it is written.
    """

    def __init__(self) -> None:
        self.kept: Counter[str] = Counter()
        self.dropped: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
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
        # Names of files need not be UTF-8, and JSON can name half of a surrogate pair: the report holds text.
        name = name.encode("utf-8", "backslashreplace").decode("utf-8")
        self._add(
            kind, reason, count, [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."]
        )

    def _add(self, kind: str, reason: str, count: int, names: list[str]) -> None:
        self.dropped[kind][reason] += count
        known = self.examples[kind].setdefault(reason, [])
        known += names[: EXAMPLES - len(known)]

    def total(self, kind: str) -> int:
        """All that were seen: kept and dropped."""
        return self.kept[kind] + self.dropped[kind].total()

    def merge(self, other: ConversionReport) -> None:
        """Adds another report; examples of this one come first."""
        self.kept.update(other.kept)
        for kind in KINDS:
            for reason, count in other.dropped[kind].items():
                self._add(kind, reason, count, other.examples[kind][reason])
        self.incomplete |= other.incomplete

    def to_dict(self) -> dict[str, Any]:
        """For JSON: `{"clips": {"kept", "dropped": {reason: {"count", "examples"}}}, "references": ..., "incomplete"}`."""
        entry: dict[str, Any] = {}
        for kind in KINDS:
            reasons = sorted(self.dropped[kind].items())
            dropped = {
                name: {"count": count, "examples": self.examples[kind][name]} for name, count in reasons
            }
            entry[kind] = {"kept": self.kept[kind], "dropped": dropped}
        return entry | {"incomplete": dict(sorted(self.incomplete.items()))}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> ConversionReport:
        """The report that `to_dict` described."""
        report = cls()
        for kind in KINDS:
            report.keep(kind, entry[kind]["kept"])
            for reason, item in entry[kind]["dropped"].items():
                report._add(kind, reason, item["count"], item["examples"])
        report.incomplete = dict(entry["incomplete"])
        return report

    def table(self) -> str:
        """The counts as text for a terminal, the most frequent reason first."""
        lines = []
        for kind in KINDS:
            share = self.kept[kind] / max(self.total(kind), 1)
            lines.append(f"{kind}: {self.kept[kind]:,} of {self.total(kind):,} kept ({share:.1%})")
            width = max(map(len, self.dropped[kind]), default=0)
            for reason, count in sorted(self.dropped[kind].items(), key=lambda item: (-item[1], item[0])):
                name = self.examples[kind][reason][0]
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
    ((reason, count),) = report.dropped["clips"].most_common(1)
    return f"{source}: no clip can be used: {count} x {reason}, such as {report.examples['clips'][reason][0]}"
