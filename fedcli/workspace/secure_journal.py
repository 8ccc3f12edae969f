"""What a party did in a round of secure aggregation: kept durably before anybody sees it, so that it is done once."""

from pathlib import Path

import numpy as np

from fedcli.errors import IntegrityError
from fedcli.secure_aggregation.fixed_point import Ring
from fedcli.workspace.layout import Home, update_name
from fedcli.workspace.parsing import parse_record, sealed
from fedcli.workspace.publish import PRIVATE_MODE, publish_file, remove_temporaries
from fedcli.workspace.read import read_file
from fedcli.workspace.record import Id, Natural, Record, Sha256
from fedcli.workspace.records import FileEntry, file_entry
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.secure_records import Hex

_MAX_BYTES = 2**27


class Journal(Record):
    """One round: what was masked how, and the one repair that was answered."""

    workspace: str
    round: Natural
    attempt: Sha256
    """Of attempts/round-n-a.json."""
    values: FileEntry
    """The numbers before they are masked."""
    update: str
    """update.json, as it was and will be sent."""
    shares: str | None
    """shares.json, the same."""
    seeds: dict[Id, Hex]
    own: Hex | None
    unlock: dict[Id, Hex]
    """What opens the shares of others, by the one who sealed them; the party's keys may be others by then."""
    answered: Sha256 | None = None
    """Of repair/round-n-a.json: no other of this round is ever answered."""


def read_journal(home: Home, number: int, workspace: str) -> Journal | None:
    """Read what a party did in a round; None where it has masked nothing. Raises IntegrityError where it is damaged."""
    path = home.masked(number)
    try:
        contents = read_file(path, limit=_MAX_BYTES)
    except FileNotFoundError:
        return None
    except Refusal as refusal:
        raise _damaged(path, refusal.reason) from refusal
    journal = parse_record(Journal, contents, path)
    if (journal.workspace, journal.round) != (workspace, number):
        raise _damaged(path, "it is of another workspace or round")
    return journal


def write_journal(home: Home, journal: Journal) -> None:
    """Keep a journal, durably."""
    publish_file(home.masked(journal.round), sealed(journal), mode=PRIVATE_MODE)


def save_values(home: Home, number: int, numbers: Ring) -> FileEntry:
    """Keep the numbers that will be masked, durably; they mean nothing before a journal names them."""
    contents = numbers.view(np.uint8).data
    publish_file(home.values(number), contents, mode=PRIVATE_MODE)
    return file_entry(contents)


def read_values(home: Home, journal: Journal) -> Ring:
    """Return the numbers that a journal names, to be masked in place; raise IntegrityError where they are others."""
    path = home.values(journal.round)
    try:
        contents = read_file(path, limit=journal.values.bytes)
    except (FileNotFoundError, Refusal) as error:
        raise _damaged(path, str(error)) from error
    if file_entry(contents) != journal.values:
        raise _damaged(path, "its hash differs")
    return np.frombuffer(bytearray(contents), "<u8")


def forget_rounds(home: Home, before: int) -> None:
    """Remove what a party kept of rounds that have closed."""
    folder = home.masked(0).parent
    if not folder.is_dir():
        return
    remove_temporaries(folder)
    for path in folder.glob("round-*"):
        if path.name < update_name(before):
            path.unlink(missing_ok=True)


def _damaged(path: Path, problem: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is gone or damaged: {problem}",
        hint="Restore it from a backup. Without it this party sits the round out: other numbers under the same masks "
        "would tell the server both.",
    )
