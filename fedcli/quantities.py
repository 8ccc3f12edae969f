"""Bytes, lengths of time and counts, as people read them."""

from collections.abc import Sequence

_MOST = 50
"""How many clients a line names."""


def byte_unit(num_bytes: float) -> tuple[str, float]:
    """Return the decimal unit that suits so many bytes, and its size in bytes."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return unit, size
    return "bytes", 1.0


def describe_bytes(num_bytes: float) -> str:
    """Return a number of bytes in the unit that suits it: 1.2 GB."""
    if num_bytes == 1:
        return "1 byte"
    unit, size = byte_unit(num_bytes)
    return f"{num_bytes / size:,.{int(size > 1)}f} {unit}"


def describe_enough(fewest_masked: int | None) -> str:
    """Return how many answers close a round past its deadline; of masked ones so many, else one."""
    return "one answer is enough" if fewest_masked is None else f"{fewest_masked} masked updates are enough"


def describe_seconds(seconds: float) -> str:
    """Return a length of time in its two largest units: 1 h 20 min; below ten seconds in tenths of one."""
    if seconds < 9.95:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    rest = round(seconds)
    parts: list[tuple[int, str]] = []
    for name, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        if count or parts:
            parts.append((count, name))
    return " ".join(f"{count} {name}" for count, name in parts[:2] if count)


def plural(count: int, noun: str) -> str:
    """Return a count and what is counted: 1 update, 2 updates."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def name_clients(clients: Sequence[int]) -> str:
    """Return clients by their ids, the first fifty of them: client 3, clients 3 and 7, or no client."""
    if not clients:
        return "no client"
    if len(clients) > _MOST:
        return f"clients {', '.join(map(str, clients[:_MOST]))} and {len(clients) - _MOST:,} more"
    *most, last = map(str, clients)
    return f"clients {', '.join(most)} and {last}" if most else f"client {last}"
