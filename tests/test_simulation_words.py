"""No simulation is presented as parties: its words are read in all that is shown of it, and of a joined federation."""

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
from protocol_client import take_part
from support.federation import all_take_part, noisy
from support.processes import Run, runner

from fedcli import Federation
from fedcli.server.create import template_folder

PARTIES = re.compile(
    r"\bpart(y|ies)\b|hospital|institution|participa(nt|te)|organi[sz]ation|own (rows|data)|keep their", re.I
)
SIMULATED = re.compile(r"simulat", re.I)


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Run:
    return runner(capsys)


def plain(page: str) -> str:
    """Return a page's text without fedcli.yaml, which is the user's."""
    without = re.sub(r"<(style|script|pre|svg)\b.*?</\1>", " ", page, flags=re.S)
    return re.sub(r"<[^>]+>", " ", without)


def shown(run: Run, workspace: Path) -> dict[str, str]:
    """Return all that is shown of a federation."""
    texts = {}
    for command in (["status"], ["status", "--json"], ["verify"], ["report"], ["export", workspace.parent / "E"]):
        code, out, err = run(*command, "-w", workspace)
        assert code == 0, err
        texts[" ".join(map(str, command))] = out + err
    texts["page"] = plain((workspace / "report/report.html").read_text())
    texts["card"] = (workspace.parent / "E/README.md").read_text()
    return texts


@pytest.mark.slow
def test_nothing_that_is_shown_of_a_simulation_speaks_of_parties(small: Path, run: Run) -> None:
    said = {"waiting": str(run("server", "aggregate", "-w", small)), "open": str(run("status", "-w", small))}
    all_take_part(small)
    said["merge"] = str(run("server", "aggregate", "-w", small))
    said["run"] = str(run("run", "-w", small))
    (small / "clients/1.json").write_text(  # whoever writes it: a simulation has no parties
        json.dumps({"protocol": 1, "workspace": Federation.open(small).state.identity.id, "client": 1,
                    "data": {"num_rows": 447, "format": "hospital"}})
    )  # fmt: skip
    said |= shown(run, small)
    found = {name: match.group() for name, text in said.items() if (match := PARTIES.search(text))}
    assert found == {}
    for name in ("status", "card", "page"):
        assert SIMULATED.search(said[name]), name
    document = json.loads(said["status --json"])
    assert (document["simulation"], document["joined"]) == (True, [])
    assert "It comes from a simulation: rows were split among 3 simulated clients" in said["card"]


@pytest.mark.slow
def test_nothing_that_is_shown_of_a_joined_federation_speaks_of_a_simulation(tmp_path: Path, run: Run) -> None:
    settings = {"data.source": None, "federation.signatures": "off", "federation.clients": 2, "federation.rounds": 1}
    workspace = Path(Federation.create(tmp_path / "W", preset="demo", settings=settings).path)
    identity = Federation.open(workspace).state.identity.id
    for client in (0, 1):
        card = {"protocol": 1, "workspace": identity, "client": client, "data": {"num_rows": 10}}
        (workspace / f"clients/{client}.json").write_text(json.dumps(card))
        assert take_part(workspace, client, noisy(client), 10)
    assert run("server", "aggregate", "-w", workspace)[0] == 0
    said = shown(run, workspace)
    assert json.loads(said.pop("status --json"))["simulation"] is False
    assert {name: text for name, text in said.items() if SIMULATED.search(text)} == {}
    assert "2 parties trained it together, each on rows of its own" in said["card"]
    assert "joined     clients 0 and 1: parties that keep their rows" in said["status"]


def test_the_pages_of_studies_and_of_each_workspace_leave_parties_to_workspaces_for_parties() -> None:
    study = files("fedcli.report").joinpath("study.html.j2").read_text(encoding="utf-8")
    assert not PARTIES.search(study)
    assert "Each cell is a simulation." in study
    assert "or simulated ones" in (template_folder() / "README.md").read_text()
