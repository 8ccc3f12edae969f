"""fedcli study: many federations in one go, compared in tables."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from typer import Argument, Option

from fedcli.commands.options import JsonOption, ThreadsOption
from fedcli.commands.output import Display, print_hint, print_json, print_result, relative, tell
from fedcli.errors import UsageError
from fedcli.quantities import describe_seconds, plural

if TYPE_CHECKING:
    from fedcli.study.folder import CellRecord, StudyFolder

StudyOption = Annotated[
    Path | None,
    Option(
        "--study",
        "-s",
        metavar="DIR",
        help="The study's folder. Default: $FEDCLI_STUDY, else the nearest parent that holds a study.yaml.",
    ),
]

LikeOption = Annotated[str | None, Option(metavar="NAME", help="The columns and published figures of a shipped study.")]
AgainstOption = Annotated[
    str | None,
    Option(metavar="ROW", help="Differences to this row: base, local, best-alone, mean-alone, pooled, a label."),
]


def study_init(
    what: Annotated[
        str | None, Argument(metavar="NAME|FILE.yaml", help="A shipped study (--list shows them), or a file of yours.")
    ] = None,
    directory: Annotated[Path, Argument(metavar="DIR", help="The folder of the study. Default: this one.")] = Path("."),
    preset_set: Annotated[
        str | None, Option(metavar="NAME", help="A form of a shipped study: tiny runs on the built-in model.")
    ] = None,
    overrides: Annotated[
        list[str] | None, Option("--set", metavar="KEY.PATH=VALUE", help="Override a key of study.yaml; repeatable.")
    ] = None,
    list_studies: Annotated[bool, Option("--list", help="List the shipped studies and stop.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Write study.yaml, which says what the study compares; nothing is run yet."""
    from fedcli.study.folder import create_study, shipped_studies
    from fedcli.study.plan import cells_of, read_study

    if list_studies or what is None:
        titles = {name: read_study(path).title for name, path in shipped_studies().items()}
        if not list_studies:
            raise UsageError("no study is named", hint=f"Name one of {', '.join(titles)}, or a YAML file of yours.")
        print_result(json_output, {"studies": titles}, [f"{name}: {title}" for name, title in titles.items()])
        return
    folder, is_new = create_study(what, directory, preset_set=preset_set, overrides=tuple(overrides or ()))
    study, cells = folder.study, cells_of(folder.study)
    text = [
        f"study {folder.root} {'made' if is_new else 'already there'}: {study.title}",
        f"{plural(len(cells), 'cell')}: {plural(len(study.presets), 'preset')} x "
        f"({plural(len(study.algorithms), 'algorithm')} + baselines) x {plural(len(study.seeds), 'seed')}",
        f"benchmarks: {', '.join(study.eval.benchmarks)}",
    ]
    document = {"study": str(folder.root), "status": "created" if is_new else "exists", "cells": [c.id for c in cells]}
    here = "" if folder.root == Path.cwd() else f" -s {directory}"
    print_result(json_output, document, text, f"next: fedcli study run{here}")


def study_run(
    workers: Annotated[
        int, Option(min=1, metavar="W", help="Run so many cells at once, each on a GPU or a share of the cores.")
    ] = 1,
    cells: Annotated[
        list[str] | None,
        Option("--cell", metavar="ID", help="This cell, such as demo/seed-0/fedavg; repeatable."),
    ] = None,
    slurm: Annotated[bool, Option("--slurm", help="Send what is missing as jobs of SLURM, a cell each.")] = False,
    threads: ThreadsOption = None,
    study: StudyOption = None,
    json_output: JsonOption = False,
) -> None:
    """Run every cell of the study: train, train the baselines, and score.

    Interrupted and started again, it goes on where it was. A cell that fails is named, and the others go on.
    """
    from fedcli.study.folder import find_study
    from fedcli.study.run import run_study

    folder = find_study(study)
    if slurm:
        _send(folder, json_output, study)
        return
    with _display(json_output) as watch:
        result = run_study(folder, workers=workers, threads=threads, only=tuple(cells or ()), watch=watch)
    text = f"{result.num_done} of {plural(result.num_cells, 'cell')} done, {result.num_run} by this call"
    print_result(json_output, asdict(result), text, f"next: fedcli study table{_at(study)}")


def _send(folder: "StudyFolder", json_output: bool, study: Path | None) -> None:
    from fedcli.study.slurm import send_study

    sent = send_study(folder)
    text = [f"job {job}: {plural(len(cells), 'cell')}, {cells[0]} first" for job, cells in sent.jobs.items()]
    text += [f"in the queue already: {plural(len(sent.in_queue), 'cell')}"] if sent.in_queue else []
    print_result(json_output, asdict(sent), text or "nothing to send", f"next: fedcli study status{_at(study)}")


def study_status(study: StudyOption = None, json_output: JsonOption = False) -> None:
    """Show how far each cell is, what failed and why, and how long the rest will take."""
    from fedcli.study.folder import find_study
    from fedcli.study.status import read_status

    status = read_status(find_study(study))
    if json_output:
        print_json(asdict(status))
        return
    for cell in status.cells:
        spent = f", {describe_seconds(cell.seconds)}" if cell.seconds else ""
        tell(f"{cell.id}: {cell.status}{f', {cell.progress}' if cell.progress else ''}{spent}")
        if cell.error is not None:
            tell(f"    {cell.error.message}\n    {cell.error.hint}")
    eta = f"; about {describe_seconds(status.seconds_left)} left, one at a time" if status.seconds_left else ""
    tell(f"{status.num_done} of {plural(len(status.cells), 'cell')} done, {status.num_failed} failed{eta}")
    print_hint(f"next: fedcli study {'table' if status.num_done == len(status.cells) else 'run'}{_at(study)}")


