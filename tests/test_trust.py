"""What a workspace of somebody else may not do to a party: run code, have other rows trained, name paths."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support import processes
from support.processes import ENVIRONMENT, SMALL, fedcli, run_ok, settings
from support.warm import Place, Warm

BUILTIN = Path(__file__).parents[1] / "fedcli/model/builtin/tiny"

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).touch()
class Config(LlamaConfig):
    pass
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture(scope="session")
def warm() -> Warm:
    return processes.warm()


@pytest.fixture
def place(tmp_path: Path, warm: Warm) -> Place:
    """A workspace for parties whose base model comes with code, which its fedcli.yaml trusts."""
    place = Place(tmp_path, warm)
    base = Path(shutil.copytree(BUILTIN, tmp_path / "base"))
    config = json.loads((base / "config.json").read_bytes())
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (base / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    (base / "own.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    place(
        "init",
        "W",
        *settings(
            *SMALL,
            "data.source=null",
            "federation.signatures=off",
            f"model.base={base}",
            "model.trust_remote_code=false",
        ),
    )
    path = place.workspace / "fedcli.yaml"
    path.write_text(path.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    assert "trust_remote_code: true" in path.read_text()
    return place


def ran(place: Place) -> bool:
    return (place.folder / "mark").exists()


def give_away(place: Place, *names: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")
    for name in names:
        os.chown(place.workspace / name, 12_345, -1)


@pytest.mark.slow
def test_fedcli_yaml_decides_for_its_own_user_who_has_not_joined(place: Place) -> None:
    place("doctor")
    assert ran(place)


@pytest.mark.parametrize("name", ["fedcli.yaml", pytest.param("workspace.json", marks=pytest.mark.slow)])
def test_fedcli_yaml_of_another_user_lets_no_code_run(place: Place, name: str) -> None:
    give_away(place, name)
    place("doctor")
    place("export", "out", "--merge")
    assert not ran(place)


@pytest.mark.slow
@pytest.mark.parametrize("at_default", [True, False])
def test_code_runs_for_a_party_only_where_it_said_so(place: Place, at_default: bool) -> None:
    rows = place.rows("rows.jsonl", 6)
    where = [] if at_default else ["--home", "H0"]
    place.join(0, rows, at_default=at_default)
    place("doctor")
    place("export", "out", "--merge")
    place("data", "preview", "--id", 0, *where)
    place("client", "train", "--id", 0, *where)
    place("train-alone", "--id", 0, *where)
    assert not ran(place)
    (place.workspace / "clients/0.json").unlink()  # whoever owns the workspace can
    place("doctor")
    assert not ran(place)


@pytest.mark.slow
def test_a_party_that_trusts_the_code_has_it_run(place: Place) -> None:
    path = place.workspace / "fedcli.yaml"
    path.write_text(path.read_text().replace("trust_remote_code: true", "trust_remote_code: false"))
    place("doctor")
    assert not ran(place)
    place.join(0, place.rows("rows.jsonl", 6), "--trust-remote-code", "--share", "minimal", at_default=True)
    place("doctor")
    assert ran(place)


@pytest.mark.parametrize("claims", [None, *(pytest.param(claim, marks=pytest.mark.slow) for claim in (False, True))])
@pytest.mark.parametrize("which", [["--id", 0], ["--any"], pytest.param(["--id", "0,1"], marks=pytest.mark.slow)])
def test_a_party_whose_registration_is_gone_trains_no_simulated_rows(
    place: Place, which: list[object], claims: bool | None
) -> None:
    place.join(0, place.rows("rows.jsonl", 6), at_default=True)
    (place.workspace / "clients/0.json").unlink()
    (place.workspace / "data").mkdir()
    for client in (0, 1):
        shutil.copy(place.rows("other.jsonl", 5), place.workspace / f"data/client-{client}.jsonl")
    path = place.workspace / "workspace.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"simulation": claims}))
    error = place("client", "train", *which, code=7).stderr
    assert f"client 0 has joined from here, and {place.workspace}/clients/0.json is gone" in error
    assert not (place.workspace / "inbox/0").exists() or not list((place.workspace / "inbox/0").iterdir())
    assert not ran(place)
    if which == ["--any"]:
        assert not (place.workspace / "inbox/1").exists()


def test_a_workspace_says_whether_it_is_a_simulation_and_no_party_joins_one(warm: Warm, tmp_path: Path) -> None:
    place = Place(tmp_path, warm)
    place("init", "W", *settings(*SMALL))
    path = place.workspace / "workspace.json"
    identity = json.loads(path.read_bytes())
    assert identity["simulation"] is True
    (place.workspace / "data/client-1.jsonl").unlink()
    assert "is a simulation, which no party joins" in place.join(1, place.rows("rows.jsonl", 6), code=3).stderr
    del identity["simulation"]  # as versions before wrote it
    path.write_text(json.dumps(identity))
    place("client", "train", "--id", 0)


def test_any_trains_no_simulated_client_of_another_users_workspace(warm: Warm, tmp_path: Path) -> None:
    place = Place(tmp_path, warm)
    place("init", "W", *settings(*SMALL))
    give_away(place, "workspace.json")
    done = place("client", "train", "--any", "--json")
    assert json.loads(done.stdout) == {"status": "nothing_due", "clients": []}


def test_rows_that_are_put_into_a_workspace_for_parties_are_not_trained(place: Place) -> None:
    (place.workspace / "data").mkdir()
    shutil.copy(place.rows("rows.jsonl", 6), place.workspace / "data/client-0.jsonl")
    error = place("client", "train", "--id", 0, code=3).stderr
    assert "client 0 has no rows: it has not joined, and this is no simulation" in error
    assert json.loads(place("client", "train", "--any", "--json").stdout)["status"] == "nothing_due"
    config = place.workspace / "fedcli.yaml"
    config.write_text(config.read_text().replace("source: null", "source: builtin:demo"))
    assert "made without rows" in place("data", "partition", code=4).stderr


@pytest.mark.parametrize("name", ["/tmp/x", "../../x", "a/b", ".", "..", "", "A", "a\n", "a" * 65, "é"])
def test_an_id_that_could_be_a_path_is_refused(small: Path, name: str) -> None:
    for path in (small / "workspace.json", small / "rounds/00000/manifest.json"):
        document = json.loads(path.read_bytes())
        document["id" if path.name == "workspace.json" else "workspace"] = name
        path.write_text(json.dumps(document))
    for line in (["client", "train", "--any"], ["client", "join", "--id", "0", "--data", "x"], ["status"], ["verify"]):
        done = fedcli(*line, cwd=small)
        assert done.returncode == 7, (line, done.stderr)


def test_a_module_in_the_workspace_is_not_what_a_job_of_slurm_runs(small: Path, tmp_path: Path) -> None:
    for name in ("typer", "yaml", "torch", "fedcli", "json"):
        (small / f"{name}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nraise SystemExit(99)\n")
    for path in run_ok("slurm", "script", cwd=small)["scripts"].values():
        environment = ENVIRONMENT | {"SLURM_ARRAY_TASK_ID": "9", "PATH": f"{tmp_path}:/usr/bin:/bin"}
        done = subprocess.run(["bash", path], cwd=small, env=environment, capture_output=True, text=True)
        assert done.returncode in (2, 8), done.stderr  # there is no client 9, and no SLURM
    assert not (tmp_path / "mark").exists()
