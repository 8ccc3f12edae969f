"""A careless operator's keys, umask, links and aliases harm nobody."""

import shutil
import stat
from pathlib import Path

import pytest
from support.federation import ADAPTER, all_take_part, stored_hashes
from support.processes import SMALL, Run, runner, settings, warm

from fedcli import Federation
from fedcli.config.parsing import parse_config, read_document
from fedcli.errors import ConfigError, RequirementError
from fedcli.eval.endpoint import Endpoint
from fedcli.printable import shortened, without_credentials

SECRET = "sk-0123456789abcdefghijkl"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys)


URLS = {
    f"https://{SECRET}@host/v1": "https://***@host/v1",
    f"https://user:{SECRET}@host:8000/v1": "https://***@host:8000/v1",
    f"http://host/v1?api_key={SECRET}&a=b": "http://host/v1?***",
    f"http://host/v1#{SECRET}": "http://host/v1#***",
    f"https://host/{SECRET}/v1": "https://host/***/v1",
    f"HTTPS://user:{SECRET}@host": "HTTPS://***@host",
    "http://localhost:8000/v1": "http://localhost:8000/v1",
    "https://api.openai.com/v1": "https://api.openai.com/v1",
}


@pytest.mark.slow
@pytest.mark.parametrize("url", URLS)
def test_a_key_inside_a_url_is_shown_nowhere(url: str) -> None:
    assert without_credentials(f'judge_url: "{url}" # mine') == f'judge_url: "{URLS[url]}" # mine'
    closed = url.replace("https", "http").replace("HTTPS", "http").replace("api.openai.com", "127.0.0.1:1")
    endpoint = Endpoint("m", closed.replace("host:8000", "127.0.0.1:1").replace("host", "127.0.0.1:1"), max_retries=0)
    with pytest.raises(RequirementError) as caught:
        endpoint.reach()
    assert SECRET not in f"{caught.value.message}{caught.value.hint}"


@pytest.mark.slow
def test_a_report_holds_no_key_of_a_judges_url(small: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small)
    path = small / "fedcli.yaml"
    url = f"http://user:{SECRET}@127.0.0.1:1/{SECRET}?k={SECRET}"
    path.write_text(f"{path.read_text()}\neval: {{every: 1, names: [demo], judge_model: m, judge_url: '{url}'}}\n")
    for command in (["report"], ["status"], ["status", "--json"], ["doctor"], ["run"], ["export", "out"]):
        _, out, err = run(*command)
        assert SECRET not in out + err, command
    told = [file for file in small.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]
    assert told == [path]


