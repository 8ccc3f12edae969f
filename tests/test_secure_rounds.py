"""Rounds of secure aggregation: the sum is the plain one, and nothing else is ever known to the server."""

from pathlib import Path

import numpy as np
import pytest
from support.secure import ROWS, differences, make, merge, used, visit

from fedcli import Federation
from fedcli.errors import NotReadyError


@pytest.fixture(scope="session")
def pairwise(small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(small_template, tmp_path_factory.mktemp("pairwise"), "pairwise")


@pytest.fixture(scope="session")
def double(small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(small_template, tmp_path_factory.mktemp("double"), "double", 4)


def weighted_mean(workspace: Path, clients) -> dict[str, np.ndarray]:
    """Return the plain mean of what these clients' trainings add, by their rows."""
    total = sum(ROWS[client] for client in clients)
    found = [(ROWS[client], differences(workspace, client)) for client in clients]
    return {name: sum(rows * each[name] for rows, each in found) / total for name in found[0][1]}


def check_mean(workspace: Path, number: int, mean: dict[str, np.ndarray]) -> None:
    federation = Federation.open(workspace)
    before, after = federation.round(number - 1).adapter(), federation.round(number).adapter()
    for name, array in mean.items():
        assert np.array_equal(after[name], (before[name] + array).astype(np.float32)) or (
            abs(after[name] - before[name] - array).max() < 2**-22
        )


def test_without_drop_outs_a_pairwise_round_takes_one_visit(pairwise: Path, tmp_path: Path, monkeypatch) -> None:
    place = used(pairwise, tmp_path, monkeypatch)
    mean = weighted_mean(place, range(3))
    assert visit(place, 0, 1, 2) == ["submitted"] * 3
    assert visit(place, 0) == ["already_submitted"]
    assert merge(place).status == "published"
    check_mean(place, 1, mean)
    assert visit(place, 0, 1, 2) == ["submitted"] * 3
    assert merge(place).state == "finished"
    done = Federation.open(place).verify()
    assert done.violations == []


def test_a_double_round(double: Path, tmp_path: Path, monkeypatch) -> None:
    place = used(double, tmp_path, monkeypatch)
    mean = weighted_mean(place, (0, 1, 3))
    assert visit(place, 0, 1, 3) == ["submitted"] * 3
    with pytest.raises(NotReadyError, match="answers"):
        merge(place, partial=True)
    assert visit(place, 2) == ["too_late"]
    assert visit(place, 0, 1, 3) == ["answered"] * 3
    assert merge(place).status == "published"
    check_mean(place, 1, mean)
