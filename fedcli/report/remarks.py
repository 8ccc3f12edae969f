"""What needs no picture: sentences of bytes, time and who took part, where there is nothing else to see."""

from collections import Counter
from collections.abc import Sequence

from fedcli.quantities import describe_bytes, describe_seconds, plural
from fedcli.report.series import Report

UNEVEN = 2.0
"""A round that took so many times the median's seconds, or bytes, is worth a picture."""
LEAST_ROUNDS = 3
"""Fewer have no shape."""


def has_uneven_bytes(report: Report) -> bool:
    """Return whether rounds sent or received so unlike amounts that a picture shows it."""
    totals = [
        [merged.total_bytes_up for merged in report.merged],
        [merged.total_bytes_down for merged in report.merged],
    ]
    return any(_is_uneven(_steps([total for total in found if total is not None])) for found in totals)


def has_uneven_times(report: Report) -> bool:
    """Return whether rounds took so unlike times that a picture shows it; the first one loads the model, too."""
    return _is_uneven([merged.seconds for merged in report.merged[1:]])


def has_absences(report: Report) -> bool:
    """Return whether an update that was asked for was not counted."""
    return any(len(merged.losses) < len(merged.cohort) for merged in report.merged)


def remarks(report: Report) -> list[str]:
    """Return a sentence for each of bytes, time and participation that has no picture."""
    if not report.merged:
        return []
    found = []
    last, num_rounds = report.merged[-1], len(report.merged)
    up, down = last.total_bytes_up, last.total_bytes_down
    if up is not None and down is not None and max(up, down) and not has_uneven_bytes(report):
        sent, received = describe_bytes(round(up / num_rounds)), describe_bytes(round(down / num_rounds))
        whole = "" if num_rounds == 1 else f"; {describe_bytes(up)} and {describe_bytes(down)} in all rounds"
        found.append(f"Bytes: the clients of a round sent {sent} together and received {received}{whole}.")
    if not has_uneven_times(report):
        seconds = sorted(merged.seconds for merged in report.merged)
        shortest, longest = describe_seconds(seconds[0]), describe_seconds(seconds[-1])
        span = longest if shortest == longest else f"{shortest} to {longest}"
        found.append(f"Time: {'the round' if num_rounds == 1 else 'a round'} took {span}, by the disk's clock.")
    if not has_absences(report):
        found.append(_participation(report))
    return found


def _participation(report: Report) -> str:
    drawn = Counter(client for merged in report.merged for client in merged.cohort)
    sizes = sorted({len(merged.cohort) for merged in report.merged})
    num_rounds = plural(len(report.merged), "round")
    if sizes == [report.num_clients]:
        return f"Participation: all {plural(report.num_clients, 'client')} were counted in each of {num_rounds}."
    cohort = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    never = report.num_clients - len(drawn)
    least, most = min(drawn.values()), max(drawn.values())
    often = plural(most, "time") if least == most else f"{least} to {most} times"
    who = f"; {plural(never, 'client')} never" if never else ""
    return (
        f"Participation: each of {num_rounds} drew {cohort} of {report.num_clients} clients, and counted all of them; "
        f"a client was drawn {often}{who}."
    )


def _steps(totals: Sequence[int]) -> list[float]:
    return [float(now - before) for before, now in zip([0, *totals], totals, strict=False)]


def _is_uneven(values: Sequence[float]) -> bool:
    middle = sorted(values)[len(values) // 2] if values else 0.0
    return len(values) >= LEAST_ROUNDS and max(values) >= UNEVEN * max(middle, 1e-9)
