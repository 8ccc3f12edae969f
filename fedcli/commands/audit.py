"""fedcli audit: what models know of a party's rows, measured at the party."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from fedcli.commands.options import (
    ClientOption,
    HomeOption,
    JsonOption,
    ThreadsOption,
    WorkspaceOption,
    found_federation,
)
from fedcli.commands.output import Display, at, print_hint, print_json, print_result, relative, terminal
from fedcli.errors import UsageError

if TYPE_CHECKING:
    from fedcli.operations.audit import Measurement
    from fedcli.operations.audit_figures import CanaryFigures
    from fedcli.privacy.audit_statistics import Estimate, Separation


def audit_plant(
    client: ClientOption,
    canaries: Annotated[int, Option(metavar="N", help="How many are drawn; a coin says which are planted.")] = 64,
    repeat: Annotated[
        str, Option(metavar="N,N...", help="How often one is among the rows; as many of each.")
    ] = "1,4,16",
    remove: Annotated[bool, Option("--remove", help="Take them out again.")] = False,
    home: HomeOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Plant canaries, made-up rows with secrets, among a client's rows; nothing in the workspace tells of them.

    What is trained from now on learns them: use a federation that is there for the audit.
    """
    from fedcli.operations.audit_plant import plant_canaries, take_out_canaries

    federation = found_federation(workspace)
    if remove:
        done = take_out_canaries(federation.state, client, home=home)
        text = f"client {client}: canaries taken out; what was trained with them knows them still"
        print_result(json_output, done, text if done.status == "removed" else f"client {client}: nothing to take out")
        return
    planting = plant_canaries(federation.state, client, home=home, num_canaries=canaries, repeats=_counts(repeat))
    lines = [
        f"client {client}: {planting.num_included} of {planting.num_canaries} canaries planted, as "
        f"{planting.num_copies} rows, from round {planting.first_round} on"
    ]
    if planting.trained_before:
        lines.append("rounds that the client answered before know nothing of them")
    warning = (
        "WARNING: canaries train. Every adapter of this federation learns them from now on, the client's own, the "
        "aggregate and its baselines: do not use these for anything else. "
        f"`fedcli audit plant --id {client} --remove{at(workspace)}` takes them out; adapters keep what they learnt.\n"
        f"next: fedcli run --rounds 1{at(workspace)}, or fedcli client train --id {client}{at(workspace)}; then "
        f"fedcli audit measure --id {client}{at(workspace)}"
    )
    print_result(json_output, planting, lines, hint=warning)


def _counts(repeat: str) -> list[int]:
    try:
        return [int(count) for count in repeat.split(",")]
    except ValueError as error:
        raise UsageError(f"--repeat is {repeat[:80]!r}", hint="Give counts with commas between, as 1,4,16.") from error


def audit_measure(
    client: ClientOption,
    number: Annotated[
        int | None, Option("--round", min=0, metavar="N", help="The aggregate of this round. Default: the latest.")
    ] = None,
    held_out: Annotated[
        Path | None,
        Option(metavar="FILE", help="Rows like the client's that were never trained on: its rows are told from them."),
    ] = None,
    fillings: Annotated[
        int, Option(min=2, metavar="N", help="Secrets that a canary's is ranked among, itself with them.")
    ] = 256,
    rows: Annotated[
        int, Option(min=1, metavar="N", help="Of the client's rows, and held-out ones, at most so many.")
    ] = 256,
    no_plot: Annotated[bool, Option("--no-plot", help="Draw no picture: it needs matplotlib.")] = False,
    home: HomeOption = None,
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Measure what the base, the client's update, the aggregate and its baseline know of its canaries and rows.

    Run it at the client. Figures and a picture are kept in its home, and nothing is written to the workspace.
    """
    from fedcli.operations.audit import measure

    federation = found_federation(workspace, threads)
    with _Display(json_output, "loading") as observer:
        measured = measure(
            federation.state,
            client,
            home=home,
            number=number,
            held_out=held_out,
            num_fillings=fillings,
            num_rows=rows,
            has_picture=not no_plot,
            runtimes=federation.runtimes,
            observer=observer,
        )
    if json_output:
        print_json(measured)
        return
    _print(measured)
    print_hint("\n".join([*_remarks(measured), *(f"written: {path}" for path in relative(measured.files))]))


class _Display(Display):
    """Shows what a model is asked."""

    def rows_read(self, what: str, count: int) -> None:
        self.show(description=f"{what}: {count:,}")

    def target_started(self, target: str, benchmark: str) -> None:
        self.title = f"{target}: {benchmark}"
        self.show(description=self.title, completed=0, total=None)

    def answered(self, num_done: int, num_asked: int) -> None:
        self.show(completed=num_done, total=num_asked)
        self.say_now_and_then(f"{self.title}: {num_done:,} of {num_asked:,} answered")


COLUMNS = (
    "model",
    "copies",
    "in/drawn",
    "exposure",
    "full",
    "extracted",
    "AUC",
    "TPR@1%",
    "epsilon >=",
    "guesses",
    "promised",
)


def _print(measured: "Measurement") -> None:
    from rich import box
    from rich.table import Table

    console = terminal()
    if not console.is_terminal:
        console = terminal(width=200)
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in COLUMNS:
        grid.add_column(column, justify="left" if column == "model" else "right")
    for model in measured.models:
        for figures in model.canaries:
            grid.add_row(model.what, *_cells(figures))
        rows = model.rows
        if rows.separation or rows.extracted:
            told = (_estimate(rows.extracted), *_apart(rows.separation or {}))
            grid.add_row(model.what, "rows", str(rows.num_rows), "", "", *told)
    console.print(grid, markup=False, highlight=False)


def _cells(figures: "CanaryFigures") -> Iterator[str]:
    yield "all" if figures.repeat is None else str(figures.repeat)
    yield f"{figures.num_included}/{figures.num_canaries}"
    if figures.median_exposure is None or figures.highest_exposure is None:
        yield "-"
    else:
        yield f"{figures.median_exposure:.1f} (most {figures.highest_exposure:.1f})"
    yield str(figures.num_full_exposure)
    yield _estimate(figures.extracted)
    yield from _apart(figures.separation)
    bound = figures.bound
    yield "-" if bound is None else f"{bound.epsilon:.2f}"
    yield "-" if bound is None else f"{bound.num_right}/{bound.num_guesses}"
    yield "-" if figures.promised is None else f"{figures.promised[0]:.2f} ({figures.promised[1]:.0e})"


def _apart(separation: "Mapping[str, Separation]") -> list[str]:
    found = separation.get("min_k")
    return ["-", "-"] if found is None else [_estimate(found.auc), _estimate(found.true_positives)]


def _estimate(found: "Estimate | None") -> str:
    return "-" if found is None else f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _remarks(measured: "Measurement") -> Iterator[str]:
    yield (
        f"exposure: bits, at most log2 {measured.num_fillings}; a median of 1.0 where nothing was learnt. AUC and TPR: "
        "Min-K%, less the base's. epsilon: for so many rows that are there or not, each bound at 95 % confidence; "
        "promised: the ledger's (delta)"
    )
    for name, why in measured.not_measured.items():
        yield f"not measured: {name}: {why}"
    for model in measured.models:
        if model.promise is None and model.name != "base":
            yield f"{model.what}: nothing is promised to whoever sees it: {model.seen_by}"
        for figures in model.canaries:
            if figures.is_contradicted:
                copies = "all canaries" if figures.repeat is None else f"canaries of {figures.repeat} copies"
                yield f"CONTRADICTION: {model.what} knows more of {copies} than is promised: stop training, and say so"
