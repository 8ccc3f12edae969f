"""What became of rows: those that were left out, and what is not used of the others; and its lines for a reader."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


class RowCounts(Protocol):
    """Anything that has these counts: a report that is being made, or a result that keeps one."""

    @property
    def left_out(self) -> Mapping[str, int]:
        """Rows that are not used, by reason."""

    @property
    def first_cases(self) -> Mapping[str, str]:
        """The first row left out for each reason: where it is, and what was found."""

    @property
    def notes(self) -> Mapping[str, int]:
        """Rows that are used, but not all of what they say, by what is not."""

    @property
    def unused(self) -> Mapping[str, int]:
        """Rows that have a column, or a key inside one, which is not used."""


@dataclass(eq=False)
class RowReport:
    """Counts of rows that are being read, as `RowCounts` has them."""

    left_out: Counter[str] = field(default_factory=Counter, kw_only=True)
    first_cases: dict[str, str] = field(default_factory=dict, kw_only=True)
    notes: Counter[str] = field(default_factory=Counter, kw_only=True)
    unused: Counter[str] = field(default_factory=Counter, kw_only=True)

    def leave_out(self, reason: str, detail: str, place: str) -> None:
        """Count a row that is not used; `place` says where it is, "" where nobody knows."""
        self.left_out[reason] += 1
        self.first_cases.setdefault(reason, f"{place}: {detail}" if place else detail)

    def include(self, other: RowCounts) -> None:
        """Take in the counts of other rows; the first cases are those of the earlier ones."""
        self.left_out += Counter(other.left_out)
        self.first_cases = {**other.first_cases, **self.first_cases}
        self.notes += Counter(other.notes)
        self.unused += Counter(other.unused)

    def counts(self) -> dict[str, Any]:
        """Return the counts by their names, as plain dictionaries."""
        return {name: dict(getattr(self, name)) for name in ("left_out", "first_cases", "notes", "unused")}


def describe_counts(counts: Mapping[str, int]) -> str:
    """Return counts by reason as a phrase."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()) if count)


def describe_notes(notes: Mapping[str, int]) -> str:
    """Return notes with the number of rows that each holds for."""
    counted = sorted((note, count) for note, count in notes.items() if count)
    return "; ".join(f"{note}: {count} {'row' if count == 1 else 'rows'}" for note, count in counted)


def describe_rows(report: RowCounts, of: str = "") -> Iterator[str]:
    """Yield lines: what was left out by reason, with the first case of each; what was noted; what is not used."""
    if report.left_out:
        yield f"left out{of}: {describe_counts(report.left_out)}"
        for reason, count in sorted(report.left_out.items()):
            if count and reason in report.first_cases:
                yield f"  {reason}: first, {report.first_cases[reason]}"
    if report.notes:
        yield f"noted{of}: {describe_notes(report.notes)}"
    if report.unused:
        most_first = sorted(report.unused.items(), key=lambda entry: (-entry[1], entry[0]))
        yield f"not used{of}: " + ", ".join(f"{name} ({count})" for name, count in most_first)
