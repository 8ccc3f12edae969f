"""fedcli eval: benchmarks and scores."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from fedcli.commands.eval_fetch import eval_fetch as eval_fetch
from fedcli.commands.options import BenchmarkDataOption, JsonOption, ThreadsOption, WorkspaceOption, found_federation
from fedcli.commands.output import FetchDisplay, print_hint, print_json, print_result, relative, tell, terminal
from fedcli.errors import DeniedError, UsageError, WorkspaceError, did_you_mean
from fedcli.quantities import plural
from fedcli.workspace.address import find_workspace

if TYPE_CHECKING:
    from fedcli.eval.judge import Estimate
    from fedcli.scoring.table import Column, ScoreTable
    from fedcli.workspace.layout import Workspace
    from fedcli.workspace.scores import ScoreRecord

FILE_WIDTH = 240
"""Characters, where no terminal says how many it has."""


def eval_run(
    names: Annotated[
        list[str],
        Argument(metavar="NAME...", help="Benchmarks or groups (`fedcli eval list` shows them); or lm-eval TASK..."),
    ],
    rounds: Annotated[list[str] | None, Option("--round", metavar="N|latest", help="A round's adapter.")] = None,
    base: Annotated[bool, Option("--base", help="The base model.")] = False,
    clients: Annotated[
        list[str] | None,
        Option("--client", metavar="N|all", help="Client N's own adapter where it trains one, else its last update."),
    ] = None,
    alone: Annotated[list[int] | None, Option(metavar="N", help="Client N trained alone.")] = None,
    pooled: Annotated[bool, Option("--pooled", help="The baseline of all rows together.")] = False,
    adapters: Annotated[
        list[Path] | None, Option("--adapter", metavar="DIR", help="An adapter of this base, in PEFT's layout.")
    ] = None,
    models: Annotated[
        list[str] | None, Option("--model", metavar="DIR|ID", help="A full model: a folder or a hub id.")
    ] = None,
    apis: Annotated[
        list[str] | None, Option("--api", metavar="NAME", help="A model behind an OpenAI-compatible endpoint.")
    ] = None,
    api_url: Annotated[str | None, Option(metavar="URL", help="That endpoint. Default: OpenAI's.")] = None,
    data: BenchmarkDataOption = None,
    include: Annotated[Path | None, Option(metavar="DIR", help="lm-eval: a folder with tasks of yours.")] = None,
    limit: Annotated[
        int | None, Option(min=1, metavar="N", help="The first N items only, of each subject or task.")
    ] = None,
    shots: Annotated[int | None, Option(min=0, metavar="N", help="Worked examples in the prompt.")] = None,
    samples: Annotated[int | None, Option(min=1, metavar="N", help="Answers to each problem, for pass@k.")] = None,
    temperature: Annotated[float | None, Option(min=0, max=100, metavar="T", help="Sampling; 0 is greedy.")] = None,
    max_new_tokens: Annotated[int | None, Option(min=1, metavar="N", help="The longest answer.")] = None,
    template: Annotated[str | None, Option(metavar="NAME", help="Instead of the workspace's template.")] = None,
    baseline: Annotated[str | None, Option(metavar="TARGET", help="mt-bench-pairwise: whom to compare with.")] = None,
    judge_model: Annotated[
        str | None, Option(metavar="NAME|DIR", help="The judge: a model of --judge-url, or a folder.")
    ] = None,
    judge_url: Annotated[
        str | None, Option(metavar="URL", help="An OpenAI-compatible endpoint. Default: OpenAI's.")
    ] = None,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask whether the judge's cost is fine.")] = False,
    allow_code_execution: Annotated[
        bool, Option("--allow-code-execution", help="Run code that the model wrote, in a sandbox.")
    ] = False,
    batch_size: Annotated[
        int | None, Option(min=1, metavar="N", help="Items at once. Default: what takes half a minute, at most 64.")
    ] = None,
    backend: Annotated[str | None, Option(hidden=True)] = None,
    split: Annotated[str, Option(hidden=True)] = "test",
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Score models on benchmarks, and keep scores and answers; with no model named, all that the workspace holds.

    Options that name models may be repeated. An option that some of the benchmarks do not know holds for the others.
    What was answered before is not asked again.
    """
    from fedcli.eval.benchmark import Options
    from fedcli.scoring.request import Scoring
    from fedcli.scoring.targets import Targets

    if backend is not None:
        raise UsageError(
            "there is no --backend any more: transformers answers, or a server behind --api",
            hint="Leave it out; for vLLM start `vllm serve BASE --enable-lora --lora-modules NAME=rounds/N/adapter`, "
            "and name it: --api NAME --api-url http://localhost:8000/v1.",
        )
    splits = {"test": "demo", "tuning": "demo-tuning"}
    if split not in splits:
        raise UsageError(f"unknown split {split!r}", hint=did_you_mean(split, splits))
    targets = Targets(
        rounds=tuple(rounds or ()),
        base=base,
        clients=tuple(_client(name) for name in clients or () if name != "all"),
        all_clients="all" in (clients or ()),
        alone=tuple(alone or ()),
        pooled=pooled,
        adapters=tuple(adapters or ()),
        models=tuple(models or ()),
        apis=tuple(apis or ()),
        api_url=api_url,
    )
    options = Options(limit, shots, samples, temperature, max_new_tokens, template, baseline)
    federation = found_federation(workspace)
    with _Display(json_output, "loading") as display:
        scoring = Scoring(
            names=[splits[split] if name == "demo" else name for name in names],
            targets=targets,
            options=options,
            data=data,
            include=include,
            judge_model=judge_model,
            judge_url=judge_url,
            allow_code_execution=allow_code_execution,
            batch_size=batch_size,
            threads=threads,
            confirm=None if yes else display.confirm,
        )
        records = federation.evaluate(request=scoring, observer=display)
    if json_output:
        print_json({"scores": records})
        return
    _print(federation.workspace, records)


