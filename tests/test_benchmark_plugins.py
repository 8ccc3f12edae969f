"""A benchmark of another package, which is built and installed beside fedcli: it is known wherever fedcli's own are."""

import json
import subprocess
import textwrap
from pathlib import Path

import pytest
from support.plugins import install, python_path
from support.processes import ENVIRONMENT, command, warm

SOURCE = textwrap.dedent(
    """
    from fedcli.eval.benchmark import Benchmark, ItemScore, Metric
    from fedcli.eval.data import DataSource

    def run(session):
        rows = [row.fields for row in session.files.rows()][: session.options.limit]
        answers = session.model.generate([session.generation(row["text"], 4) for row in rows])
        return [
            ItemScore(str(number), {"length": float(len(answer))}, {"prompt": row["text"], "answer": answer}, row["of"])
            for number, (row, answer) in enumerate(zip(rows, answers, strict=True))
        ]

    TIDES = Benchmark(
        "tides", "How much is said of the tide", ("sea",), (Metric("length", "characters"),), 4, "none",
        DataSource(("tides.jsonl",), "the harbour"), run, takes=("max_new_tokens",),
    )
    """
)
POINTS = {"fedcli.benchmarks": {"tides": "sea_bench:TIDES"}}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("plugin"), "sea-bench", SOURCE, POINTS, version="2.5")


def cold(cwd: Path, *arguments: object, sites: list[Path], code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run fedcli in a new process, to which the installed packages are there from the start."""
    done = subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=ENVIRONMENT | python_path(*sites),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    return done


def test_list_groups_and_near_matches_know_it_and_the_list_names_its_package(site: Path, tmp_path: Path) -> None:
    (entry,) = json.loads(cold(tmp_path, "eval", "list", "--group", "sea", "--json", sites=[site]).stdout)
    assert (entry["name"], entry["package"]) == ("tides", "sea-bench")
    shown = cold(tmp_path, "eval", "list", sites=[site]).stdout
    assert "tides: How much is said of the tide (4 items; sea; from the package sea-bench)\n" in shown
    assert shown.count("from the package") == 1
    error = cold(tmp_path, "eval", "list", "--group", "see", sites=[site], code=2).stderr
    assert "Did you mean sea" in error


@pytest.mark.slow
def test_it_scores_as_fedclis_own_with_its_group_its_clusters_and_its_packages_version(site: Path, small: Path) -> None:
    (small / "rows").mkdir()
    rows = [{"text": f"The tide at {number}", "of": f"day {number // 2}"} for number in range(4)]
    (small / "rows/tides.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = cold(small, "eval", "sea", "--base", "--data", "rows", "--json", sites=[site])
    (record,) = json.loads(done.stdout)["scores"]
    assert record["benchmark"] == "tides"
    assert record["versions"]["sea-bench"] == "2.5"
    items = [json.loads(line) for line in (small / "eval/base/tides.jsonl").read_text().splitlines()]
    assert [item["cluster"] for item in items] == ["day 0", "day 0", "day 1", "day 1"]
    # without the package its scores are still shown
    table = warm()("eval", "table", "--json", cwd=small)
    assert [row["metric"] for row in json.loads(table.stdout)["scores"]] == ["length"]
    error = warm()("eval", "tides", "--base", cwd=small)
    assert (error.returncode, "unknown benchmark 'tides'" in error.stderr) == (2, True)


def test_a_misspelt_name_of_it_is_told(site: Path, small: Path) -> None:
    assert "Did you mean tides" in cold(small, "eval", "tdes", "--base", sites=[site], code=2).stderr


@pytest.mark.parametrize(
    ("name", "source", "points", "told"),
    [
        (
            "more-sea",
            SOURCE,
            {"tides": "more_sea:TIDES"},
            "two packages give 'tides' in fedcli.benchmarks: more-sea and",
        ),
        (
            "more-hhh",
            SOURCE,
            {"hhh": "more_hhh:TIDES"},
            "two packages give 'hhh' in fedcli.benchmarks: fedcli and more-hhh",
        ),
    ],
)
def test_a_name_that_two_packages_give_is_an_error_that_names_them(
    site: Path, tmp_path: Path, name: str, source: str, points: dict[str, str], told: str
) -> None:
    other = install(tmp_path, name, source, {"fedcli.benchmarks": points})
    done = cold(tmp_path, "eval", "list", sites=[site, other], code=8)
    assert told in done.stderr
    assert "pip uninstall" in done.stderr
    assert "warning" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "source", "points", "told"),
    [
        (
            "odd-name",
            SOURCE,
            {"ebb": "odd_name:TIDES"},
            "'ebb' of the package odd-name cannot be loaded: ValueError: the",
        ),
        ("no-bench", "X = 3", {"ebb": "no_bench:X"}, "no-bench cannot be loaded: ValueError: it is no Benchmark"),
        ("broken", "import nothing_such", {"ebb": "broken:X"}, "broken cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_loaded_is_an_error_for_its_name_and_elsewhere_a_line_that_names_its_package(
    site: Path, small: Path, tmp_path: Path, name: str, source: str, points: dict[str, str], told: str
) -> None:
    sites = [site, install(tmp_path, name, source, {"fedcli.benchmarks": points})]
    listed = cold(tmp_path, "eval", "list", "--json", sites=sites)
    assert {"tides", "hhh"} < {entry["name"] for entry in json.loads(listed.stdout)}
    (line,) = listed.stderr.splitlines()
    assert line.startswith("fedcli: warning: ")
    assert told in line
    asked = cold(small, "eval", "ebb", "--base", sites=sites, code=8)
    assert told in asked.stderr
    assert "pip uninstall" in asked.stderr
