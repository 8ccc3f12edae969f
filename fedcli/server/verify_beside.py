"""What `fedcli verify` checks beside rounds and updates: baselines, scores, and what simulated clients keep."""

import itertools
import re
from collections.abc import Callable
from contextlib import suppress

from fedcli.errors import IntegrityError
from fedcli.server.verification import Verification
from fedcli.stores.objects import UnlistableError
from fedcli.workspace.baselines import published_baselines, read_baseline
from fedcli.workspace.client_state import damaged_candidates, kept_states, read_state
from fedcli.workspace.history import Round, read_record
from fedcli.workspace.layout import Workspace
from fedcli.workspace.publish import DISCARDED_PREFIX, TEMPORARY_PREFIX
from fedcli.workspace.scores import ScoreRecord, check_items, score_files


def check_baselines(start: Round, result: Verification) -> None:
    """Every file of a baseline has its hash, and its adapter has the federation's tensors."""
    workspace = start.workspace
    for name in published_baselines(workspace):
        try:
            read_baseline(workspace, name, start.manifest.tensors)
            result.num_baselines += 1
        except IntegrityError as error:
            result.report(workspace.baseline(name), error.message)


def check_scores(workspace: Workspace, result: Verification) -> None:
    """Every record of scores is as it was written, and so are the items that it was made of."""
    for path in score_files(workspace):
        try:
            record = read_record(workspace, ScoreRecord, path)
            if record is not None:
                check_items(workspace, record)
        except IntegrityError as error:
            result.report(path, error.message)


def check_leftovers(workspace: Workspace, result: Verification) -> None:
    """Tell once of what other tools left where several write: half-written files and conflict copies."""
    store = workspace.store
    found = [f"{folder}/{name}" for folder, known in _NAMES.items() for name in store.names(folder) if not known(name)]
    for inbox in store.names("inbox"):
        if inbox.isdecimal() and not store.is_hidden(f"inbox/{inbox}"):
            try:
                found += [f"inbox/{inbox}/{name}" for name in store.names(f"inbox/{inbox}") if not _is_drop(name)]
            except UnlistableError as error:
                result.remark(workspace.root / "inbox" / inbox, error.message)
    found = [name for name in found if not name.rpartition("/")[2].startswith((TEMPORARY_PREFIX, DISCARDED_PREFIX))]
    if found:
        what = "is one name" if len(found) == 1 else f"and {len(found) - 1} more are names"
        result.remark(workspace.root / found[0], f"{what} that nobody reads, such as other tools leave")


def _is_drop(name: str) -> bool:
    return re.fullmatch(r"round-[0-9]{5,}|repair-[0-9]{5,}-0", name) is not None


_NAMES: dict[str, Callable[[str], object]] = {
    "inbox": str.isdecimal,
    "clients": re.compile(r"[0-9]+\.(json|sig|leave|acks)").fullmatch,
    "enrolment": re.compile(r"[0-9]{5,}\.(json|sig)").fullmatch,
}
"""What belongs into folders that several write in."""


def check_private(rounds: list[Round], result: Verification) -> None:
    """What simulated clients keep for the latest round is as they wrote it, and there where they need it."""
    workspace, head = rounds[-1].workspace, rounds[-1]
    with suppress(IntegrityError):  # an algorithm that is not known is told once
        states = kept_states(head.manifest)
        clients = sorted(int(name) for name in workspace.store.names("private") if name.isdecimal()) if states else []
        for client, state in itertools.product(clients, states):
            if workspace.store.is_hidden(f"private/{client}"):
                continue
            damaged = dict(damaged_candidates(workspace.private(client), state))
            for path, problem in damaged.items():
                result.report(path, problem)
            if not damaged and len(rounds) == head.number + 1:
                try:
                    read_state(workspace.private(client), rounds, state, client)
                except IntegrityError as error:
                    result.report(workspace.private(client).folder, error.message)