def _client(name: str) -> int:
    if not (name.isascii() and name.isdigit() and len(name) < 10):
        raise UsageError(f"--client {name[:80]}: no such client", hint="Give a client's number, or all.")
    return int(name)


class _Display(FetchDisplay):
    """Shows how far an evaluation is, and asks whether a judge's cost is fine, once."""

    _is_confirmed = False

    def target_started(self, target: str, benchmark: str) -> None:
        self.title = f"{target}: {benchmark}"
        self.show(description=self.title, completed=0, total=None)

    def answered(self, num_done: int, num_asked: int) -> None:
        self.show(completed=num_done, total=num_asked)
        self.say_now_and_then(f"{self.title}: {num_done:,} of {num_asked:,} answered")

    def confirm(self, estimate: "Estimate") -> None:
        """Ask a person; raise UsageError where none is there, or says no."""
        if self._is_confirmed:
            return
        cost = (
            f"{estimate.num_calls} questions to the judge for this model, about {estimate.num_prompt_tokens:,} tokens, "
            f"and at most {estimate.max_reply_tokens:,} in its replies"
        )
        hint = "The answers are kept. Say --yes to let the judge score them."
        if not sys.stdin.isatty():
            raise UsageError(f"the judge's cost needs a yes: {cost}", hint=hint)
        self.stop()
        if not typer.confirm(f"{cost}, and as much for each further model. Go on?", err=True):
            raise UsageError("the judge was not asked", hint=hint)
        self.start()
        self._is_confirmed = True


def _print(workspace: "Workspace", records: "Sequence[ScoreRecord]") -> None:
    """Print what was scored as a table, and what to do next for what could not be."""
    from fedcli.scoring.table import make_table

    if any(record.scores for record in records):
        print_table(make_table(workspace, records=records))
    for record in records:
        if record.awaits is not None:
            option = "--judge-model NAME" if record.awaits == "judge" else "--allow-code-execution"
            print_hint(
                f"{record.target}: {record.num_unscored} answers to {record.name} are kept, and wait for "
                f"{record.awaits}: the same command with {option} scores them"
            )
        elif record.num_unscored:
            print_hint(
                f"{record.target}, {record.name}: {record.num_unscored} of {record.num_items} items have no score"
            )


