"""Names of what is scored, and that adapters are read when it is their turn."""

import gc
import shutil
from pathlib import Path

import numpy as np
import pytest
from protocol_client import take_part

from fedcli import Federation
from fedcli.errors import NotReadyError, UsageError
from fedcli.scoring.targets import Targets, find_targets
from fedcli.workspace.inbox import Update
from fedcli.workspace.target_name import TargetName

NAMES = {
    "base": ("base", None),
    "alone-3": ("alone", 3),
    "alone-12": ("alone", 12),
    "pooled": ("pooled", None),
    "client-3-round-00010": ("client", None),
    "own-3-round-00010": ("own", None),
    "round-00009": ("round", 9),
    "round-00010": ("round", 10),
    "adapter-round-1-0123abcd": ("adapter", None),
    "model-7": ("model", None),
    "api-gpt-4": ("api", None),
    "else": ("else", None),
}
"""In the order of a table."""


def test_a_targets_name_says_its_kind_and_number_and_where_it_stands() -> None:
    for text, (kind, number) in NAMES.items():
        name = TargetName.parse(text)
        assert (str(name), name.kind, name.number) == (text, kind, number)
    mixed = ["round-00010", *(text for text in NAMES if text != "round-00010")]
    assert sorted(mixed, key=lambda text: TargetName.parse(text).order) == list(NAMES)
    assert TargetName.of_round(10) == TargetName.parse("round-00010")
    assert TargetName.of_update(3, 10) == TargetName.parse("client-3-round-00010")
    own = TargetName.of_own(3, 10)
    assert (own, own.client, own.round) == (TargetName.parse("own-3-round-00010"), 3, 10)


def test_a_round_is_named_by_its_number_or_as_the_latest(small: Path) -> None:
    assert [Federation.open(small).round(name).number for name in ("latest", "0", "00")] == [0, 0, 0]
    for name in ("last", "-1", "1.0", "", "\u00b2", "\u0663"):
        with pytest.raises(UsageError, match="no such round"):
            Federation.open(small).round(name)
    with pytest.raises(NotReadyError, match="there is no round 7 yet: the latest is 0"):
        Federation.open(small).round("7")


def living_updates() -> int:
    gc.collect()
    return sum(type(found) is Update for found in gc.get_objects())


def test_of_many_clients_one_update_is_in_memory_at_a_time(small: Path) -> None:
    for client in range(3):
        take_part(small, client, lambda array, gain=client: array + gain)
    targets = find_targets(Federation.open(small).state, Targets(clients=(0, 1, 2)))
    assert [target.name for target in targets] == [f"client-{client}-round-00000" for client in range(3)]
    assert living_updates() == 0
    read = [{name: array.copy() for name, array in target.arrays().items()} for target in targets]
    assert living_updates() == 0
    assert all(not np.array_equal(read[0][name], read[1][name]) for name in read[0])


def test_an_update_that_changes_before_its_turn_is_told(small: Path) -> None:
    take_part(small, 0)
    (target,) = find_targets(Federation.open(small).state, Targets(clients=(0,)))
    shutil.rmtree(small / "inbox/0/round-00000")
    with pytest.raises(NotReadyError, match="client 0's update of round 0 is no longer what it was"):
        target.arrays()
