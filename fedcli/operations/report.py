"""A report of a federation: its series collected from manifests, scores and inbox, drawn, and written to a folder."""

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

import numpy as np

from fedcli.algos import Array
from fedcli.algos.diagnostics import Diagnosis, diagnose
from fedcli.errors import IntegrityError, require_packages
from fedcli.eval.registry import BENCHMARKS
from fedcli.observer import Observer
from fedcli.operations.privacy import privacy_of
from fedcli.operations.product_figures import describe_products, product_rows
from fedcli.operations.status import describe_algorithm, describe_history
from fedcli.operations.update_figures import figures_of
from fedcli.printable import without_credentials
from fedcli.quantities import describe_bytes, plural
from fedcli.report.figures import MOST_CLIENTS, NAMES, draw
from fedcli.report.page import is_ours, render
from fedcli.report.series import MergedRound, MetricScores, Point, Report, Similarity, UpdateRow
from fedcli.scoring.targets import is_stale
from fedcli.tasks import TASKS
from fedcli.workspace.federation_state import FederationState, config_text
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import Submission, look_at_update
from fedcli.workspace.layout import ADAPTER_FILE, ADAPTER_NAME, Workspace, check_outside
from fedcli.workspace.merge_records import CountedUpdate
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.report_folder import publish_report
from fedcli.workspace.scores import ScoreRecord, read_scores
from fedcli.workspace.side_by_side import SideBySide
from fedcli.workspace.target_name import TargetName

LARGEST_LOSS = 1e9
"""A loss beyond it, which a client can claim, is told and not drawn."""
COMPARED_BYTES = 4 * 10**9
"""Updates that are read to compare them, from the last round backwards; that one is compared whatever its size."""
PACKAGES = ("fedcli", "numpy", "torch", "transformers", "peft", "matplotlib")


@dataclass(frozen=True)
class WrittenReport:
    """What was written, and where."""

    page: Path
    pictures: list[Path]
    tensorboard: Path | None
    num_values: int
    """In TensorBoard's event files."""
    notes: list[str]


def write_report(
    federation: FederationState, *, output: Path | None = None, tensorboard: Path | None = None, observer: Observer
) -> WrittenReport:
    """Write report.html and its pictures into `output` (default: report/ of the workspace), and event files if asked.

    Raises WorkspaceError for a folder with other things in it,
    RequirementError where event files are asked for and the package for them is missing.
    """
    from fedcli.report.events import require_writer, write_events

    require_packages(["matplotlib"])
    if tensorboard is not None:
        require_writer()
    workspace = federation.workspace
    report = collect(federation, observer=observer)
    pictures = draw(report)
    files = {picture.name: picture.png for picture in pictures}
    folder = workspace.report if output is None else output
    check_outside(workspace, folder)
    page = publish_report(folder, render(report, pictures).encode(), files, NAMES, is_ours)
    num_values = 0 if tensorboard is None else write_events(report, tensorboard)
    return WrittenReport(page, [folder / f"{name}.png" for name in files], tensorboard, num_values, list(report.notes))


def collect(federation: FederationState, *, observer: Observer) -> Report:
    """Return what there is to show of a federation as it stands."""
    workspace, config, head = federation.workspace, federation.config, federation.head
    rounds = [*federation.past(), head]
    similarities, found, notes = _similarities(rounds, observer)
    scores, more_notes = read_metrics(workspace)
    manifest = head.manifest
    adapter = config.adapter
    layers = ", ".join(sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in manifest.tensors}))
    facts = {
        "workspace": manifest.workspace,
        "base model": manifest.model.base,
        "fingerprint": manifest.model.fingerprint,
        "quantisation": manifest.model.quantization,
        "adapter": f"LoRA, rank {adapter.global_rank}, alpha {adapter.alpha:g}, of {layers}",
        "algorithm": describe_algorithm(manifest.algorithm),
        "algorithms so far": describe_history(manifest, ", "),
        "secure aggregation": manifest.secure_aggregation or "",
        "merge of products": describe_products(manifest),
    }
    return Report(
        title=workspace.title,
        state=manifest.state,
        task=TASKS[manifest.task].description,
        round=head.number,
        rounds=manifest.rounds,
        num_clients=config.federation.clients,
        is_simulation=federation.is_simulation,
        facts={name: value for name, value in facts.items() if value},
        merged=[_merged(before, after) for before, after in pairwise(rounds)],
        scores=scores,
        similarities=similarities,
        notes=[*notes, *more_notes, *_losses_beyond(rounds), *_privacy(rounds)],
        config=without_credentials(config_text(workspace)),
        versions=versions_here(),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        updates=_updates(rounds, found),
        products=product_rows(manifest),
    )


