"""Studies that are run: killed and gone on with, in one process and in several, and what their cells share."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.federation import adapter_hashes
from support.kills import fork, was_killed
from support.processes import fedcli, run_ok, settings

from fedcli.cli import main
from fedcli.study.folder import StudyFolder
from fedcli.study.plan import cells_of

TINY = ("settings.federation.rounds=2", "settings.train.steps=2", "settings.federation.clients=3")
PATIENCE = 300.0
TITLES = {"local": "local (client 0 alone)"}


def killed_when(work: Callable[[], object], condition: Callable[[], bool]) -> bool:
    """Kill a forked child once a condition holds; return whether it was before its end."""
    child = fork(work)
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
            break
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return was_killed(child)


@pytest.mark.slow
def test_table_4_in_tiny_killed_five_times_has_every_column_and_the_bytes_of_plain_runs(
    tmp_path: Path,
) -> None:
    algorithms = "algorithms=[{name: fedavg, label: FedAvg}, {name: scaffold, label: SCAFFOLD}]"
    options = [*settings(*TINY, algorithms, "eval.limit=9"), "--preset-set", "tiny"]
    run_ok("study", "init", "paper-table-4", "study", *options, cwd=tmp_path)
    study, cells = tmp_path / "study", tmp_path / "study/cells/finance"
    moments = [
        study / "state/finance--seed-0--baselines.json",
        cells / "seed-0/baselines/baselines/alone-0",
        cells / "seed-0/FedAvg/rounds/00001",
        cells / "seed-0/SCAFFOLD/eval/round-00002/tfns@limit=9.json",
        cells / "seed-1/FedAvg/inbox/1",
    ]
    for moment in moments:
        assert not moment.exists()
        assert killed_when(lambda: main(["study", "run", "-s", str(study)]), moment.exists), f"it ended before {moment}"
    result = json.loads(fedcli("study", "run", "--json", cwd=study, timeout=2 * PATIENCE).stdout)
    assert (result["num_cells"], result["num_done"], result["failed"]) == (6, 6, {})

    titles = [f"{name} {of}" for name in ("FPB", "FiQA-SA", "TFNS", "NWGI", "Avg:3", "Avg:4") for of in ("Acc", "F1")]
    table = run_ok_with_hints("study", "table", "--like", "paper-table-4", cwd=study)
    by_row: dict[str, list[str]] = {}
    for score in table["scores"]:
        if score["mean"] is not None:
            assert (score["num_seeds"], score["difference"] is None) == (2, score["row"] == "local")
            by_row.setdefault(score["row"], []).append(score["column"])
    assert by_row == dict.fromkeys(("base", "local", "FedAvg", "SCAFFOLD"), titles)
    assert {path.suffix for path in (study / "tables").iterdir()} == {".md", ".tex", ".csv", ".json"}
    assert "a sample: eval.limit is 9" in (study / "tables/paper-table-4.md").read_text()

    cell, plain = cells_of(StudyFolder(study).study)[2], tmp_path / "plain"  # SCAFFOLD's, made by the plain commands
    fedcli("init", plain, "--preset", cell.setting.preset, *settings(*cell.overrides), cwd=tmp_path)
    run_ok("run", "-w", plain, cwd=tmp_path)
    assert adapter_hashes(plain) == adapter_hashes(study / "cells" / cell.id)

    assert run_ok("study", "run", cwd=study)["num_run"] == 0
    first, second = (cells / f"seed-{seed}/baselines/eval/base/fpb.answers.jsonl" for seed in (0, 1))
    assert first.read_bytes() == second.read_bytes()
    assert len(first.read_bytes().splitlines()) == 9
    kept = [next((cells / f"seed-0/{name}/private/0").glob("tokens-*")) for name in ("baselines", "FedAvg", "SCAFFOLD")]
    assert len({path.stat().st_ino for path in kept}) == 1, "one file of token ids"

    beside = [word for name in ("baselines", "FedAvg", "SCAFFOLD") for word in ("-w", cells / "seed-0" / name)]
    rows = run_ok("eval", "table", "fpb", *beside, cwd=tmp_path)["scores"]
    shown = ["base", "baselines: client 0 alone", "FedAvg: fedavg, round 2", "SCAFFOLD: scaffold, round 2"]
    assert [row["target"] for row in rows if row["metric"] == "accuracy"] == shown
    assert [row["difference"] is None for row in rows if row["metric"] == "accuracy"] == [True, False, False, False]
    assert (
        fedcli("eval", "table", "-w", cells / "seed-0/FedAvg", "-w", cells / "seed-0/FedAvg", cwd=tmp_path).returncode
        == 2
    )

    page = Path(run_ok_with_hints("study", "report", "--like", "paper-table-4", cwd=study)["page"]).read_text()
    shown = {row[0]: row[1:] for row in table_of(page) if len(row) == len(titles) + 3}  # the name, rank and bytes
    for score in table["scores"]:
        if score["mean"] is not None:
            cell = shown[TITLES.get(score["row"], score["row"])][titles.index(score["column"])]
            assert cell == f"{score['mean']:.3f} ± {score['deviation']:.3f}"
    assert "FedAvg, published" in shown

    pictures = run_ok("study", "plot", "--format", "svg", cwd=study)["files"]
    assert [Path(name).name for name in pictures] == ["rounds-finance.svg", "cost-finance.svg"]
    assert all(b"SCAFFOLD" in Path(name).read_bytes() for name in pictures)


def run_ok_with_hints(*arguments: object, cwd: Path) -> dict:
    """Run a command with --json that must succeed, and return its document."""
    done = fedcli(*arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_study_with_workers_goes_on_when_one_dies_and_names_the_cells_that_fail(tmp_path: Path) -> None:
    broken = "{name: fedavg, label: broken, settings: {data.source: nowhere.jsonl, data.format: alpaca}}"
    options = settings(*TINY, f"algorithms=[fedavg, {broken}]", "baselines=[base]", "eval.limit=8")
    run_ok("study", "init", "demo", "study", *options, cwd=tmp_path)
    study = tmp_path / "study"
    child = fork(lambda: os._exit(main(["study", "run", "-s", str(study), "--workers", "2"])))
    lock = study / "state/demo--seed-0--fedavg.lock"

    def holder() -> int | None:
        try:
            return json.loads(lock.read_text())["pid"]
        except (OSError, ValueError):
            return None

    deadline = time.monotonic() + PATIENCE
    while (pid := holder()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (3, 8)
    status = run_ok("study", "status", cwd=study)
    states = {cell["id"]: cell["status"] for cell in status["cells"]}
    assert states == {
        f"demo/seed-{seed}/{label}": "failed" if label == "broken" else "done"
        for seed in (0, 1)
        for label in ("baselines", "fedavg", "broken")
    }
    assert all("nowhere.jsonl" in cell["error"]["message"] for cell in status["cells"] if cell["error"])
    assert len(run_ok_with_hints("study", "table", cwd=study)["scores"]) == 2
    check_report(study)


def check_report(study: Path) -> None:
    """Assert that a study's page has its table's cells, what failed and why, and nothing from elsewhere."""
    table = run_ok_with_hints("study", "table", cwd=study)
    for _ in range(2):  # the second one replaces the first
        written = run_ok_with_hints("study", "report", cwd=study)
        assert [entry.name for entry in (study / "report").iterdir()] == ["report.html"]
    text = Path(written["page"]).read_text()
    for score in table["scores"]:
        assert f">{score['mean']:.3f} ± {score['deviation']:.3f}</td>" in text
    lead = table["scores"][1]
    assert f">{lead['difference']:+.3f} [{lead['difference_low']:+.3f}, {lead['difference_high']:+.3f}]</td>" in text
    assert text.count("nowhere.jsonl") > 2
    assert "2 of 6 cells are not done, 2 of them because they failed" in written["notes"][0]
    assert "eval.every" in written["notes"][1], "one scored round is no curve"
    assert ('id="cost-demo"' in text, 'id="rounds-demo"' in text) == (True, False)
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)|url\((?!#)|<script""", text)
    (study / "mine").mkdir()
    (study / "mine/notes.txt").touch()
    refused = fedcli("study", "report", "-o", "mine", cwd=study)
    assert (refused.returncode, "notes.txt" in refused.stderr) == (4, True)


