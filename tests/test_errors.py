"""The mistakes a user makes and the accidents that happen: exit codes, messages that name the cure, nothing broken.

Most run `main` in this process, which loads torch once; disks, limits and signals meet real processes.
"""

import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from support.processes import ENVIRONMENT, SMALL, command, fedcli, settings

from fedcli.cli import main
from fedcli.model.base import find_base

Run = Callable[..., tuple[int, str, str]]

ONE = (*SMALL, "federation.clients=2", "federation.per_round=1")
"""Settings of a federation whose rounds need one update."""


@pytest.fixture
def run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a command in this process, in an empty folder; return exit code, stdout and stderr."""
    monkeypatch.delenv("FEDCLI_WORKSPACE", raising=False)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    def run_main(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return run_main


@pytest.fixture
def refused(run: Run) -> Callable[..., None]:
    """Run a command that must fail, plain and with --json, and check all that an error owes to its reader."""

    def check(code: int, arguments: list[object], *named: object) -> None:
        found, out, err = run(*arguments)
        assert (found, out) == (code, ""), err
        check_message(err, *named)
        found, out, _ = run(*arguments, "--json")
        error = json.loads(out)["error"]
        assert (found, error["exit_code"]) == (code, code)
        assert err == f"fedcli: error: {error['message']}\n  {error['hint']}\n"

    return check


def check_message(err: str, *named: object) -> None:
    assert err.startswith("fedcli: error: ")
    assert "Traceback" not in err
    for part in named:
        assert str(part) in err


def edit(folder: Path, section: str, key: str, value: object) -> None:
    path = folder / "fedcli.yaml"
    document = yaml.safe_load(path.read_text())
    document.setdefault(section, {})[key] = value
    path.write_text(yaml.safe_dump(document))


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file of a workspace but its locks, which name their last holder."""
    files = (path for path in folder.rglob("*") if path.is_file() and "lock" not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def temporaries(folder: Path) -> list[Path]:
    return list(folder.rglob(".tmp-*"))


# Where, what and who


@pytest.mark.parametrize(
    "arguments",
    [["status"], ["verify"], ["run"], ["client", "train", "--id", 0], ["server", "aggregate"], ["eval", "demo"]],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_a_command_outside_a_workspace_says_how_to_make_one(
    refused: Callable[..., None], tmp_path: Path, arguments: list[object]
) -> None:
    refused(4, arguments, "no workspace here", tmp_path / "empty", "fedcli init", "--workspace DIR")
    refused(4, [*arguments, "-w", tmp_path], f"{tmp_path} is not a workspace", f"fedcli init {tmp_path}")
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize("arguments", [["status"], ["client", "train", "--id", 0], ["server", "aggregate"], ["verify"]])
def test_a_workspace_that_is_not_initialised_says_so(
    refused: Callable[..., None], tmp_path: Path, arguments: list[object]
) -> None:
    (tmp_path / "fedcli.yaml").write_text("task: sft\n")
    refused(4, [*arguments, "-w", tmp_path], "not initialised yet", f"Run `fedcli init {tmp_path}`")


@pytest.mark.parametrize(
    ("section", "key", "value", "fault"),
    [
        ("train", "stepz", 3, "train.stepz: unknown key. Did you mean steps?"),
        ("algorithm", "name", "fedagv", "algorithm.name: unknown algorithm 'fedagv'. Did you mean fedavg or fedavgm?"),
        ("adapter", "rank", 8, "adapter.rank: was 4, is now 8"),
    ],
)
def test_a_fault_in_fedcli_yaml_names_file_key_and_cure(
    refused: Callable[..., None], small: Path, section: str, key: str, value: object, fault: str
) -> None:
    edit(small, section, key, value)
    before = tree(small)
    for arguments in (["client", "train", "--id", 0], ["server", "aggregate"], ["run"]):
        refused(3, [*arguments, "-w", small], small / "fedcli.yaml", fault)
    assert tree(small) == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["init", "--preset", "dem"], ["unknown preset 'dem'", "Did you mean demo?"]),
        (["init", "--set", "train.steps"], ["--set 'train.steps'", "key.path=value"]),
        (["client", "train", "--id", 3], ["there is no client 3", "3 clients, ids 0 to 2"]),
        (["client", "status", "--id", -1], ["there is no client -1", "ids 0 to 2"]),
        (["train-alone", "--id", 3], ["there is no client 3", "ids 0 to 2"]),
        (
            ["server", "aggregate", "--algo", "fedagv"],
            ["unknown algorithm 'fedagv'", "Did you mean fedavg or fedavgm?"],
        ),
        (["eval", "dmo"], ["unknown benchmark 'dmo'", "demo"]),
        (["eval", "demo", "--split", "tets"], ["unknown split 'tets'", "Did you mean test?"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value[0], str) else None,
)
def test_what_does_not_exist_is_a_usage_error(
    refused: Callable[..., None],
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[object],
    named: list[str],
) -> None:
    before = tree(small)
    if arguments[0] != "init":
        monkeypatch.setenv("FEDCLI_WORKSPACE", str(small))
    refused(2, arguments, *named)
    assert tree(small) == before
    assert list(Path.cwd().iterdir()) == []


def test_a_fault_of_a_setting_names_the_option_and_no_file(refused: Callable[..., None], tmp_path: Path) -> None:
    given = ("init", tmp_path / "w", "--set", "train.stepz=3")
    refused(3, given, "--set train.stepz=3 has 1 fault", "train.stepz: unknown key. Did you mean steps?")
    refused(3, ("study", "init", "demo", tmp_path / "s", "--set", "seedz=[1]"), "--set seedz=[1] has 1 fault")


def test_discarding_for_a_client_that_does_not_exist_is_a_usage_error(
    refused: Callable[..., None], small: Path
) -> None:
    refused(2, ["server", "discard", "--id", 9, "-w", small], "there is no client 9", "ids 0 to 2")


@pytest.mark.parametrize(
    ("arguments", "reason", "help_of"),
    [
        (["client", "status"], "Missing option '--id'", "fedcli client status"),
        (["client", "status", "--id", "x"], "Invalid value for '--id'", "fedcli client status"),
        (["stats"], "No such command 'stats'", "fedcli"),
        (["run", "--x"], "No such option: --x", "fedcli run"),
    ],
)
def test_a_malformed_command_line_is_one_json_document_with_its_reason(
    run: Run, arguments: list[object], reason: str, help_of: str
) -> None:
    code, out, err = run(*arguments, "--json")
    assert code == 2
    assert "Usage: fedcli" in err
    assert ("Examples:" in err) == (help_of != "fedcli")
    error = json.loads(out)["error"]
    assert error["exit_code"] == 2
    assert error["message"].startswith(reason)
    assert error["hint"].startswith(f"See `{help_of}")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a"), 4, "cannot use /a: No such file"),
        (PermissionError(errno.EACCES, "Permission denied", b"/a"), 4, "cannot use /a: Permission denied"),
        (OSError(errno.ETIMEDOUT, "Connection timed out", "/nfs/a"), 4, "cannot use /nfs/a: Connection timed out"),
        (OSError(errno.ETIMEDOUT, "Connection timed out"), 4, "this machine or its disk fails: Connection timed out"),
        (OSError(errno.ENOTCONN, "Transport endpoint is not connected"), 4, "this machine or its disk fails"),
        (OSError(errno.EIO, "Input/output error"), 4, "this machine or its disk fails: Input/output error"),
        (OSError(errno.EMFILE, "Too many open files"), 4, "this machine or its disk fails: Too many open files"),
        (OSError("no message of the system's"), 4, "this machine or its disk fails: no message of the system's"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 8, "out of memory: Cannot allocate memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory", "/a"), 8, "out of memory: Cannot allocate memory"),
        (TimeoutError("timed out"), 8, "the network fails: timed out"),
        (TimeoutError(), 8, "the network fails: TimeoutError"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 8, "the network fails: Connection reset"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), 8, "the network fails: Network is unreachable"),
        (socket.gaierror(-2, "Name or service not known"), 8, "the network fails: Name or service not known"),
    ],
)
def test_an_error_of_the_system_is_explained_by_what_it_is(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: OSError, code: int, message: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("fedcli.commands.options.find_workspace", fail)
    found, _, err = run("status", "-w", tmp_path)
    assert found == code
    assert message in err
    assert "None" not in err


def test_debug_shows_where_an_error_came_from(run: Run) -> None:
    code, out, err = run("status", "--debug")
    assert (code, out) == (4, "")
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-2].startswith("fedcli: error: no workspace here")


