"""`fedcli audit plant`: made-up rows go among a party's own, or out again; nobody else is told."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

from fedcli.client.canaries import CODE_LETTERS, LETTERS, code_of, encode_canaries
from fedcli.data.formats import RowReader
from fedcli.errors import ConfigError, UsageError
from fedcli.parties.party import Party, find_party, find_same_base, trusts_code
from fedcli.tasks import TASKS
from fedcli.tasks.conversation import Example, Preference, is_text
from fedcli.workspace.baselines import baseline_name, read_baseline_record
from fedcli.workspace.canaries import Canary, CanaryKind, Planted, read_canaries, remove_canaries, save_canaries
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.locks import hold
from fedcli.workspace.parsing import sha256

MOST_CANARIES = 4096
MOST_REPEAT = 1000
NUM_LETTERS = 8
"""Of the name that a canary's prompt asks for."""


@dataclass(frozen=True)
class Planting:
    """What is planted in a client's rows now, or was taken out."""

    status: Literal["planted", "removed", "none"]
    client: int
    home: Path
    num_canaries: int = 0
    num_included: int = 0
    num_copies: int = 0
    first_round: int | None = None
    """The first round that is trained with them."""
    trained_before: bool = False
    """Whether the client answered rounds before, which know nothing of them."""


def plant_canaries(
    federation: FederationState, client: int, *, home: Path | None, num_canaries: int, repeats: Sequence[int]
) -> Planting:
    """Plant canaries among one client's rows: each in by a coin, and then as often as one of `repeats` says.

    Only the client's home knows of them. Raises UsageError where some are planted already, or the counts will not do;
    ConfigError where the client's rows are not here, or canaries cannot be written as its rows.
    """
    _check_counts(num_canaries, repeats)
    federation.check_clients([client])
    party = find_party(federation, client, home)
    kind = _kind(federation, party)
    with hold(party.home.lock, f"client {client}"):
        federation.refresh()
        if read_canaries(party.home) is not None:
            raise UsageError(
                f"client {client} has canaries already: {party.home.canaries}",
                hint=f"Measure with `fedcli audit measure --id {client}`; to plant others take these out first: "
                f"`fedcli audit plant --id {client} --remove`.",
            )
        head = federation.head
        if head.manifest.state == "finished":
            raise UsageError(
                "the federation has finished: no round would be trained with canaries",
                hint="Plant them before the rounds that you want to audit.",
            )
        planted = Planted(
            workspace=federation.identity.id,
            client=client,
            kind=kind,
            first_round=head.number + head.has_update(client),
            baseline=_baseline(federation, client),
            seed=secrets.token_hex(32),
            canaries=_draw(kind, num_canaries, repeats),
        )
        _check_written(federation, party, planted)
        save_canaries(party.home, planted)
    num_included = len(planted.included)
    trained_before = any(federation.workspace.has_update(number, client) for number in range(planted.first_round))
    copies, first = planted.num_copies, planted.first_round
    where = party.home.folder
    return Planting("planted", client, where, num_canaries, num_included, copies, first, trained_before)


def take_out_canaries(federation: FederationState, client: int, *, home: Path | None) -> Planting:
    """Take a client's canaries out of its rows, which then are what they were before; damaged ones, too."""
    federation.check_clients([client])
    party = find_party(federation, client, home)
    with hold(party.home.lock, f"client {client}"):
        was_there = remove_canaries(party.home)
    return Planting("removed" if was_there else "none", client, party.home.folder)


def _check_counts(num_canaries: int, repeats: Sequence[int]) -> None:
    if not 1 <= num_canaries <= MOST_CANARIES:
        raise UsageError(f"--canaries is {num_canaries}", hint=f"Give 1 to {MOST_CANARIES}.")
    if not repeats or len({*repeats}) < len(repeats) or not all(1 <= count <= MOST_REPEAT for count in repeats):
        told = ",".join(map(str, repeats))
        raise UsageError(f"--repeat is {told!r}", hint=f"Give different counts from 1 to {MOST_REPEAT}, as 1,4,16.")
    if num_canaries < len(repeats):
        raise UsageError(
            f"{num_canaries} canaries cannot have {len(repeats)} different counts", hint="Raise --canaries."
        )


def _kind(federation: FederationState, party: Party) -> CanaryKind:
    """Return what the client's rows are; raise ConfigError for a task whose rows canaries cannot be."""
    manifest = federation.head.manifest
    task = TASKS[manifest.task]
    if task.item is Preference:
        return "preference"
    if task.item is not Example:
        raise ConfigError(
            f"task {task.name} learns from {task.item.__name__} rows, of which there are no canaries",
            hint="An audit plants examples (sft) or preferences (dpo).",
        )
    reader = RowReader(party.format, federation.config.federation.seed)
    for _, item in reader.read(party.source.rows()):
        return "text" if is_text(item.conversations[0]) else "instruction"
    reader.require_rows(party.source.location)
    raise AssertionError("a reader without a usable row has raised")


def _draw(kind: CanaryKind, num_canaries: int, repeats: Sequence[int]) -> tuple[Canary, ...]:
    """Return canaries; whatever is random of them comes from the operating system."""
    counts = [*islice(cycle(repeats), num_canaries)]
    names: set[str] = set()
    while len(names) < num_canaries:
        names.add("".join(secrets.choice(LETTERS) for _ in range(NUM_LETTERS)))
    return tuple(
        Canary(
            prompt=f"The access code of {name} is" if kind == "text" else f"What is the access code of {name}?",
            response=_code(),
            rejected=_code() if kind == "preference" else None,
            repeat=count,
            is_included=bool(secrets.randbits(1)),
        )
        for name, count in zip(sorted(names, key=lambda name: secrets.randbits(64)), counts, strict=True)
    )


def _code() -> str:
    """Return a canary's secret."""
    return code_of([secrets.randbelow(len(LETTERS)) for _ in range(CODE_LETTERS)])


def _baseline(federation: FederationState, client: int) -> str | None:
    standing = read_baseline_record(federation.workspace, baseline_name(client))
    return None if standing is None else sha256(standing.to_bytes())


def _check_written(federation: FederationState, party: Party, planted: Planted) -> None:
    """Raise ConfigError where the tokenizer or the template cannot write the canaries: training could not either."""
    from fedcli.data.encoding import Encoder
    from fedcli.model.loading import load_tokenizer

    train, trusts = federation.head.manifest.train, trusts_code(federation, party)
    folder = find_same_base(federation, party.base_of(federation.config), trust_remote_code=trusts).folder
    tokenizer = load_tokenizer(folder, trust_remote_code=trusts)
    encoder = Encoder(tokenizer, train.template, date=train.date)
    encode_canaries(planted.kind, planted.canaries, encoder, train.max_length)
