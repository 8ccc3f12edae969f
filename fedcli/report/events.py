"""A report's series as TensorBoard's event files: the federation's own, and one for each client."""

from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from fedcli.errors import RequirementError
from fedcli.report.series import Report

Value: TypeAlias = "tuple[str, int, float, float | None]"
"""Tag, round, value and when: Unix seconds, None for now."""


def require_writer() -> None:
    """Raise RequirementError where the package that writes event files is missing."""
    try:
        import tensorboardX  # noqa: F401  # whether it is there
    except ImportError as error:
        raise RequirementError(
            "--tensorboard needs the package tensorboardX, which is not installed",
            hint="pip install 'fedcli[tensorboard]'; to look at the files: pip install tensorboard.",
        ) from error


def write_events(report: Report, folder: Path) -> int:
    """Write one run for the federation and one for each client and baseline, in place of earlier ones of these names.

    Returns the number of values.
    """
    from tensorboardX import SummaryWriter

    runs = _runs(report)
    for run, values in runs.items():
        for earlier in (folder / run).glob("events.out.tfevents.*"):
            earlier.unlink()
        with SummaryWriter(str(folder / run)) as writer:
            for tag, step, value, seconds in values:
                writer.add_scalar(tag, value, step, walltime=seconds)
    return sum(map(len, runs.values()))


def _runs(report: Report) -> dict[str, list[Value]]:
    """Return the values of each run, by its name."""
    runs: dict[str, list[Value]] = {"federation": list(_of_federation(report))}
    for merged in report.merged:
        for client, loss in merged.losses.items():
            values = runs.setdefault(f"client-{client}", [])
            if (norm := merged.norms.get(client)) is not None:
                values.append(("update_norm", merged.number, norm, merged.closed))
            if loss is not None:
                values.append(("loss", merged.number, loss, merged.closed))
    rounds = [merged.number for merged in report.merged]
    for metric in report.scores:  # a level line: the same score at the first round and at the last
        for label, point in metric.lines().items():
            if rounds:
                name = label.partition(" (")[0].replace(" ", "-")  # no client's number
                levels = [(_tag(metric.title), step, point.value, None) for step in (0, rounds[-1] + 1)]
                runs.setdefault(name, []).extend(levels)
    return runs


def _of_federation(report: Report) -> Iterator[Value]:
    for merged in report.merged:
        named = {
            "loss": merged.mean_loss,
            "learning_rate": merged.learning_rate,
            "seconds": merged.seconds,
            "updates/counted": len(merged.losses),
            "updates/refused": len(merged.refused),
            "updates/missing": len(merged.missing),
            "bytes/up_total": merged.total_bytes_up,
            "bytes/down_total": merged.total_bytes_down,
        }
        yield from (
            (tag, merged.number, float(value), merged.closed) for tag, value in named.items() if value is not None
        )
    for similarity in report.similarities:
        if len(similarity.clients) > 1:
            yield "cosine/mean", similarity.round, float(similarity.pairs().mean()), None
    for metric in report.scores:
        yield from ((_tag(metric.title), number, point.value, None) for number, point in sorted(metric.rounds.items()))


def _tag(title: str) -> str:
    return f"scores/{title.replace(' ', '/')}"