# Rows


def test_a_disk_that_fails_under_rows_is_no_fault_of_the_rows(refused: Callable[..., None], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.symlink_to("/proc/self/mem")  # whose first bytes nobody can read: EIO
    given = settings(*SMALL, f"data.source={rows}")
    refused(4, ["init", tmp_path / "w", *given], f"cannot read the rows in {rows}: Input/output error", "its disk")


def test_a_source_that_is_missing_is_named_at_init(refused: Callable[..., None], tmp_path: Path) -> None:
    home = tmp_path / "w"
    for name in ("rows.jsonl", "odd #1.jsonl", "[y].jsonl"):  # paths that --set gives start at the current folder
        given = settings(*SMALL, f"data.source={json.dumps(name)}")
        refused(3, ["init", home, *given], Path.cwd() / name, "data.source")
    assert not (home / "workspace.json").exists()


def test_a_source_without_rows_is_named_at_init(refused: Callable[..., None], tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("")
    refused(3, ["init", tmp_path / "w", *settings(*SMALL, f"data.source={source}")], source)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        (r'{"instruction": "\ud800", "output": "b"}', ""),  # JSON can escape what UTF-8 cannot hold
    ],
)
def test_a_faulty_row_is_named_by_file_and_line_at_init_and_at_training(
    refused: Callable[..., None], small: Path, tmp_path: Path, line: str, fault: str
) -> None:
    text = '{"instruction": "a", "output": "b"}\n' * 6 + line + "\n"
    source = tmp_path / "rows.jsonl"
    source.write_text(text)
    overrides = settings(*SMALL, f"data.source={source}", "data.partition=iid")
    refused(3, ["init", tmp_path / "w", *overrides], f"{source}, line 7 {fault}")
    assert not (tmp_path / "w" / "workspace.json").exists()
    rows = small / "data" / "client-0.jsonl"
    rows.write_text(text)
    refused(3, ["client", "train", "--id", 0, "-w", small], f"{rows}, line 7 {fault}")
    assert list((small / "inbox").rglob("*")) == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"instruction": "a"}', "no column 'output'; it has instruction"),
        ('{"instruction": "a", "output": 7}', "no text in column 'output'"),
        ("{}", "no column 'instruction'; it has none"),
    ],
)
def test_rows_without_a_column_are_left_out_and_counted_and_if_all_lack_it_the_first_is_named(
    refused: Callable[..., None], run: Run, small: Path, tmp_path: Path, line: str, fault: str
) -> None:
    good = '{"instruction": "a", "output": "b"}\n'
    source = tmp_path / "rows.jsonl"
    rows = small / "data" / "client-0.jsonl"
    overrides = settings(*SMALL, f"data.source={source}", "data.partition=iid")
    for path in (source, rows):
        path.write_text(f"\n{line}\n{line}\n")
    refused(3, ["init", tmp_path / "w", *overrides], f"{source}, line 2: {fault}", "none of 2 rows", "data.format")
    assert not (tmp_path / "w").exists()
    refused(3, ["client", "train", "--id", 0, "-w", small], f"{rows}, line 2: {fault}", "none of 2 rows")
    assert list((small / "inbox").rglob("*")) == []
    for path in (source, rows):
        path.write_text(f"{good * 6}{line}\n")
    assert run("init", tmp_path / "w", *overrides)[0] == 0
    assert json.loads((tmp_path / "w/data/card.json").read_text())["left_out"] == {"malformed": 1}
    assert sum(len(path.read_text().splitlines()) for path in (tmp_path / "w/data").glob("client-*.jsonl")) == 6
    code, out, err = run("client", "train", "--id", 0, "-w", small, "--json")
    assert (code, err) == (0, "")
    assert (json.loads(out)["num_samples"], json.loads(out)["left_out"]) == (6, {"malformed": 1})


