"""The records of secure aggregation: attempts, masked updates, repairs and answers (docs/PROTOCOL.md)."""

import math
from typing import Annotated, Literal

from pydantic import Field

from fedcli.secure_aggregation.terms import Mode
from fedcli.workspace.privacy_records import PrivacyClaim
from fedcli.workspace.record import Id, Natural, Record, Sha256
from fedcli.workspace.records import EnrolmentHead, FileEntry, Manifest, TensorEntry
from fedcli.workspace.tensors import header_of

ANSWER_RECORD = "answer.json"
ANSWER_SIGNATURE = "answer.sig"
WEIGHT = "weight"
"""The tensor of a masked update that holds its weight: one number."""

Hex = Annotated[str, Field(pattern="^([0-9a-f]{2})*$", max_length=184)]
"""A seed, a share, or a sealed share, which is the longest."""


class AttemptRecord(Record):
    """attempts/round-n-a.json: who takes part, under the keys that an entry of the enrolment gives them."""

    arrives = True
    protocol: Literal[1] = 1
    workspace: str
    round: Natural
    attempt: Natural
    base: Sha256
    """Of the round's manifest.json."""
    mode: Mode
    cohort: list[Natural]
    enrolment: EnrolmentHead


class RepairRecord(Record):
    """repair/round-n-a.json: whose updates are summed, by the hashes of their update.json, and who is missing."""

    arrives = True
    protocol: Literal[1] = 1
    workspace: str
    round: Natural
    attempt: Natural
    base: Sha256
    started: Sha256
    """Of attempts/round-n-a.json."""
    counted: dict[Id, Sha256]
    dropped: list[Natural]
    shares: FileEntry | None = None
    """Of repair/round-n-a-shares-HASH.json; None with `pairwise`."""

    @property
    def clients(self) -> list[int]:
        """Those counted."""
        return sorted(map(int, self.counted))


class AnswerRecord(Record):
    """answer.json: what a client reveals in a repair."""

    protocol: Literal[1] = 1
    workspace: str
    round: Natural
    attempt: Natural
    client: Natural
    repair: Sha256
    """Of repair/round-n-a.json."""
    seeds: dict[Id, Hex] = Field(default_factory=dict)
    shares: dict[Id, dict[str, Hex]] = Field(default_factory=dict)


class MaskedUpdate(Record):
    """update.json of a masked update: nothing of rows or losses."""

    protocol: int
    workspace: str
    round: int
    base: str
    client: int
    attempt: int
    started: Sha256
    """Of attempts/round-n-a.json."""
    commitments: dict[str, Sha256]
    """Of the masks' secrets: by the other client, and `self`."""
    files: dict[str, FileEntry]
    privacy: PrivacyClaim | None = None


class SharesFile(Record):
    """Sealed shares, in hex: by what they are of and receiver."""

    sealed: dict[str, dict[Id, Hex]]


class RepairShares(Record):
    """Those of several clients that a repair opens, by the one who sealed them."""

    sealed: dict[Id, dict[str, dict[Id, Hex]]]


def masked_schema(manifest: Manifest) -> dict[str, TensorEntry]:
    """Return the tensors of a masked update in the order in which its numbers lie: each file's, and the weight."""
    found = {f"{file}/{name}": entry for file in manifest.update_files for name, entry in manifest.sent_tensors.items()}
    found[WEIGHT] = TensorEntry(shape=(1,), dtype="F32")
    return dict(sorted(found.items()))


def masked_header(manifest: Manifest) -> bytes:
    """Return what stands before a masked update's numbers."""
    return header_of({name: entry.shape for name, entry in masked_schema(manifest).items()})


def num_masked(manifest: Manifest) -> int:
    """Return how many numbers a masked update has."""
    return sum(math.prod(entry.shape) for entry in masked_schema(manifest).values())
