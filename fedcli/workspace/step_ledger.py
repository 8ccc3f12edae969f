"""steps.jsonl in a party's home: every private step that was made on its rows, whatever came of the update.

A line is written, durably, before the first of its steps is made: what a kill cuts short was charged whole, and a round
that is trained again is charged again. Nothing is charged too little. The ledger is of one party in one workspace; what
the same rows spend in another one stands in that one's.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, ValidationError

from fedcli.errors import IntegrityError
from fedcli.workspace.layout import Home
from fedcli.workspace.publish import PRIVATE_FOLDER_MODE, PRIVATE_MODE, explained, make_folder, sync
from fedcli.workspace.record import Natural, Record, Sha256

PartyUnit: TypeAlias = Literal["row", "group"]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class StepsRecord(Record):
    """Steps that were begun together: those of one round. Unknown keys are of a later version, and change no cost."""

    time: float
    round: Natural
    manifest: Sha256
    """Of the round that was trained on."""
    unit: PartyUnit
    group_by: str | None
    num_units: Annotated[int, Field(ge=1)]
    q: Annotated[float, Field(gt=0, le=1)]
    """How likely each unit is in a step's batch."""
    clip: _Positive
    noise: _Positive
    """The multiplier z: the noise's deviation is z x clip."""
    steps: Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Spent:
    """What a party's rows have spent; `epsilon` is infinite where no finite one holds."""

    unit: PartyUnit
    epsilon: float
    delta: float
    steps: int
    rounds: int
    """Of which one that was trained twice counts once."""
    trainings: int


def charge(home: Home, record: StepsRecord) -> None:
    """Append a line, durably; of a line that a kill cut short, and whose steps were never begun, nothing stays.

    Whoever calls this holds the client's lock.
    """
    line = json.dumps(record.model_dump(mode="json"), sort_keys=True).encode() + b"\n"
    make_folder(home.folder, PRIVATE_FOLDER_MODE)
    with explained(home.steps):
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(home.steps, flags, PRIVATE_MODE)
        try:
            contents = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
            os.ftruncate(descriptor, contents.rfind(b"\n") + 1)
            written = os.write(descriptor, line)
            if written < len(line):
                raise OSError(28, os.strerror(28), str(home.steps))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync(home.folder)


def read_steps(home: Home) -> list[StepsRecord]:
    """Return all lines but a last one that a kill cut short; raise IntegrityError where one is damaged."""
    try:
        contents = home.steps.read_bytes()
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(contents[: contents.rfind(b"\n") + 1].splitlines(), 1):
        try:
            records.append(StepsRecord.model_validate_json(line))
        except ValidationError as error:
            raise IntegrityError(
                f"{home.steps}, line {number}, is no record of private steps: what was spent cannot be told",
                hint="Restore it from a backup. Without it nobody knows what the rows have spent: do not train on them "
                "with this workspace again.",
            ) from error
    return records


def events_of(records: Sequence[StepsRecord]) -> list[tuple[float, float, int]]:
    """Return what an accountant composes: how likely a unit is drawn, the noise multiplier, and the steps."""
    return [(record.q, record.noise, record.steps) for record in records]


def spent(home: Home, delta: float) -> Spent | None:
    """Return what a party's ledger adds up to at a delta; None where no private step was made.

    Raises IntegrityError where it is damaged, or of two units, RequirementError where dp-accounting is missing.
    """
    from fedcli.privacy.accounting import poisson_epsilon

    records = read_steps(home)
    if not records:
        return None
    check_one_unit(home, records, records[-1].unit, records[-1].group_by)
    return Spent(
        unit=records[-1].unit,
        epsilon=poisson_epsilon(events_of(records), delta),
        delta=delta,
        steps=sum(record.steps for record in records),
        rounds=len({record.manifest for record in records}),
        trainings=len(records),
    )


def check_one_unit(home: Home, records: Sequence[StepsRecord], unit: PartyUnit, group_by: str | None) -> None:
    """Raise IntegrityError where steps protected another unit: a row may move a group's gradient by twice the clip."""
    for record in records:
        if (record.unit, record.group_by) != (unit, group_by):
            raise IntegrityError(
                f"{home.steps}: the steps of round {record.round} protected the unit "
                f"{_described(record.unit, record.group_by)}, and now it is {_described(unit, group_by)}: what both "
                "spend together is not known",
                hint="Leave privacy.unit and privacy.group_by as they were, or begin another workspace.",
            )


def _described(unit: PartyUnit, group_by: str | None) -> str:
    return unit if group_by is None else f"{unit} by {group_by}"


def now() -> float:
    """Return the time as a line has it."""
    return round(time.time(), 3)