def test_a_client_without_rows_is_told_which_file_it_lacks(refused: Callable[..., None], small: Path) -> None:
    rows = small / "data" / "client-1.jsonl"
    rows.unlink()
    refused(3, ["client", "train", "--id", 1, "-w", small], f"client 1 has no rows: {rows} is missing")


def test_a_client_whose_rows_are_all_unusable_is_told_why(refused: Callable[..., None], small: Path) -> None:
    rows = small / "data" / "client-1.jsonl"
    rows.write_text('{"instruction": "a", "output": " "}\n')
    refused(3, ["client", "train", "--id", 1, "-w", small], rows, "none of 1 rows is usable", "line 1: empty response")
    rows.write_text(json.dumps({"instruction": "the storm howls " * 200, "output": "b"}) + "\n")
    told = ("none of its 1 rows is usable at max_length 128 (1 too long)", "train.max_length")
    refused(3, ["client", "train", "--id", 1, "-w", small], rows, *told)


# Base models


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model of one's own: a copy of the built-in one."""
    builtin = find_base("builtin:tiny", revision=None, root=tmp_path)
    return Path(shutil.copytree(builtin, tmp_path / "base"))


@pytest.mark.parametrize(
    ("name", "code", "named"),
    [
        ("./nowhere", 8, ["base model not found", "nowhere does not exist"]),
        ("builtin:tny", 3, ["unknown built-in model 'builtin:tny'", "Did you mean builtin:tiny?"]),
    ],
)
def test_a_base_model_that_is_not_there_is_named_and_may_be_corrected(
    refused: Callable[..., None], run: Run, tmp_path: Path, name: str, code: int, named: list[str]
) -> None:
    home = tmp_path / "w"
    refused(code, ["init", home, *settings(*ONE, f"model.base={name}")], *named, "model.base")
    assert not home.exists(), "all is validated before anything is written"
    assert run("init", home, *settings(*ONE))[0] == 0


