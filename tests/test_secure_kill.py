"""SIGKILL at every system call of every step of a masked round: nothing is lost, and nothing is revealed twice."""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from support.kills import copies_killed_at_every_call
from support.secure import ROWS, Party, differences, journal, make, merge, visit

from fedcli import Federation
from fedcli.errors import NotReadyError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["pairwise", "double"])
def enrolled(request: pytest.FixtureRequest, small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four enrolled parties of one round."""
    return make(small_template, tmp_path_factory.mktemp(f"killed-{request.param}"), request.param, 4, rounds=1)


def seen(workspace: Path) -> dict[str, bytes]:
    """Return all that clients have shown of a round: masked numbers, sealed shares, answers."""
    names = ("masked.safetensors", "shares.json", "answer.json", "update.json")
    return {
        f"{path.parts[-3]}/{path.name}": path.read_bytes()
        for path in workspace.glob("inbox/*/*/*")
        if path.name in names
    }


STRIDE = int(os.environ.get("FEDCLI_KILL_STRIDE", "7"))
"""Every so many calls; 1 takes half an hour."""
STEPS = ("drop", "repair", "answer", "merge")


def reach(workspace: Path, step: str) -> None:
    """Do all that comes before a step: client 2 never comes."""
    visit(workspace, *([1, 3] if step == "drop" else [0, 1, 3]))
    if step in ("answer", "merge"):
        with pytest.raises(NotReadyError):
            merge(workspace, partial=True)
        visit(workspace, *([1, 3] if step == "answer" else [0, 1, 3]))


def work(folder: Path, step: str) -> None:
    """Do a step."""
    os.environ["XDG_DATA_HOME"] = str(folder / "data")
    if step in ("drop", "answer"):
        visit(folder / "W", 0)
    else:
        with suppress(NotReadyError):
            merge(folder / "W", partial=True)


def finish(workspace: Path) -> None:
    """Let everybody come by until the round is merged."""
    for _ in range(3):
        visit(workspace, 0, 1, 3)
        with suppress(NotReadyError):
            merge(workspace, partial=True)
        if Federation.open(workspace).round().number:
            return


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_every_call_the_same_sum_comes_of_it_and_each_client_shows_one_update_and_one_answer(
    enrolled: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fedcli-secure-", dir=memory) as folder:
        template = Path(shutil.copytree(enrolled, Path(folder) / "P"))
        monkeypatch.setenv("XDG_DATA_HOME", str(template / "data"))
        mean = sum(ROWS[each] * flat(differences(template / "W", each)) for each in (0, 1, 3)) / sum(
            ROWS[each] for each in (0, 1, 3)
        )
        before = flat(Federation.open(template / "W").round(0).adapter())
        reach(template / "W", step)
        kills, after = 0, step in ("repair", "answer")
        for killed in copies_killed_at_every_call(template, lambda place: work(place, step), after, STRIDE):
            kills += 1
            monkeypatch.setenv("XDG_DATA_HOME", str(killed / "data"))
            workspace = killed / "W"
            shown, kept = seen(workspace), read_journal(workspace)
            Party.trained = 0
            finish(workspace)
            now = seen(workspace)
            for name, contents in shown.items():  # of what was half-written, too
                assert now[name].startswith(contents), f"{name}: what was shown once is never shown otherwise"
            if kept is not None:
                assert Party.trained == 0, "what was trained is not trained again"
                assert journal(workspace, 0)["update"].encode() == now["0/update.json"]
                assert kept["answered"] in (None, journal(workspace, 0)["answered"])
            after_all = flat(Federation.open(workspace).round(1).adapter())
            assert abs(after_all - before - mean).max() < 2.0**-24
            if kills % 5 == 0:
                assert Federation.open(workspace).verify().violations == []
        assert kills > 20 // STRIDE


def flat(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([arrays[name].reshape(-1).astype(np.float64) for name in sorted(arrays)])


def read_journal(workspace: Path) -> dict | None:
    try:
        return journal(workspace, 0)
    except FileNotFoundError:
        return None