def _updates(rounds: Sequence[Round], found: Mapping[int, Mapping[int, Diagnosis]]) -> list[UpdateRow]:
    """Return the figures of the last round's updates, and of those of others that are unusual."""
    rows = []
    for before, after in pairwise(rounds):
        done = after.manifest.aggregation
        for figures in figures_of(done.counted, found.get(before.number)) if done else ():
            if figures.unusual or after is rounds[-1]:
                rows.append(UpdateRow(round=before.number, **vars(figures)))
    return rows


def _merged(before: Round, after: Round) -> MergedRound:
    done, cost = after.manifest.aggregation, after.manifest.cost
    assert done is not None  # every round but the first says how it came to be
    return MergedRound(
        number=before.number,
        algorithm=str(done.algorithm["name"]),
        learning_rate=before.manifest.train.learning_rate,
        cohort=before.manifest.cohort,
        losses={entry.client: None if _is_beyond(entry) else entry.train_loss for entry in done.counted},
        norms={entry.client: entry.delta_norm for entry in done.counted if entry.delta_norm is not None},
        refused={entry.client: (entry.code, entry.reason) for entry in done.refused},
        missing=done.missing,
        total_bytes_up=cost.total_bytes_up if cost else None,
        total_bytes_down=cost.total_bytes_down if cost else None,
        opened=before.published,
        closed=after.published,
    )


def _privacy(rounds: Sequence[Round]) -> list[str]:
    """Return what is guaranteed, where any round asked for privacy."""
    return [privacy_of(rounds).sentence] if any(each.manifest.withholds for each in rounds) else []


def _is_beyond(entry: CountedUpdate) -> bool:
    return entry.train_loss is not None and abs(entry.train_loss) > LARGEST_LOSS


def _losses_beyond(rounds: Sequence[Round]) -> list[str]:
    """Return a note of the losses that are not drawn, with an example."""
    found = [
        f"{entry.train_loss:.3g} by client {entry.client} in round {after.number - 1}"
        for after in rounds
        if after.manifest.aggregation is not None
        for entry in after.manifest.aggregation.counted
        if _is_beyond(entry)
    ]
    return [f"losses beyond {LARGEST_LOSS:g} are left out: {len(found)}, such as {found[0]}"] if found else []


def read_metrics(workspace: Workspace) -> tuple[list[MetricScores], list[str]]:
    """Return all scores by metric, and notes of those that are left out."""
    found: dict[tuple[str, str], list[ScoreRecord]] = {}
    stale = set()
    for record in sorted(read_scores(workspace), key=lambda record: record.target_name.order):
        if is_stale(workspace, record.target, record.model):
            stale.add(record.target)
            continue
        for metric, entry in record.scores.items():
            if not entry.is_detail:
                found.setdefault((record.name, metric), []).append(record)
    notes = [
        f"{name} was trained anew or removed since it was scored: its scores are left out" for name in sorted(stale)
    ]
    return [_metric(name, metric, records) for (name, metric), records in sorted(found.items(), key=_in_table)], notes


def _in_table(found: tuple[tuple[str, str], object]) -> tuple[int, str]:
    """Return where a metric stands: benchmarks are in the order of their list, as in `eval table`."""
    (name, _), _ = found
    order = {known: position for position, known in enumerate(BENCHMARKS)}
    return order.get(name.partition("@")[0], len(order)), name


def _metric(name: str, metric: str, found: Sequence[ScoreRecord]) -> MetricScores:
    entries = {record.target: record.scores[metric] for record in found}
    points = {TargetName.parse(target): Point(entry.value, entry.low, entry.high) for target, entry in entries.items()}
    rounds = {name.number: point for name, point in points.items() if name.kind == "round" and name.number is not None}
    others = {str(name): point for name, point in points.items() if name.kind != "round"}
    alone = {str(name): name.number for name in points if name.kind == "alone" and name.number is not None}
    first = next(iter(entries.values()))
    return MetricScores(name, metric, first.unit, first.higher_is_better, rounds, others, alone)