def test_a_fedcli_yaml_of_ones_own_may_be_corrected(refused: Callable[..., None], run: Run, tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w/fedcli.yaml").write_text("model: {base: ./nowhere}\n")
    refused(8, ["init", tmp_path / "w"], tmp_path / "w/nowhere", "model.base")
    edit(tmp_path / "w", "model", "base", "builtin:tiny")
    assert run("init", tmp_path / "w")[0] == 0


def test_a_hub_model_that_cannot_be_fetched_is_named(tmp_path: Path) -> None:
    arguments = ["init", ".", *settings(*SMALL, "model.base=nobody/nothing"), "--json"]
    done = fedcli(*arguments, cwd=tmp_path)  # a process: HF_HUB_OFFLINE is read once, when huggingface_hub is imported
    assert done.returncode == 8
    check_message(done.stderr, "'nobody/nothing' is no folder here, and the hub does not give it", "model.base")
    assert json.loads(done.stdout)["error"]["exit_code"] == 8


def test_a_target_module_that_is_not_there_is_named_and_may_be_corrected(
    refused: Callable[..., None], run: Run, tmp_path: Path
) -> None:
    home = tmp_path / "w"
    overrides = settings(*ONE, "adapter.target_modules=[q_prj]")
    refused(3, ["init", home, *overrides], "adapter.target_modules", "'q_prj'", "Did you mean")
    assert run("init", home, *settings(*ONE, "adapter.target_modules=[q_proj]"))[0] == 0


def test_another_base_model_under_the_same_name_is_refused(
    refused: Callable[..., None], run: Run, base: Path, tmp_path: Path
) -> None:
    home = tmp_path / "w"
    assert run("init", home, *settings(*ONE, f"model.base={base}"))[0] == 0
    weights = base / "model.safetensors"
    contents = weights.read_bytes()
    weights.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    (client,) = json.loads(run("status", "-w", home, "--json")[1])["cohort"]
    refused(3, ["client", "train", "--id", client, "-w", home], base, "its fingerprint differs", "model.base")
    assert list((home / "inbox").rglob("round-*")) == []
    weights.write_bytes(contents)
    assert run("client", "train", "--id", client, "-w", home)[0] == 0


@pytest.mark.parametrize("contents", ["{", "[]", '{"model_type": "no-such-architecture"}'])
def test_a_base_model_with_a_corrupt_config_is_refused(
    refused: Callable[..., None], base: Path, tmp_path: Path, contents: str
) -> None:
    (base / "config.json").write_text(contents)
    refused(8, ["init", tmp_path / "w", *settings(*ONE, f"model.base={base}")], base)


def test_a_base_model_with_truncated_weights_is_refused(
    refused: Callable[..., None], base: Path, tmp_path: Path
) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(8, ["init", tmp_path / "w", *settings(*ONE, f"model.base={base}")], base)


# Disks and limits


@contextmanager
def mounted(*options: str, at: Path) -> Iterator[None]:
    """Mount something for the time of the block; skip where this user may not mount."""
    done = subprocess.run(["mount", *options, str(at)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(at)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder read-only; root heeds no permissions, so for it by a mount."""
    if os.geteuid() == 0:
        with mounted("--bind", str(folder), at=folder):
            subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
            yield
        return
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:
        yield
    finally:
        for path in folders:
            path.chmod(0o755)


def test_a_read_only_workspace_can_be_read_and_says_why_it_cannot_be_written(
    refused: Callable[..., None], run: Run, small: Path
) -> None:
    cure = "mount it writable" if os.geteuid() == 0 else "Ask the workspace's owner for write permission"
    before = tree(small)
    with read_only(small):
        for arguments in (["status"], ["verify"], ["client", "status", "--id", 0]):
            assert run(*arguments, "-w", small)[0] == 0
        for arguments in (["client", "train", "--id", 0], ["server", "aggregate"], ["run"]):
            refused(4, [*arguments, "-w", small], f"cannot write {small}", cure)
        refused(4, ["init", small / "new", *settings(*SMALL)], f"cannot write {small}")
    assert tree(small) == before


def fill(disk: Path, *, leave: int) -> Path:
    """Fill a disk but for some bytes; return the file that does."""
    filler = disk / "filler"
    free = os.statvfs(disk)
    filler.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - leave)))
    return filler


@pytest.mark.slow
def test_a_full_disk_stops_a_command_and_space_lets_it_go_on(
    refused: Callable[..., None], run: Run, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    home = disk / "w"
    cure = "Free some space on that disk and run the command again"
    with mounted("-t", "tmpfs", "-o", "size=1m", "tmpfs", at=disk):
        init = ["init", home, *settings(*ONE)]
        stops = []
        for leave in range(0, 900_000, 12_288):  # ever more space: the disk is full at one file after another
            filler = fill(disk, leave=leave)
            code, out, err = run(*init)
            filler.unlink()
            assert temporaries(disk) == []
            if code == 0:
                break
            assert (code, out) == (4, "")
            check_message(err, f"cannot write {home}", "No space left on device", cure)
            stops.append(err)
        assert code == 0
        assert len(set(stops)) >= 5
        (client,) = json.loads(run("status", "-w", home, "--json")[1])["cohort"]
        for arguments, published in (
            (["client", "train", "--id", client, "-w", home], home / "inbox" / str(client) / "round-00000"),
            (["server", "aggregate", "-w", home], home / "rounds" / "00001"),
        ):
            for leave in (0, 8_192):  # nothing; a lock and half of an adapter
                filler = fill(disk, leave=leave)
                before = tree(home)
                refused(4, arguments, f"cannot write {home}", "No space left on device", cure)
                assert tree(home) == before
                assert temporaries(disk) == []
                filler.unlink()
            assert not published.exists()
            assert run(*arguments)[0] == 0
            assert published.exists()
        code, out, _ = run("verify", "-w", home)
        assert (code, out.splitlines()[-1]) == (0, "no violation")


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))  # an adapter has 9 kB, the rows more


@pytest.mark.slow
def test_a_limit_on_file_sizes_stops_a_command_and_lifting_it_lets_it_go_on(run: Run, tmp_path: Path) -> None:
    home = tmp_path / "w"
    home.mkdir()
    # Without coverage, whose own file is larger than the limit.
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("COVERAGE_")}

    def limited(*arguments: object) -> None:
        done = subprocess.run(
            command(*arguments), cwd=home, env=environment, preexec_fn=limit_files, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (4, ""), done.stderr
        check_message(done.stderr, f"cannot write {home}", "File too large", "ulimit -f")
        assert temporaries(home) == []

    limited("init", *settings(*ONE))
    assert run("init", home, *settings(*ONE))[0] == 0
    (client,) = json.loads(run("status", "-w", home, "--json")[1])["cohort"]
    for arguments in (["client", "train", "--id", client], ["server", "aggregate"]):
        limited(*arguments)
        assert run(*arguments, "-w", home)[0] == 0
    assert run("verify", "-w", home)[0] == 0


# Signals


@pytest.mark.slow
def test_a_client_that_is_stopped_leaves_nothing_behind_and_may_run_again(run: Run, tmp_path: Path) -> None:
    home, scratch = tmp_path / "w", tmp_path / "scratch"
    scratch.mkdir()
    assert run("init", home, *settings(*ONE, "train.steps=80", "train.batch_size=16"))[0] == 0
    (client,) = json.loads(run("status", "-w", home, "--json")[1])["cohort"]
    train = ["client", "train", "--id", client, "-w", home]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        for kept in home.glob("private/*/tokens-*"):
            kept.unlink()
        process = subprocess.Popen(
            command(*train),
            env=ENVIRONMENT | {"TMPDIR": str(scratch)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Background jobs of a shell ignore SIGINT, and their children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 300
        while not list(home.glob("private/*/tokens-*")):  # the rows are there, and training begins
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.1)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (code, ""), err
        assert "Traceback" not in err
        assert "run the same command again" in err
        assert list(scratch.glob("tmp*")) == []
        assert list((home / "inbox").rglob("*")) == []
    assert run(*train)[0] == 0
    assert [path.name for path in (home / "inbox" / str(client)).iterdir()] == ["round-00000"]


def test_init_leaves_alone_what_is_not_its_own(refused: Callable[..., None], tmp_path: Path) -> None:
    """A folder that is in use: hidden folders of its user stay, and rows written by hand are not replaced."""
    (tmp_path / ".tmp-mine").mkdir()
    (tmp_path / ".tmp-mine/file").write_text("mine")
    rows = tmp_path / "data/client-0.jsonl"
    rows.parent.mkdir()
    rows.write_text('{"instruction": "a", "output": "b"}\n')
    refused(4, ["init", tmp_path], rows, "is there already", "data.source")
    assert rows.read_text() == '{"instruction": "a", "output": "b"}\n'
    assert (tmp_path / ".tmp-mine/file").read_text() == "mine"


def test_init_gives_a_workspace_that_lost_its_identity_the_id_of_its_rounds(run: Run, small: Path) -> None:
    before = (small / "workspace.json").read_bytes()
    (small / "workspace.json").unlink()
    code, text, _ = run("init", small)
    assert code == 0
    assert f"workspace.json was missing: it has the id of round 0 again, {json.loads(before)['id']}" in text
    assert (small / "workspace.json").read_bytes() == before
    assert run("verify", "-w", small)[0] == 0


def test_a_training_that_diverges_drops_nothing_and_says_why(
    run: Run, refused: Callable[..., None], tmp_path: Path
) -> None:
    """A base model with finite weights that are far too large: the loss is not finite from the first step."""
    base = Path(shutil.copytree(find_base("builtin:tiny", revision=None, root=tmp_path), tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    next(iter(weights.values())).fill_(3e38)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    here = tmp_path / "broken"
    assert run("init", here, *settings(*SMALL, f"model.base={base}"))[0] == 0
    refused(3, ["client", "train", "--id", 1, "-w", here], "diverged", "train.learning_rate")
    assert list(here.glob("inbox/1/*")) == []