LIST = "[{}]".format(", ".join(["x"] * 9))
BOMB = f"a: &a {LIST}\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
ALIASES = {
    "a number": f"{BOMB}train: {{steps: *j}}\n",
    "a name": f"{BOMB}task: *j\n",
    "a section": f"{BOMB}train: *j\n",
    "the algorithm's name": f"{BOMB}algorithm: {{name: *j}}\n",
    "an unknown key": f"zz: 1\n{BOMB}",
    "a list": f"{BOMB}data: {{sources: *j}}\n",
    "a mapping": "a: &a {x: 1}\n" + "".join(
        f"{name}: &{name} {{{', '.join(f'k{n}: *{before}' for n in range(9))}}}\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "itself": "train: &a\n  steps: *a\n",
    "itself in a list": "train: &a [*a]\n",
}  # fmt: skip


@pytest.mark.parametrize("text", ALIASES.values(), ids=ALIASES)
def test_aliases_of_a_short_file_make_no_long_message(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(read_document(text, Path("fedcli.yaml")), Path("fedcli.yaml"))
    assert len(caught.value.message) < 200


NO_YAML = {
    "a number of 5,000 digits": f"federation: {{rounds: {'9' * 5000}}}",
    "a day that is none": "task: 2026-13-45",
    "brackets without end": f"x: {'[' * 100_000}",
    "mappings in each other": "x: " + "{a: " * 50_000,
    "a merge key": "a: &a {x: 1}\nb: {<<: [*a, *a]}",
    "a tag of Python": "x: !!python/object/apply:os.getcwd []",
    "NUL": "x: \0",
    "two documents": "task: sft\n---\ntask: dpo",
    "a key twice": "task: sft\ntask: dpo",
    "a list as a key": "? [1, 2]\n: 3",
    "an alias of nothing": "x: *a",
}


@pytest.mark.parametrize("text", NO_YAML.values(), ids=NO_YAML)
def test_what_is_no_yaml_is_one_short_error(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_document(text, Path("fedcli.yaml"))
    assert "fedcli.yaml is not valid YAML: " in caught.value.message
    assert len(caught.value.message) < 300


LONG = "9" * 5000


@pytest.mark.parametrize(
    "command",
    [
        ["client", "train", "--id", LONG],
        ["client", "train", "--id", f"0,{LONG}"],
        ["client", "status", "--id", LONG],
        ["server", "discard", "--id", LONG],
        ["export", "out", "--round", LONG],
        ["init", "other", "--set", f"federation.rounds={LONG}"],
        ["init", "other", "--set", "task=2026-13-45"],
    ],
)
def test_a_number_that_no_id_or_round_has_is_a_usage_error(small: Path, run: Run, monkeypatch, command: list) -> None:
    monkeypatch.chdir(small)
    code, _, err = run(*command)
    assert (code, "internal error" in err) == (2, False)


def test_a_folder_with_the_name_of_a_round_far_away_keeps_nobody_waiting(small: Path, run: Run) -> None:
    (small / f"rounds/{'9' * 200}").mkdir()
    code, out, _ = run("status", "-w", small)
    assert code == 0
    assert "round      0 of 2, open" in out
    assert run("verify", "-w", small)[0] == 7


@pytest.mark.parametrize("place", ["train: {{steps: {}}}", "task: {}", "algorithm: {{name: {}}}", "train: {}"])
@pytest.mark.parametrize("value", ["x" * 20_000, f"[{'x, ' * 500}]", f"{{? {'x' * 900}}}"])
def test_a_long_value_makes_no_long_message(place: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(read_document(place.format(value), Path("fedcli.yaml")), Path("fedcli.yaml"))
    assert len(caught.value.message) < 5000


def test_a_value_is_shown_as_it_is_where_it_is_short() -> None:
    assert shortened("a") == "'a'"
    assert shortened([1, 2.5, None]) == "[1, 2.5, None]"
    assert len(shortened("x" * 10**6)) < 300


@pytest.mark.parametrize("linked", ["rounds/00001/adapter", "rounds/00001"])
def test_gc_removes_nothing_through_a_link(
    small: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, linked: str
) -> None:
    monkeypatch.chdir(small)
    for _ in range(2):
        all_take_part(small)
        Federation.open(small).server.aggregate()
    outside = Path(shutil.move(small / linked, tmp_path / "outside"))
    (small / linked).symlink_to(outside)
    path = small / "fedcli.yaml"
    path.write_text(f"{path.read_text()}\nretention: {{keep_last: 1}}\n")
    before = stored_hashes(outside)
    code, _, err = run("gc")
    assert code == 4
    assert f"{small / linked} is a symbolic link" in err
    assert stored_hashes(outside) == before
    assert (small / "inbox/1/round-00001" / ADAPTER).is_file()


def test_rows_of_a_simulation_are_for_their_user_alone(small: Path) -> None:
    rows = [*(small / "data").glob("*.jsonl")]
    assert len(rows) == 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in rows} == {0o600}


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o000, 0o007, 0o022, 0o077])
def test_whatever_the_umask_no_other_user_writes_in_a_workspace_or_reads_its_rows(tmp_path: Path, umask: int) -> None:
    for command in (["init", "W", *settings(*SMALL)], ["-w", "W"]):
        words = command if command[0] == "init" else ["run", *command]
        done = warm()(*words, cwd=tmp_path, umask=umask)
        assert done.returncode == 0, done.stderr
    done = warm()("export", "out", "-w", "W", cwd=tmp_path, umask=umask)
    assert done.returncode == 0, done.stderr
    for path in tmp_path.rglob("*"):
        mode = path.lstat().st_mode
        assert not mode & stat.S_IWOTH, path
        if path.suffix == ".jsonl" and path.parent.name == "data":
            assert not mode & 0o077, path
