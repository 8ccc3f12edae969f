"""A simulation's rows: the sources are read as a stream, split, and written to data/client-N.jsonl."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedcli.config import Config, DataFormat, SourceEntry, parse_format
from fedcli.data import partition
from fedcli.data.demo import DEMO_ROWS
from fedcli.data.file_rows import Row
from fedcli.data.formats import Choice, RowReader, choose_format, choose_split, group_of, guess_format, written_format
from fedcli.data.row_report import RowReport
from fedcli.data.source import Source, find_source, write_row
from fedcli.errors import ConfigError, IntegrityError, NotReadyError, WorkspaceError
from fedcli.model.base import BUILTIN_PREFIX
from fedcli.observer import Observer
from fedcli.randomness import stream
from fedcli.tasks import TASKS
from fedcli.tasks.conversation import Item
from fedcli.workspace.federation_state import Experiment
from fedcli.workspace.history import read_round
from fedcli.workspace.layout import Workspace
from fedcli.workspace.locks import hold
from fedcli.workspace.parsing import parse_object
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.row_files import RowFiles, read_data_card, save_beside_rows

DEMO_SOURCE = "builtin:demo"
MIN_DEMO_CLIENTS, MAX_DEMO_CLIENTS = 2, 64
MOST_COUNTS = 100_000
"""Counts, a group and client each, that a data card holds; where there would be more it holds none."""


@dataclass(frozen=True)
class DataSummary:
    """How a simulation's rows were split; `left_out` and `notes` count rows by reason.

    `formats` has what each client's rows were split as; `group_counts` has a list a client, of how many rows it has of
    each of `groups`, what the split went by (none, where that would be a card of megabytes).
    """

    partition: Any
    num_rows: int
    num_usable: int
    left_out: dict[str, int]
    notes: dict[str, int]
    sizes: list[int]
    formats: list[Any]
    groups: list[str]
    group_counts: list[list[int]]
    first_cases: dict[str, str] = field(default_factory=dict)
    """The first row left out for each reason: where it is, and what was found."""
    unused: dict[str, int] = field(default_factory=dict)
    """Rows that have a column, or a key inside one, which is not used."""
    remarks: list[str] = field(default_factory=list)
    """What was guessed of the sources: formats, separators."""


_SUMMARY = TypeAdapter(DataSummary)


@dataclass(frozen=True)
class Plan:
    """A split that has been made and not written yet."""

    split: partition.Split
    summary: DataSummary
    formats: list[DataFormat]
    """The sources'."""