def table_of(text: str) -> list[list[str]]:
    return [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text, re.S)]


@pytest.mark.slow
def test_a_row_is_the_mean_of_the_clients_own_adapters_where_they_have_them_and_of_the_clusters(tmp_path: Path) -> None:
    ways = (
        "{name: fedavg, label: A, settings: {aggregation.share: [A]}}",
        "{name: fedavg, label: Ditto, settings: {train.personal.name: ditto}}",
        "{name: fedavg, label: Groups, settings: {clusters: {by: groups, groups: {a: [0], b: [1, 2]}}}}",
    )
    options = settings(*TINY, f"algorithms=[{', '.join(ways)}]", "seeds=[0]", "baselines=[base]", "eval.limit=60")
    run_ok("study", "init", "demo", "study", *options, cwd=tmp_path)
    study = tmp_path / "study"
    result = json.loads(fedcli("study", "run", "--json", cwd=study, timeout=PATIENCE).stdout)
    assert result["failed"] == {}

    def scores(label: str) -> dict[str, float]:
        table = run_ok_with_hints("eval", "table", "-w", study / f"cells/demo/seed-0/{label}", cwd=tmp_path)
        return {row["target"]: row["value"] for row in table["scores"] if row["metric"] == "exact_match"}

    of_a, of_ditto, of_groups = map(scores, ("A", "Ditto", "Groups"))
    assert {*of_a} == {f"own-{client}-round-00002" for client in range(3)}
    assert {*of_groups} == {f"cluster-{cluster}-round-00002" for cluster in range(2)}
    own = [value for target, value in of_ditto.items() if target.startswith("own-")]
    expected = {
        "A": sum(of_a.values()) / 3,
        "Ditto": of_ditto["round-00002"],
        "Ditto: own": sum(own) / 3,
        "Groups": sum(of_groups.values()) / 2,
    }
    shown = {row["row"]: row["mean"] for row in run_ok_with_hints("study", "table", cwd=study)["scores"]}
    assert len(own) == 3
    assert {name: shown[name] for name in expected} == pytest.approx(expected)
