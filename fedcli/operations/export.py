"""Handing a round over: its adapter with a model card, or merged into the base model."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fedcli.config import CustomTemplate
from fedcli.data.formats import known_format
from fedcli.data.row_report import describe_counts
from fedcli.errors import UsageError
from fedcli.operations.handed_over import Handed, of_client, of_round
from fedcli.operations.privacy import sentence_of
from fedcli.operations.report import read_metrics
from fedcli.operations.status import describe_algorithm, describe_history
from fedcli.parties.party import find_same_base, trusts_code
from fedcli.parties.simulate import DataSummary, read_summary
from fedcli.quantities import name_clients, plural
from fedcli.report.card import Card, ClientData, render_card
from fedcli.scoring.own_adapters import check_has_global, own_adapter, own_kind
from fedcli.scoring.table import best_rounds
from fedcli.tasks import TASKS
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.history import Round
from fedcli.workspace.layout import check_outside
from fedcli.workspace.publish import check_free, is_free, new_folder
from fedcli.workspace.registrations import DataCard

CARD_NAME = "README.md"
DTYPES = ("float32", "bfloat16", "float16")
SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Exported:
    """What was handed over."""

    output: Path
    round: int
    files: list[str]
    merged_dtype: str | None
    """None for an adapter."""
    num_bytes: int
    is_new: bool
    """Whether this call wrote it; else the folder held this very export already."""


def export(
    federation: FederationState,
    output: Path,
    *,
    number: str = "latest",
    best: str | None = None,
    client: int | None = None,
    merge: bool = False,
    dtype: str | None = None,
    max_shard_size: str | None = None,
) -> Exported:
    """Write a round's adapter with a model card into a new folder, or with `merge` the base with the adapter in it.

    `number` is a round's or "latest"; `best` a metric (BENCHMARK or BENCHMARK.METRIC) whose best round is taken;
    `client` is whose own adapter is handed over, as it stands with the latest round, or its cluster's.
    `dtype` and `max_shard_size` are of a merged model; by default the base's own type, and SHARD_SIZE. The folder
    appears whole or not at all. A folder that holds this very export is left as it is: a disk can do what it reports as
    failed. Raises WorkspaceError where something else stands there, UsageError for what cannot be done.
    """
    _check_options(merge, dtype, max_shard_size)
    output = output.resolve()  # a name such as . or a link could not be replaced
    check_outside(federation.workspace, output)
    found = _find_round(federation, number, best, client)
    handed = _handed(federation, found, client)
    if not is_free(output):
        for merged_dtype in ((dtype,) if dtype else DTYPES) if merge else (None,):
            if _holds_card(output, render_card(_card(federation, found, handed, merged_dtype))):
                return _exported(output, output, found, merged_dtype, is_new=False)
    check_free(output)
    with new_folder(output) as folder:
        merged_dtype = None
        if merge:
            from fedcli.model.merged import check_mergeable, write_merged

            trusts = trusts_code(federation)
            base = find_same_base(federation, federation.config.model.base, trust_remote_code=trusts).folder
            check_mergeable(base)
            merged_dtype = write_merged(
                base,
                handed.config,
                handed.arrays(),
                folder,
                dtype=dtype,
                max_shard_size=max_shard_size or SHARD_SIZE,
                template=found.manifest.train.template,
                trust_remote_code=trusts,
            )
        else:
            for name, contents in handed.files().items():
                (folder / name).write_bytes(contents)
        card = _card(federation, found, handed, merged_dtype)
        (folder / CARD_NAME).write_text(render_card(card), encoding="utf-8")
        done = _exported(output, folder, found, merged_dtype, is_new=True)
    return done


def _holds_card(folder: Path, card: str) -> bool:
    """Return whether a folder, which appeared whole or not at all, is an export with this card."""
    with suppress(OSError, ValueError):
        return (folder / CARD_NAME).read_text(encoding="utf-8") == card and any(folder.glob("*.safetensors"))
    return False


def _exported(output: Path, folder: Path, found: Round, merged_dtype: str | None, *, is_new: bool) -> Exported:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return Exported(output, found.number, list(sizes), merged_dtype, sum(sizes.values()), is_new)


def _check_options(merge: bool, dtype: str | None, max_shard_size: str | None) -> None:
    if not merge and (dtype or max_shard_size):
        option = "--dtype" if dtype else "--max-shard-size"
        raise UsageError(f"{option} is of a merged model", hint="Add --merge; an adapter is always float32.")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: no such type", hint=f"One of {', '.join(DTYPES)}.")
    if max_shard_size is not None and not re.fullmatch(r"[1-9]\d*(KB|MB|GB)", max_shard_size):
        raise UsageError(f"--max-shard-size {max_shard_size}: no such size", hint="Such as 500MB or 5GB.")


def _find_round(federation: FederationState, number: str, best: str | None, client: int | None) -> Round:
    if best is not None:
        if number != "latest":
            raise UsageError("--best names a round by its score, and --round by its number", hint="Leave one out.")
        number = str(best_rounds(federation.workspace, best)[0][0])
    found = federation.round(number)
    if found.manifest.num_clusters > 1 and ":" not in number:
        if client is not None and (cluster := _cluster_of(found, client)) is not None:
            return found.of_cluster(cluster)
        if client is not None:
            raise UsageError(
                f"client {client} was not counted in the merge that made round {found.number}, and so chose no cluster",
                hint=f"Name one of its {found.manifest.num_clusters} adapters: --round {number}:0.",
            )
        raise UsageError(
            f"round {found.number} has {found.manifest.num_clusters} adapters, one for each cluster",
            hint=f"Name one: --round {number}:0; or a client, whose cluster's it is: --client N.",
        )
    return found


def _cluster_of(found: Round, client: int) -> int | None:
    """Return the cluster of a client; None where each chooses, and it was not counted in the round's merge."""
    clusters, merge = found.manifest.clusters, found.manifest.aggregation
    assert clusters is not None
    if clusters.of is not None:
        return clusters.of.get(str(client))
    chosen = {entry.client: entry.cluster or 0 for entry in (merge.counted if merge else [])}
    return chosen.get(client)