def _similarities(
    rounds: Sequence[Round], observer: Observer
) -> tuple[list[Similarity], dict[int, dict[int, Diagnosis]], list[str]]:
    """Return the cosines of the last rounds whose updates can still be read, and notes of what was left out.

    Of rounds of which all updates can be read there are figures, too, by round and client.
    """
    found: list[Similarity] = []
    figures: dict[int, dict[int, Diagnosis]] = {}
    notes, withheld, masked = list[str](), list[int](), list[int]()
    clustered, mixed = list[int](), list[int]()
    num_bytes = 0
    for before, after in reversed(list(pairwise(rounds))):
        done = after.manifest.aggregation
        own = [entry for entry in done.counted if entry.base is None] if done else []  # differences from one adapter
        hashes = {entry.client: entry.update for entry in own[:MOST_CLIENTS]}
        if not hashes:  # all of its clients had left, or all that counted came late
            continue
        if before.manifest.secure_aggregation is not None:
            masked.append(before.number)
            continue
        if before.manifest.withholds:
            withheld.append(before.number)
            continue
        if before.manifest.num_clusters > 1:
            clustered.append(before.number)
            continue
        if before.manifest.lora is not None and before.manifest.lora.ranks is not None:
            mixed.append(before.number)
            continue
        num_bytes += len(hashes) * before.manifest.files[ADAPTER_NAME].bytes
        if found and num_bytes > COMPARED_BYTES:
            limit = f"{describe_bytes(COMPARED_BYTES)} of updates are read at most"
            notes.append(f"cosines: of rounds {found[-1].round} to {found[0].round} only, for {limit}")
            break
        if before.is_gone(ADAPTER_NAME):
            notes.append(f"cosines: `fedcli gc` has removed the adapter of round {before.number}, and what is older")
            break
        try:
            similarity, products = _compare(before, hashes, observer)
        except IntegrityError:  # the rest of the report stands
            notes.append(f"cosines: the adapter of round {before.number} is damaged, as `fedcli verify` tells")
            break
        if not similarity.clients:
            notes.append(
                f"cosines: no update of round {before.number} can be read any more; no round before it is compared"
            )
            break
        found.append(similarity)
        if done and len(products) == len(done.counted):
            weights = np.array([entry.weight or 0.0 for entry in done.counted])
            if weights.sum() > 0:
                shares = diagnose(products, weights / weights.sum())
                figures[before.number] = {
                    entry.client: each for entry, each in zip(done.counted, shares, strict=True) if entry.cosine is None
                }
    if withheld:
        notes.append(f"cosines: privacy withholds those of {plural(len(withheld), 'round')}")
    if clustered:
        notes.append(f"cosines: updates of {plural(len(clustered), 'round')} start from several adapters")
    if mixed:
        notes.append(
            f"cosines: the clients of {plural(len(mixed), 'round')} have unlike ranks: theirs are not compared"
        )
    if masked:
        notes.append(f"cosines: updates of rounds {masked[-1]} to {masked[0]} are masked, and nobody can compare them")
    return found[::-1], figures, notes


def _compare(base: Round, hashes: dict[int, str], observer: Observer) -> tuple[Similarity, Array]:
    """Return the cosines between a round's updates, as far as they are still in the inbox, and their Gram matrix."""
    found = [update for client in sorted(hashes) if (update := _counted(base, client, hashes, observer)) is not None]
    adapter = base.adapter()
    if not found:
        return Similarity(base.number, [], np.zeros((0, 0))), np.zeros((0, 0))
    reading = SideBySide(base, found, ADAPTER_FILE, adapter)
    products = reading.stacks.products()
    whole = sorted({*range(len(found))} - {*reading.faulty()})
    products = products[np.ix_(whole, whole)]
    lengths = np.sqrt(products.diagonal())
    kept = np.flatnonzero(lengths > 0)
    cosines = products[np.ix_(kept, kept)] / np.outer(lengths[kept], lengths[kept])
    return Similarity(base.number, [found[whole[place]].client for place in kept], cosines.clip(-1, 1)), products


def _counted(base: Round, client: int, hashes: dict[int, str], observer: Observer) -> Submission | None:
    """Return a counted update; None where another one or none lies there now."""
    observer.update_read(base.number, client)
    try:
        update = look_at_update(base, client)
    except Refusal:
        return None
    return update if update is not None and update.sha256 == hashes[client] else None


def versions_here() -> dict[str, str]:
    """Return the versions of Python and of PACKAGES, as far as they are installed."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