def plan_split(experiment: Experiment, observer: Observer) -> Plan | None:
    """Read every source once and split the usable rows; None where there is no source. Writes nothing.

    Raises ConfigError where the rows, or what the partition asks of them, will not do.
    """
    config, root = experiment.config, experiment.workspace.root
    entries, num_clients = config.data.sources, config.federation.clients
    if not entries:
        return None
    choices = [_choice(config, entry, root) for entry in entries]
    chosen = [choice.format for choice in choices]
    if len(set(chosen)) > 1 and config.data.partition != "sources":
        written = zip(entries, map(written_format, chosen), strict=True)
        told = ", ".join(f"{entry.source}: {name}" for entry, name in written)
        raise ConfigError(
            f"data.source: the sources have rows of different formats, which cannot be mixed in one client ({told})",
            hint="Set data.partition to sources: every source gets clients of its own.",
        )
    readers = _readers(config, chosen)
    survey = partition.Survey(config.data.partition, num_clients, config.federation.seed)
    group_by = config.privacy.group_by
    for count, (row, item, number) in enumerate(_items(config, root, readers), 1):
        if group_by is not None:
            group_of(row, group_by)  # whoever trains has to know it of every row
        survey.add(row, item, number)
        if count % 1000 == 0:
            observer.rows_read("reading rows", count)
    for entry, reader in zip(entries, readers, strict=True):
        reader.require_rows(entry.source)
    made = partition.split(
        survey,
        min_rows=config.data.min_rows,
        max_rows=config.data.max_rows,
        source_limits=[entry.max_rows for entry in entries],
    )
    formats = [given if isinstance(given, str) else given.model_dump(exclude_none=True) for given in chosen]
    names = [Path(entry.source).name for entry in entries] if config.data.partition == "sources" else made.group_names
    if len(names) * num_clients > MOST_COUNTS:
        names = []
    report = RowReport()
    for reader in readers:
        report.include(reader)
    del report.unused[survey.column]  # a Counter has no such key to lack
    del report.unused[group_by]
    summary = DataSummary(
        partition=config.data.model_dump(mode="json", exclude_unset=True).get("partition", "iid"),
        num_rows=sum(reader.num_rows for reader in readers),
        num_usable=sum(reader.num_usable for reader in readers),
        sizes=made.sizes(),
        formats=[
            # a client's is its source's
            formats[client * len(entries) // num_clients if config.data.partition == "sources" else 0]
            for client in range(num_clients)
        ],
        groups=names,
        group_counts=[made.group_counts(client) if names else [] for client in range(num_clients)],
        remarks=[*_remarks(config, choices, root), *made.remarks],
        **report.counts(),
    )
    return Plan(made, summary, chosen)


def write_split(experiment: Experiment, plan: Plan, *, replace: bool = False, observer: Observer) -> None:
    """Write a split's files, and the data card beside them; files of the same contents stay as they are."""
    workspace, config = experiment.workspace, experiment.config
    readers = _readers(config, plan.formats)
    clients = plan.split.clients
    with RowFiles(workspace, config.federation.clients) as files:
        for position, (row, _, _) in enumerate(_items(config, workspace.root, readers)):
            if position >= len(clients):
                break
            if clients[position] != partition.UNUSED:
                files.add(int(clients[position]), write_row(row.fields))
            if position % 1000 == 0:
                observer.rows_read("writing rows", position)
        if sum(reader.num_usable for reader in readers) != plan.summary.num_usable:
            raise ConfigError("the rows changed while they were read", hint="Run it again once nobody writes to them.")
        files.publish(replace=replace)
    save_beside_rows(workspace, _held_out_files(experiment), asdict(plan.summary))


def partition_data(workspace: Workspace, *, replace: bool = False, observer: Observer) -> DataSummary:
    """Split the sources of fedcli.yaml as it stands; `replace`: over the files of an earlier split.

    Raises NotReadyError where there is no source, WorkspaceError where the rows are in use: a round has been merged.
    """
    experiment = Experiment.read(workspace)
    plan = plan_split(experiment, observer)
    if plan is None:
        raise NotReadyError(
            "there is nothing to split: data.source is null",
            hint="Start a workspace with rows: `fedcli init DIR --set data.source=SOURCE`.",
        )
    if experiment.identity is not None and experiment.identity.simulation is False:
        raise WorkspaceError(
            "this workspace was made without rows: parties join it with their own",
            hint="Start another one: `fedcli init DIR --set data.source=SOURCE`.",
        )
    with hold(workspace.server_lock, "the server's work"):
        if replace and read_round(workspace, 1) is not None:
            raise WorkspaceError(
                "rounds have been trained on the rows that are there",
                hint="Start another workspace with `fedcli init DIR`.",
            )
        write_split(experiment, plan, replace=replace, observer=observer)
    return plan.summary


def read_summary(workspace: Workspace) -> DataSummary | None:
    """Return the data card of a split, or None where there is none; raise IntegrityError where it is damaged."""
    path = workspace.data_card
    try:
        summary = _SUMMARY.validate_python(parse_object(read_data_card(workspace), path.name))
        for each in summary.formats:
            parse_format(each)
    except FileNotFoundError:
        return None
    except Refusal as refusal:
        problem = refusal.reason
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        problem = ": ".join([*map(str, fault["loc"]), fault["msg"]])
    else:
        if len(summary.sizes) == len(summary.formats) == len(summary.group_counts):
            return summary
        problem = "its lists are not of one length"
    raise IntegrityError(f"{path} is damaged: {problem}", hint="Write it anew with `fedcli data partition`.")


def _choice(config: Config, entry: SourceEntry, root: Path) -> Choice:
    if entry.source.startswith(BUILTIN_PREFIX):
        return Choice(choose_format(entry.source, entry.format, config.task))
    return guess_format(entry.source, entry.format, config.task, _rows(config, entry, root), "data.format")


def _remarks(config: Config, choices: list[Choice], root: Path) -> list[str]:
    """Return what was guessed of the sources, each with its name where there are several."""
    remarks = []
    for entry, choice in zip(config.data.sources, choices, strict=True):
        if choice.guess is not None:
            remarks.append(f"{entry.source}: {choice.guess}" if len(choices) > 1 else choice.guess)
        if not entry.source.startswith(BUILTIN_PREFIX):
            remarks += _source(entry, root).remarks()
    return remarks


def _readers(config: Config, formats: list[DataFormat]) -> list[RowReader]:
    return [RowReader(chosen, config.federation.seed) for chosen in formats]


def _items(config: Config, root: Path, readers: list[RowReader]) -> Iterator[tuple[Row, Item, int]]:
    """Yield every usable row of all sources, with the number of its source."""
    for number, (entry, reader) in enumerate(zip(config.data.sources, readers, strict=True)):
        for row, item in reader.read(_rows(config, entry, root)):
            yield row, item, number


def _rows(config: Config, entry: SourceEntry, root: Path) -> Iterator[Row]:
    if entry.source.startswith(BUILTIN_PREFIX):
        return iter(_demo_rows(config, entry.source))
    return _source(entry, root).rows()


def _source(entry: SourceEntry, root: Path) -> Source:
    return find_source(
        entry.source,
        root,
        subset=entry.subset,
        split=choose_split(entry.source, entry.split),
        delimiter=entry.delimiter,
        encoding=entry.encoding,
        keyed_by=entry.keyed_by,
    )


def _demo_rows(config: Config, source: str) -> list[Row]:
    """Return the built-in training rows, in random order."""
    if source != DEMO_SOURCE:
        raise ConfigError(f"data.source: unknown built-in rows {source!r}", hint=f"Known: {DEMO_SOURCE}.")
    if not MIN_DEMO_CLIENTS <= config.federation.clients <= MAX_DEMO_CLIENTS:
        raise ConfigError(
            f"federation.clients: the built-in rows are for {MIN_DEMO_CLIENTS} to {MAX_DEMO_CLIENTS} clients, "
            f"not {config.federation.clients}",
            hint="Use a number in that range, or rows of your own.",
        )
    rows = _demo_splits(config)["train"]
    order = stream(config.federation.seed, "partition").permutation(len(rows))
    return [Row(rows[index], f"{DEMO_SOURCE}, row {index + 1}") for index in map(int, order)]


def _demo_splits(config: Config) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    made = DEMO_ROWS.get(TASKS[config.task].item)
    if made is None:
        raise ConfigError(
            f"data.source: {DEMO_SOURCE} has no rows for task {config.task}", hint="Name rows of your own."
        )
    return made(config.federation.seed)


def _held_out_files(experiment: Experiment) -> dict[Path, bytes]:
    """Return the files of the demo's held-out rows."""
    workspace, config = experiment.workspace, experiment.config
    if all(entry.source != DEMO_SOURCE for entry in config.data.sources):
        return {}
    splits = _demo_splits(config)
    return {workspace.held_out_rows(split): b"".join(map(write_row, splits[split])) for split in ("tuning", "test")}
