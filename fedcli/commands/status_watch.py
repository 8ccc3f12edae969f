"""fedcli status --watch: a display that stays on a terminal; elsewhere a line for each change."""

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedcli.commands.output import tell, terminal
from fedcli.federation import Federation
from fedcli.operations.watch import PastRound, View, Watcher
from fedcli.quantities import describe_bytes, describe_enough, describe_seconds
from fedcli.secure_aggregation.terms import fewest_of

MOST_ROUNDS = 6
"""Past rounds that have a line of their own."""
MOST_CLIENTS = 60
"""Clients of a cohort that are shown one by one."""
_BLOCKS = "▁▂▃▄▅▆▇█"


def watch(federation: Federation) -> None:
    """Show how a federation goes on until it has finished, or until Ctrl-C."""
    watcher = Watcher(federation.state)
    console = terminal(highlight=False)
    if not console.is_terminal:
        said = ""
        for view in watcher.views():
            if (line := describe(view)) != said:
                tell(line)
                sys.stdout.flush()
                said = line
        return
    with Live(console=console, auto_refresh=False) as live:
        for view in watcher.views():
            live.update(render(view), refresh=True)


def describe(view: View) -> str:
    """Return a view in one line."""
    head = view.head
    line = f"round {head.round} of {head.rounds}, {head.state}"
    if head.cohort:
        line += f": {len(view.answered)} of {len(head.cohort)} answered, {view.needed} must"
        line += f", missing {_names(view.missing)}" if view.missing else ""
    if view.past and view.past[-1].mean_loss is not None:
        line += f"; mean loss {view.past[-1].mean_loss:.4f} in round {view.past[-1].number}"
    return line


def render(view: View) -> RenderableType:
    """Return what the terminal shows of a view."""
    head, past = view.head, view.past
    facts = Table.grid(padding=(0, 2), expand=True)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(ratio=1)
    line = f"{head.round} of {head.rounds}, {head.state}"
    if view.eta_seconds is not None:
        line += f"; about {describe_seconds(view.eta_seconds)} left"
    facts.add_row("round", line)
    facts.add_row("", ProgressBar(total=head.rounds, completed=head.round))
    facts.add_row(
        "algorithm", Text(f"{head.algorithm['name']}, task {head.task}, learning rate {head.train.learning_rate:.3g}")
    )
    if head.cohort:
        facts.add_row("cohort", f"{len(view.answered)} of {len(head.cohort)} have answered; {view.needed} must")
        facts.add_row("", _cohort(view))
    if view.deadline_seconds is not None:
        left = describe_seconds(abs(view.deadline_seconds))
        when = f"in {left}" if view.deadline_seconds > 0 else f"{left} ago"
        mode = head.secure_aggregation
        enough = describe_enough(None if mode is None else fewest_of(mode, len(head.cohort)))
        facts.add_row("deadline", f"{when}; from then on {enough}")
    losses = [each.mean_loss for each in past if each.mean_loss is not None]
    if losses:
        facts.add_row("mean loss", Text(f"{_sparkline(losses)} {losses[0]:.3f} to {losses[-1]:.3f}"))
    if head.cost is not None:
        up, down = describe_bytes(head.cost.total_bytes_up), describe_bytes(head.cost.total_bytes_down)
        facts.add_row("transfer", f"{up} sent and {down} received by clients so far")
    parts = [facts, Text(), _past_table(past)] if past else [facts]
    return Panel(
        Group(*parts), title=Text(f" {view.workspace} "), subtitle="Ctrl-C leaves; nothing stops", padding=(0, 2)
    )


def _cohort(view: View) -> Text:
    if len(view.head.cohort) > MOST_CLIENTS:
        return Text(f"missing {_names(view.missing)}" if view.missing else "all are there", style="dim")
    answered = set(view.answered)
    told = ((f"{client}✓ ", "green") if client in answered else (f"{client}… ", "dim") for client in view.head.cohort)
    return Text.assemble(*told)


def _past_table(past: Sequence[PastRound]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("round", "mean loss", "counted", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("refused, missing")
    for each in past[-MOST_ROUNDS:]:
        lost = [f"refused {_names(each.refused)}"] if each.refused else []
        lost += [f"missing {_names(each.missing)}"] if each.missing else []
        table.add_row(
            str(each.number),
            "-" if each.mean_loss is None else f"{each.mean_loss:.4f}",
            str(each.num_counted),
            describe_seconds(each.seconds),
            "; ".join(lost),
        )
    return table


def _sparkline(values: Sequence[float]) -> str:
    """Return the values as blocks, the smallest the lowest."""
    low, high = min(values), max(values)
    steps = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((value - low) / (high - low) * steps) if high > low else 0] for value in values)


def _names(clients: Sequence[int], most: int = 12) -> str:
    more = f" and {len(clients) - most} more" if len(clients) > most else ""
    return ", ".join(map(str, clients[:most])) + more