def _handed(federation: FederationState, found: Round, client: int | None) -> Handed:
    """Return what is handed over; raise UsageError for a round without an adapter, or a client without one."""
    if client is None:
        check_has_global(found)
        return of_round(found)
    federation.check_clients([client])
    if found.number != federation.head.number:
        raise UsageError(
            f"--client {client} names an adapter as it stands with the latest round, {federation.head.number}",
            hint="Leave --round and --best out.",
        )
    if own_kind(found) is None:
        if found.manifest.num_clusters > 1:
            return of_round(found)
        raise UsageError(
            f"client {client} has no adapter of its own: train.personal, aggregation.share: [A] and private are unset",
            hint="Leave --client out: the round's adapter is everybody's.",
        )
    return of_client(found, own_adapter(federation, client))


def _card(federation: FederationState, found: Round, handed: Handed, merged_dtype: str | None) -> Card:
    workspace, config, adapter_config = federation.workspace, federation.config, handed.config
    manifest = found.manifest
    model, train = manifest.model, manifest.train
    last, summary = manifest.aggregation, read_summary(workspace)
    facts = {
        "base model": model.base,
        "its revision": model.revision or "",
        "its fingerprint": model.fingerprint,
        "quantisation in training": model.quantization,
        "whose": handed.whose,
        "adapter": f"LoRA, rank {adapter_config['r']}, alpha {adapter_config['lora_alpha']:g}, "
        f"of {', '.join(adapter_config['target_modules'])}",
        "algorithm": describe_history(manifest, "; ") or describe_algorithm(manifest.algorithm),
        "clients": f"{config.federation.clients}, {config.federation.cohort_size} drawn a round",
        "merged into the last round": plural(len(last.counted), "update") if last else "none: this is the start",
        "steps of a client in a round": f"{'up to ' * train.is_uneven}{train.steps}, "
        f"each of {plural(train.rows_per_step, 'row')}",
        "learning rate": f"{train.schedule.learning_rate:g} to {train.schedule.learning_rate_min:g}, cosine",
        "split of the rows": json.dumps(summary.partition).strip('"') if summary else "",
        "seed": str(train.seed),
        "workspace": manifest.workspace,
        "SHA-256 of the round's manifest": found.sha256,
        "SHA-256 of its adapter": handed.digest,
        "cluster": _cluster(found),
        "type of the merged weights": merged_dtype or "",
    }
    metrics, _ = read_metrics(workspace)
    return Card(
        title=workspace.title,
        task=manifest.task,
        task_description=TASKS[manifest.task].description,
        round=found.number,
        rounds=manifest.rounds,
        num_clients=config.federation.clients,
        is_simulation=federation.is_simulation,
        algorithm=str((last.algorithm if last else manifest.algorithm)["name"]),
        base=model.base,
        base_id=adapter_config["base_model_name_or_path"],
        template="the workspace's own" if isinstance(train.template, CustomTemplate) else train.template,
        datasets=sorted({entry.source for entry in config.data.sources if known_format(entry.source)}),
        facts={name: value for name, value in facts.items() if value},
        clients=_clients(federation, summary),
        metrics=metrics,
        merged_dtype=merged_dtype,
        notes=[*handed.notes, *_notes(found, merged_dtype)],
        version=version("fedcli"),
        privacy=sentence_of(federation, found.number),
    )


def _cluster(found: Round) -> str:
    """Return whose adapter it is, of several; empty where there is one for all."""
    clusters, merge = found.manifest.clusters, found.manifest.aggregation
    if clusters is None:
        return ""
    counted = [entry.client for entry in merge.counted if entry.cluster == found.cluster] if merge else []
    name = f" ({clusters.names[found.cluster]})" if clusters.names else ""
    return f"{found.cluster}{name} of {clusters.count}, {name_clients(counted)}" if counted else str(found.cluster)


def _clients(federation: FederationState, summary: DataSummary | None) -> list[ClientData]:
    """Return what is known of the clients' rows: what joined parties told, or a simulation's split."""
    known = {}
    withholds = federation.head.manifest.withholds
    for client, (size, format_) in enumerate(zip(summary.sizes, summary.formats, strict=False) if summary else ()):
        known[client] = ClientData(
            client, None if withholds else size, format_ if isinstance(format_, str) else "columns of its own"
        )
    for client, registration in federation.joined().items():
        told = DataCard(format=registration.data.format) if withholds else registration.data
        left_out = describe_counts(told.left_out) if told.left_out else ""
        tokens = str((told.token_quantiles or {}).get("0.5", ""))
        known[client] = ClientData(client, told.num_rows, told.format or "", left_out, tokens)
    return [known[client] for client in sorted(known)]


def _notes(found: Round, merged_dtype: str | None) -> list[str]:
    manifest = found.manifest
    notes = []
    if manifest.state != "finished":
        notes.append(f"The federation was not finished: this is round {found.number} of {manifest.rounds}.")
    quantization = manifest.model.quantization
    if quantization != "none":
        seen = f"The clients trained with the base's weights in {quantization}"
        notes.append(
            f"{seen}. The adapter is merged into the weights as they were before that, so answers differ a little."
            if merged_dtype
            else f"{seen}: load it so for the answers that were scored."
        )
    return notes