def eval_list(
    group: Annotated[str | None, Option(metavar="NAME", help="Only the benchmarks of a group.")] = None,
    data: BenchmarkDataOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show all benchmarks: groups, metrics, size, what each needs, and whether its data is on this machine."""
    from fedcli.eval.data import find_roots
    from fedcli.eval.listing import list_benchmarks
    from fedcli.plugins import OWN_PACKAGE
    from fedcli.workspace.row_files import find_files

    roots = find_roots(data)
    with suppress(WorkspaceError):  # a workspace may hold rows of its own; the list needs none
        roots = (*roots, find_workspace(workspace).data)
    listed = list_benchmarks(group, roots, find_files)
    if json_output:
        print_json([entry.document() for entry in listed])
        return
    for entry in listed:
        found = entry.benchmark
        metrics = [metric.name for metric in found.metrics if not metric.is_detail]
        num_details = len(found.metrics) - len(metrics)
        origin = "" if entry.package == OWN_PACKAGE else f"; from the package {entry.package}"
        items = f"{found.size:,} items" if found.size else "as many items as you give"
        tell(f"{found.name}: {found.title} ({items}; {', '.join(found.groups) or 'no group'}{origin})")
        more = f" and {plural(num_details, 'detail')}" if num_details else ""
        tell(f"    metrics: {', '.join(metrics)}{more}")
        release = found.data.release if found.data else None
        needs = f"; license: {release.license}" if release is not None else ""
        needs += f"; needs: {', '.join(found.needs)}" if found.needs else ""
        lacks = f"; this machine lacks: {', '.join(entry.missing)}" if entry.missing else ""
        tell(f"    data: {entry.data}{needs}{lacks}")
    print_hint(
        "data: local (its files are here), cached (fetched before), publisher (it would be fetched, and checked by its "
        "sha256), hub (it would be fetched, and not checked), missing; --json says more"
    )


def eval_table(
    names: Annotated[list[str] | None, Argument(metavar="[NAME...]", help="Benchmarks; all by default.")] = None,
    group: Annotated[str | None, Option(metavar="NAME", help="One group.")] = None,
    against: Annotated[
        str, Option(metavar="TARGET", help="Show differences to this one: a target, or best-alone.")
    ] = "base",
    details: Annotated[bool, Option("--details", help="Subjects and categories too.")] = False,
    workspaces: Annotated[
        list[str] | None,
        Option("--workspace", "-w", metavar="DIR|URL", help="The workspace, or several side by side: -w A -w B."),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Show scores side by side, and write them to eval/ as markdown, csv and json.

    Of several workspaces the table is shown alone, and not written.
    """
    from fedcli.scoring.client_table import as_documents
    from fedcli.scoring.render import as_rows, save_table

    named: Sequence[str | None] = workspaces or [None]
    federation, *others = map(found_federation, named)
    made = federation.scores(*(names or ()), group=group, against=against, details=details, others=others)
    parts = ["table", *(names or []), *(["group", group] if group else [])]
    try:
        paths = [] if others else save_table(federation.workspace, made, "-".join(parts))
    except DeniedError as error:  # a reader of somebody else's workspace
        paths = []
        print_hint(f"the table is not written: {error.message}")
    if json_output:
        document = {"against": made.against, "average_rank": made.average_rank, "scores": as_rows(made)}
        clients = {"clients": as_documents(made.clients)} if made.clients else {}
        print_json({**document, **clients, "notes": made.notes, "files": paths})
        return
    print_table(made)
    if paths:
        print_hint("\n".join(f"written: {path}" for path in relative(paths)))


def print_table(made: "ScoreTable") -> None:
    """Print a table, the shorter side across: best bold, second best underlined, differences below."""
    from rich.markup import escape
    from rich.table import Table

    from fedcli.scoring import client_table, communication
    from fedcli.scoring.render import show_communication, show_difference, show_score

    console = terminal()
    if not console.is_terminal:
        console = terminal(width=FILE_WIDTH)
    show_leads = any(cell.difference for cell in made.cells.values())
    grid = Table(title=escape(f"scores [95 % interval]{f', and difference to {made.against}' if show_leads else ''}"))

    def shown(target: str, column: "Column") -> str:
        cell = made.cells.get((target, column))
        if cell is None:
            return ""
        style = {1: "bold", 2: "underline"}.get(cell.rank)
        text = f"[{style}]{escape(show_score(cell))}[/]" if style else escape(show_score(cell))
        return f"{text}\n{escape(show_difference(cell))}" if cell.difference else text

    rows = [["metric", *map(escape, made.targets)]]
    rows += [[escape(column.title), *(shown(target, column) for target in made.targets)] for column in made.columns]
    if made.average_rank:
        rows.append(["average rank", *(f"{made.average_rank[target]:.2f}" for target in made.targets)])
    if made.communication:
        rows.append(
            [communication.HEAD, *(text for target in made.targets for text in show_communication(made, target))]
        )
    if len(made.targets) >= len(made.columns):
        rows = [list(row) for row in zip(*rows, strict=True)]
        rows[0][0] = ""
    for position, title in enumerate(rows[0]):
        grid.add_column(title, justify="right" if position else "left")
    for row in rows[1:]:
        grid.add_row(*row)
    console.print(grid)
    if made.clients:
        summary = Table(title="clients' own adapters")
        for position, title in enumerate(client_table.HEAD):
            summary.add_column(title, justify="right" if position else "left")
        for cells in client_table.as_cells(made.clients):
            summary.add_row(*map(escape, cells))
        console.print(summary)
    for note in made.notes:
        print_hint(note)


def eval_best(
    named: Annotated[
        str | None, Argument(metavar="NAME", help="A benchmark (its first metric), or BENCHMARK.METRIC.")
    ] = None,
    metric: Annotated[str | None, Option(metavar="NAME", help="The same as NAME.")] = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Name the best of the rounds that have been scored."""
    metric = metric or named
    if metric is None or named not in (None, metric):
        what = "no metric is named" if metric is None else f"two metrics are named, {named} and {metric}"
        raise UsageError(what, hint="Name one: fedcli eval best demo, or fedcli eval best fpb.f1.")
    ranked = found_federation(workspace).best_rounds(metric)
    number, entry = ranked[0]
    rounds = [{"round": found, **score.model_dump()} for found, score in ranked]
    interval = f"[{entry.low:.4f}, {entry.high:.4f}]"
    print_result(
        json_output,
        {"metric": metric, "best": number, "rounds": rounds},
        f"round {number}: {metric} {entry.value:.4f} {interval}, of {plural(len(ranked), 'round')}",
    )