def study_table(
    like: LikeOption = None,
    form: Annotated[
        Literal["markdown", "latex", "csv", "json"], Option("--format", metavar="NAME", help="What is printed.")
    ] = "markdown",
    against: AgainstOption = None,
    budget: Annotated[
        str | None,
        Option(metavar="BYTES", help="Scores of each algorithm's last scored round within it, as 20MB or 1.5GB."),
    ] = None,
    goal: Annotated[
        str | None,
        Option(metavar="BENCHMARK.METRIC=VALUE", help="What each algorithm sent and fetched until it got there."),
    ] = None,
    study: StudyOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show the study's scores over seeds with differences and ranks, and write them to tables/ in every format.

    Formats: markdown, latex, csv, json. With --budget or --goal the table is shown alone, and not written.
    """
    from fedcli.config.sections import parse_bytes
    from fedcli.printable import printable_json
    from fedcli.study.costs import Goal
    from fedcli.study.folder import find_study
    from fedcli.study.render import render
    from fedcli.study.results import make_table
    from fedcli.study.write import write_tables

    try:
        limit = None if budget is None else parse_bytes(budget)
    except ValueError as error:
        raise UsageError(f"--budget: {error}", hint="As in fedcli study table --budget 20MB.") from None
    folder = find_study(study)
    wanted = None if goal is None else Goal.parse(goal)
    made = make_table(folder, like=like, against=against, budget=limit, goal=wanted)
    paths = [] if budget or goal else write_tables(folder, made, like)
    is_json = json_output or form == "json"
    text = render(made, "json" if is_json else form)
    tell(printable_json(text) if is_json else text, end="")
    if paths and not json_output:
        print_hint("\n".join(f"written: {path}" for path in relative(paths)))


def study_plot(
    like: Annotated[str | None, Option(metavar="NAME", help="The columns of a shipped study.")] = None,
    form: Annotated[Literal["png", "pdf", "svg"], Option("--format", metavar="NAME", help="png, pdf or svg.")] = "png",
    study: StudyOption = None,
    json_output: JsonOption = False,
) -> None:
    """Draw scores over rounds with bands over seeds, and scores against bytes and seconds, into tables/.

    Rounds before the last are scored where study.yaml sets eval.every.
    """
    from fedcli.study.folder import find_study
    from fedcli.study.plot import plot_study

    paths = plot_study(find_study(study), like=like, form=form)
    print_result(
        json_output, {"files": [str(path) for path in paths]}, [f"written: {path}" for path in relative(paths)]
    )


def study_report(
    output: Annotated[
        Path | None,
        Option("--output", "-o", metavar="DIR", help="A folder for report.html. Default: report/ of the study."),
    ] = None,
    like: LikeOption = None,
    against: AgainstOption = None,
    study: StudyOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write a page that shows the study: its table, differences, curves over rounds, costs, and cells that failed.

    One HTML file that needs no network, on a screen or a phone, light or dark.
    """
    from fedcli.study.folder import find_study
    from fedcli.study.report import write_study_report

    written = write_study_report(find_study(study), like=like, against=against, output=output)
    hint = "\n".join(f"note: {note}" for note in written.notes)
    print_result(json_output, {"page": str(written.page), "notes": written.notes}, f"report: {written.page}", hint)


def _at(study: Path | None) -> str:
    return "" if study is None else f" -s {study}"


def _display(json_output: bool) -> Any:
    """Return what shows a study's run, which imports what a list of commands needs not."""
    from fedcli.study.run import StudyObserver

    class StudyDisplay(Display, StudyObserver):
        """One bar over all cells, and a line for each that has ended."""

        _kept: ClassVar[set[str]] = set()
        """What has been said of a cell, and is not said again of others."""

        def planned(self, num_cells: int, num_done: int) -> None:
            self._total, self._done, self._before, self._begun = num_cells, num_done, num_done, time.monotonic()
            self.show(total=num_cells, completed=num_done, description="starting")

        def cell_started(self, cell: str) -> None:
            self.show(description=cell)

        def cell_told(self, cell: str, text: str, to_keep: bool) -> None:
            if to_keep:
                if text not in self._kept:
                    self.say(f"{cell}: {text}")
                self._kept.add(text)
                return
            self.show(description=f"{cell}: {text}")
            self.say_now_and_then(f"{cell}: {text}")

        def cell_ended(self, cell: str, record: "CellRecord") -> None:
            self._done += 1
            each = (time.monotonic() - self._begun) / (self._done - self._before)
            left = (self._total - self._done) * each
            rest = f"; about {describe_seconds(left)} left" if left else ""
            said = f"failed: {record.error.message}" if record.error is not None else "done"
            self.say(f"{cell}: {said}, {describe_seconds(record.seconds)} ({self._done} of {self._total}{rest})")
            self.show(completed=self._done)

        def cells_awaited(self, cells: Sequence[str]) -> None:
            self.say(f"waiting for {plural(len(cells), 'cell')} that other processes run: {', '.join(cells[:3])}")

        def cell_lost(self, cell: str) -> None:
            self.say(f"the worker that ran {cell} died; another one goes on with it")

    return StudyDisplay(json_output, "study")
