"""What a malicious server, or whoever owns the workspace, may ask of a party: each attack is refused, or harmless."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import processes
from support.processes import ENVIRONMENT, SMALL, settings
from support.warm import Place, Warm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fedcli import Federation
from fedcli.config import parse_config, read_document
from fedcli.config.sections import TrainConfig
from fedcli.data import template_limits
from fedcli.data.chat_template import ChatTemplate
from fedcli.errors import ConfigError, IntegrityError, RequirementError, UsageError
from fedcli.model.base_files import weight_files
from fedcli.model.loading import load_base
from fedcli.model.tokenizer_files import chat_abilities
from fedcli.scoring.after_rounds import _score
from fedcli.tasks.conversation import Turn
from fedcli.workspace.floors import USUAL_FLOORS, Asked, Floors, check_floors, faults, parse_floors
from fedcli.workspace.history import read_head, read_identity
from fedcli.workspace.layout import Workspace
from fedcli.workspace.registrations import read_party
from fedcli.workspace.scores import Unscored

BUILTIN = Path(__file__).parents[1] / "fedcli/model/builtin/tiny"
MANIFEST = "manifest.json"
TURNS = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"


slow = partial(pytest.param, marks=pytest.mark.slow)


def edit(path: Path, change: Callable[[dict], object]) -> None:
    """Change a record; it names no checksum then, as one of an earlier version."""
    document = json.loads(path.read_bytes())
    document.pop("checksum", None)
    change(document)
    path.write_text(json.dumps(document))


def train(**values: object) -> Callable[[dict], object]:
    return lambda manifest: manifest["train"].update(values)


# Floors


def asked(small: Path, *, steps: int = 10, batch_size: int = 8, rows: int = 100, layers: tuple[str, ...] = ()) -> Asked:
    """Return a round of some steps and batches, that adapts layers of these names."""
    workspace = Workspace(small)
    manifest = read_head(workspace, read_identity(workspace)).manifest
    tensors = {
        f"base_model.model.{layer}.lora_A.weight": entry
        for layer in layers
        for entry in [*manifest.tensors.values()][:1]
    }
    changed = {"train": manifest.train.model_copy(update={"steps": steps, "batch_size": batch_size})}
    return Asked.by(manifest.model_copy(update=changed | ({"tensors": tensors} if layers else {})), rows)


INSIDE = "model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("floors", "round_", "told"),
    [
        ([], {"steps": 1, "batch_size": 1}, "learns from 1 row, and your floor is 2"),
        ([], {"rows": 1}, "learns from 1 row, and your floor is 2"),
        ([], {"steps": 2, "batch_size": 1}, None),
        (["rows=50"], {"steps": 6}, "learns from 48 rows, and your floor is 50"),
        (["steps=11"], {}, "makes 10 steps, and your floor is 11"),
        (["batch_size=9"], {}, "has batches of 8 rows, and your floor is 9"),
        ([], {"layers": (INSIDE,)}, None),
        ([], {"layers": (INSIDE, "lm_head")}, "adapts lm_head, and your floor allows the numbered layers alone"),
        ([], {"layers": ("model.embed_tokens",)}, "adapts model.embed_tokens, and"),
        ([], {"layers": ("transformer.wte", "embed_out")}, "adapts embed_out, transformer.wte, and"),
        (["targets=any"], {"layers": ("lm_head",)}, None),
        (["targets=q_proj,v_proj"], {"layers": (INSIDE,)}, None),
        (["targets=v_proj"], {"layers": (INSIDE,)}, f"adapts {INSIDE}, and your floor allows v_proj"),
        (["targets=lm_head"], {"layers": ("lm_head",)}, "adapts lm_head, and"),
        (["targets=proj"], {"layers": (INSIDE,)}, f"adapts {INSIDE}, and your floor allows proj"),
    ],
)
def test_a_floor_refuses_a_round_that_asks_for_less_and_says_what_would_allow_it(
    small: Path, floors: list[str], round_: dict, told: str | None
) -> None:
    own, found = parse_floors(floors, USUAL_FLOORS), asked(small, **round_)
    if told is None:
        check_floors(own, found, 3)
        return
    with pytest.raises(ConfigError) as raised:
        check_floors(own, found, 3)
    assert raised.value.message.startswith(f"client 3 does not train round 0: it {told}")
    allow = [value for _, value in faults(own, found)]
    assert all(f"--floor {value}" in raised.value.hint for value in allow)
    if floors != ["targets=lm_head"]:  # it stands outside of the layers, whatever it is named
        check_floors(parse_floors(allow, own), found, 3)


@pytest.mark.parametrize(
    "text", ["rows", "rows=0", "rows=x", "rows=1e9", "row=3", "targets=", "targets=a b", "targets=(a+)+"]
)
def test_what_is_no_floor_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="not a floor"):
        parse_floors([text], USUAL_FLOORS)


def test_a_floor_that_this_version_does_not_know_is_no_floor_that_is_passed_over(small: Path, tmp_path: Path) -> None:
    from fedcli.workspace.layout import Home

    home = Home(tmp_path / "home")
    home.folder.mkdir()
    record = {
        "workspace": "w", "client": 0, "source": "x", "format": "alpaca", "subset": None, "split": None, "base": None,
        "trust_remote_code": False,
    }  # fmt: skip
    home.party.write_text(json.dumps(record))
    found = read_party(home)
    assert found is not None
    assert found.floors == Floors()
    assert json.loads(found.to_bytes())["floors"] == {}, "the defaults are this version's, and not kept"
    home.party.write_text(json.dumps(record | {"floors": {"most_hops": 3}}))
    with pytest.raises(ConfigError, match="cannot keep the floor 'most_hops'"):
        read_party(home)


# Chat templates

ENDLESS = {
    "loops": "{% for a in range(90000) %}{% for b in range(90000) %}{{ b|int }}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "filters": "{% for a in range(90000) %}{{ range(90000)|map('string')|list|length }}{% endfor %}",
    "words": "{{ lipsum(n=100000, min=100, max=10000)|length }}",
    "a block": "{% generation %}{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    "{% endgeneration %}",
}
LARGE = {
    "a power": "{% set ns = namespace(x=9) %}{{ (ns.x ** 999999999) % 7 }}",
    "a power of constants": "{{ 9 ** 999999999 % 7 }}",
    "squares": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "a text": "{{ ('a' * 100000000000)|length }}",
    "a list": "{{ ([1] * 100000000000)|length }}",
    "digits": "{{ 1.5|round(999999999, 'ceil') }}",
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BUILTIN)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "PAUSE", 0.02)
    monkeypatch.setattr(template_limits, "LOOKS", 3)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "name",
    ["loops", "a block", *(pytest.param(name, marks=pytest.mark.slow) for name in ("macros", "filters", "words"))],
)
def test_a_template_that_does_not_end_is_stopped_and_the_next_one_is_rendered(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    tokenizer.chat_template = ENDLESS[name] + TURNS
    for make in (ChatTemplate, chat_abilities):
        with pytest.raises(ConfigError, match=r"the chat template of the base model .*tiny does not end") as raised:
            make(tokenizer)
        assert "chat_template.jinja" in raised.value.hint
    tokenizer.chat_template = TURNS
    ChatTemplate(tokenizer)


@pytest.mark.usefixtures("impatient")
def test_a_template_is_stopped_in_any_thread_and_only_there(tokenizer: PreTrainedTokenizerBase) -> None:
    found: list[BaseException] = []

    def render() -> None:
        tokenizer.chat_template = ENDLESS["loops"] + TURNS
        try:
            ChatTemplate(tokenizer)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=render)
    thread.start()
    thread.join()
    assert [type(error) for error in found] == [ConfigError]


@pytest.mark.parametrize("is_traced", [False, True])
def test_whenever_a_template_is_stopped_nothing_is_raised_later_or_waits(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, is_traced: bool
) -> None:
    """Templates that end at about the limit, also under a tracer, which lets exceptions come at every line."""
    monkeypatch.setattr(template_limits, "PAUSE", 0.001)
    monkeypatch.setattr(template_limits, "LOOKS", 1)
    found: list[str] = []

    def trace(frame: object, event: str, argument: object) -> Callable[..., object]:
        return trace

    def render(seconds: float, error: Exception | None) -> str:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            pass
        if error is not None:
            raise error
        return "ended"

    def render_many() -> None:
        before = sys.gettrace()
        if is_traced:
            sys.settrace(trace)
        for number in range(150):
            error = ValueError("its own") if number % 3 == 0 else None
            try:
                found.append(template_limits.limited(tokenizer, partial(render, number % 50 / 10_000, error)))
            except (ConfigError, ValueError) as raised:
                found.append(type(raised).__name__)
        for _ in range(10_000):  # what came late would come here, and nobody would count
            pass
        found.append("all")
        sys.settrace(before)

    threads = [threading.Thread(target=render_many) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert len(found) == 302
    assert found.count("all") == 2
    assert {*found} <= {"all", "ended", "ConfigError", "ValueError"}


@pytest.mark.parametrize("name", LARGE)
def test_a_template_makes_no_number_that_takes_hours(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    tokenizer.chat_template = LARGE[name] + TURNS
    with pytest.raises(ConfigError, match="cannot be followed: the chat template refuses it: line 1, it"):
        ChatTemplate(tokenizer)
    tokenizer.chat_template = "{{ '-' * 3 }}{{ (2.5 * 3 ** 2)|round(1) }}{{ 7 * 8 }}" + TURNS
    (piece,) = ChatTemplate(tokenizer).segments([Turn("user", "hm")])
    assert piece.text.startswith("---22.556<s>user: hm</s>")


# Bases


class Hostile:
    """What runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def _zipped(path: Path, hostile: Hostile) -> None:
    torch.save({**load_file(BUILTIN / "model.safetensors"), "x": hostile}, path)


def _legacy(path: Path, hostile: Hostile) -> None:
    torch.save({"x": hostile}, path, _use_new_zipfile_serialization=False)


def _plain(path: Path, hostile: Hostile) -> None:
    path.write_bytes(pickle.dumps(hostile, protocol=2))


@pytest.mark.parametrize(
    "write", [_plain, *(pytest.param(write, marks=pytest.mark.slow) for write in (_zipped, _legacy))]
)
@pytest.mark.parametrize("is_indexed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_pickle_as_a_base_runs_nothing_and_is_refused_without_torchs_advice_to_trust_it(
    tmp_path: Path, write: Callable[[Path, Hostile], None], is_indexed: bool
) -> None:
    base, mark = Path(shutil.copytree(BUILTIN, tmp_path / "base")), tmp_path / "mark"
    (base / "model.safetensors").unlink()
    name = "part-1.bin" if is_indexed else "pytorch_model.bin"
    write(base / name, Hostile(mark))
    if is_indexed:
        names = dict.fromkeys(load_file(BUILTIN / "model.safetensors"), name)
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(RequirementError, match=r"has a \.bin file that torch refuses") as raised:
        load_base(base, trust_remote_code=False)
    assert "weights_only" not in raised.value.message + raised.value.hint
    assert not mark.exists()


@pytest.mark.slow
@pytest.mark.parametrize("write", [_zipped, _legacy, _plain])
def test_a_pickle_as_an_adapter_runs_nothing(small: Path, write: Callable[[Path, Hostile], None]) -> None:
    adapter, mark = small / "theirs", small / "mark"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    write(adapter / "adapter_model.bin", Hostile(mark))
    runtime = Federation.open(small).runtimes.load()
    with pytest.raises(ConfigError, match=r"adapter_model\.bin is one that torch refuses") as raised:
        runtime.adapted.load_folder(adapter)
    assert "weights_only" not in raised.value.message
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/other.safetensors", "a/../../b.safetensors"])
def test_an_index_names_no_weights_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(RequirementError, match="names a file outside of its folder"):
        weight_files(tmp_path)


# Bounds


@pytest.mark.parametrize(
    "change",
    [
        train(steps=10**6, batch_size=10**6), train(steps=10**5, batch_size=101), train(date="x" * 11),
        train(date="2026-99-99"), train(seed=-1), lambda manifest: manifest["train"]["schedule"].update(rounds=10**400),
        lambda manifest: manifest.update(rounds=10**18), lambda manifest: manifest.update(cohort=[10**30]),
        lambda manifest: next(iter(manifest["tensors"].values())).update(shape=[10**30, 1]),
    ],
)  # fmt: skip
def test_a_round_that_asks_for_what_nobody_can_do_is_refused(small: Path, change: Callable[[dict], object]) -> None:
    edit(small / "rounds/00000" / MANIFEST, change)
    workspace = Workspace(small)
    with pytest.raises(IntegrityError, match="is damaged"):
        read_head(workspace, read_identity(workspace))


@pytest.mark.parametrize(
    "text",
    [
        "train: {steps: 100000, batch_size: 101}", "federation: {clients: 1000001}", "federation: {rounds: 1000001}",
        f"federation: {{seed: {'9' * 5000}}}", "federation: {seed: 2026-99-99}", "train: {max_grad_norm: .inf}",
    ],
)  # fmt: skip
def test_numbers_of_fedcli_yaml_are_bounded(text: str) -> None:
    path = Path("fedcli.yaml")
    with pytest.raises(ConfigError):
        parse_config(read_document(text, path), path)


def test_as_many_rows_as_the_bound_are_allowed() -> None:
    assert TrainConfig(steps=10**5, batch_size=100).steps == 10**5


def test_a_folder_with_a_huge_number_hides_no_round(small: Path) -> None:
    for name in ("99999999999999999999", "00002", "٣٣٣٣٣", "-1"):
        (small / "rounds" / name).mkdir()
    workspace = Workspace(small)
    assert read_head(workspace, read_identity(workspace)).number == 0


# A federation of parties


@pytest.fixture(scope="module")
def warm() -> Warm:
    return processes.warm()


@pytest.fixture(scope="module")
def merged_template(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace for parties, at H0 to H2, whose round 0 is merged; client 0 has trained round 1, too."""
    place = Place(tmp_path_factory.mktemp("merged"), warm)
    place("init", "W", *settings(*SMALL, "data.source=null", "federation.signatures=off", "federation.rounds=5"))
    for client in range(3):
        place.join(client, place.rows(f"rows-{client}.jsonl", 6 + client))
        place.train(client)
    place("server", "aggregate")
    return place.folder


@pytest.fixture
def merged(warm: Warm, merged_template: Path, tmp_path: Path) -> Iterator[Place]:
    """The federation in its own place: a home keeps the path of its rows, which stay where they were."""
    folder = Path(shutil.copytree(merged_template, tmp_path / "place"))
    return Place(folder, warm)


def refused(place: Place, told: str, code: int = 7) -> None:
    """Client 0 trains nothing, and is told why."""
    assert told in place.train(0, code=code).stderr
    assert not (place.workspace / "inbox/0/round-00001").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("task", lambda manifest: manifest.update(task="dpo")),
        ("model", lambda manifest: manifest["model"].update(fingerprint="0" * 64)),
        ("model, quantization", lambda manifest: manifest["model"].update(quantization="nf4")),
        ("model, revision", lambda manifest: manifest["model"].update(revision="../x")),
        ("tensors", lambda manifest: manifest["tensors"].pop(next(iter(manifest["tensors"])))),
        ("adapter", lambda manifest: manifest["files"]["adapter/adapter_config.json"].update(sha256="0" * 64)),
        ("train.seed", train(seed=7)),
        ("train.date", train(date="2026-01-01")),
    ],
)
def test_what_round_0_fixed_is_fixed_for_a_party(merged: Place, name: str, change: Callable[[dict], object]) -> None:
    edit(merged.workspace / "rounds/00001" / MANIFEST, change)
    refused(merged, f"rounds/00001 changes what was fixed when round 0 was opened: {name}\n")


@pytest.mark.slow
def test_a_round_below_a_partys_floors_is_not_trained_until_the_party_allows_it(merged: Place) -> None:
    edit(merged.workspace / "rounds/00001" / MANIFEST, train(steps=1, batch_size=1))
    refused(merged, "client 0 does not train round 1: it learns from 1 row, and your floor is 2", code=3)
    config = merged.workspace / "fedcli.yaml"
    config.write_text(config.read_text().replace("steps: 2", "steps: 1").replace("batch_size: 4", "batch_size: 1"))
    told = merged("train-alone", "--id", 0, "--home", "H0", code=3).stderr
    assert "client 0 does not train alone: it learns from 1 row" in told
    rows = merged.folder / "rows-0.jsonl"
    told = merged.join(0, rows, "--yes").stdout
    assert "with your floors you do not train round 1: it learns from 1 row" in told
    merged.join(0, rows, "--floor", "rows=1", "--yes")
    assert "as before: --floor rows=1" in merged.join(0, rows, "--yes").stdout, "kept when it joins again"
    merged.train(0)


@pytest.mark.slow
def test_rounds_that_are_taken_back_or_rewritten_are_seen(merged: Place) -> None:
    merged.train(0)
    rounds, inbox = merged.workspace / "rounds", merged.workspace / "inbox/0"
    shutil.rmtree(inbox / "round-00001")
    (rounds / "00001").rename(merged.folder / "aside")
    shutil.rmtree(inbox / "round-00000")
    told = merged.train(0, code=7).stderr
    assert "rounds ends with round 0, and client 0 has seen round 1" in told
    (merged.folder / "aside").rename(rounds / "00001")
    edit(rounds / "00001" / MANIFEST, train(batch_size=8))
    refused(merged, "rounds/00001 is not the round 1 that client 0 trained on")


@pytest.mark.slow
def test_a_round_that_nothing_was_sent_for_is_known_from_what_came_of_the_one_before(merged: Place) -> None:
    """What the home keeps of an outcome is the next round's hash: a failed training does not make it forget."""
    rows = merged.folder / "rows-0.jsonl"
    edit(merged.workspace / "clients/0.json", lambda card: card["data"].update(num_rows=5))
    refused(merged, "client 0 joined with 5 rows, and now has 6", code=3)
    merged.join(0, rows, "--yes")
    edit(merged.workspace / "rounds/00001" / MANIFEST, train(batch_size=8))
    refused(merged, "rounds/00001 is not the round 1 that client 0 trained on")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "result"),
    [
        (lambda merge: merge["counted"][0].update(update="1" * 64), "counted another update"),
        (lambda merge: (merge["counted"].pop(0), merge["missing"].append(0)), "missing"),
        (
            lambda merge: (
                merge["counted"].pop(0),
                merge["refused"].append({"client": 0, "code": "hash", "reason": "x"}),
            ),
            "hash",
        ),
    ],
)
def test_a_party_is_told_what_a_round_says_of_its_update_and_its_home_keeps_it(
    merged: Place, change: Callable[[dict], object], result: str
) -> None:
    edit(merged.workspace / "rounds/00001" / MANIFEST, lambda manifest: change(manifest["aggregation"]))
    done = merged.train(0)
    assert f"rounds/00001 says of its update of round 0: {result}\n" in done.stdout + done.stderr
    kept = [json.loads(line) for line in (merged.folder / "H0/history.jsonl").read_text().splitlines()]
    assert [line["result"] for line in kept if line["event"] == "outcome"] == [result]


def replace(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Put something else in the place of a file or folder."""

    def change(workspace: Path) -> None:
        path = workspace / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        make(path)

    return change


STANDS_IN: dict[str, tuple[Callable[[Path], object], int]] = {
    "a FIFO as a manifest": (replace("rounds/00001/manifest.json", os.mkfifo), 7),
    "a FIFO as an adapter": (replace("rounds/00001/adapter/adapter_model.safetensors", os.mkfifo), 6),  # it is short
    "a FIFO as fedcli.yaml": (replace("fedcli.yaml", os.mkfifo), 4),
    "a FIFO as workspace.json": (replace("workspace.json", os.mkfifo), 7),
    "a FIFO as rounds": (replace("rounds", os.mkfifo), 7),
    "an endless manifest": (replace("rounds/00001/manifest.json", lambda path: path.symlink_to("/dev/zero")), 7),
    "an endless fedcli.yaml": (replace("fedcli.yaml", lambda path: path.symlink_to("/dev/zero")), 4),
    "a large fedcli.yaml": (replace("fedcli.yaml", lambda path: path.write_bytes(b"a: 1\n" * 10**6)), 4),
    "a loop of links": (replace("rounds", lambda path: path.symlink_to("rounds")), 4),
    "a link as an inbox": (replace("inbox/0", lambda path: path.symlink_to("/tmp")), 4),
    "code in YAML": (replace("fedcli.yaml", lambda path: path.write_text("a: !!python/object/apply:os.abort []\n")), 3),
    "deep JSON": (replace("rounds/00001/manifest.json", lambda path: path.write_bytes(b"[" * 10**5)), 7),
    "another's registration": (
        lambda workspace: shutil.copy(workspace / "clients/1.json", workspace / "clients/0.json"),
        7,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STANDS_IN)
def test_what_stands_in_the_place_of_a_file_neither_stops_nor_leads_a_party_astray(merged: Place, name: str) -> None:
    change, code = STANDS_IN[name]
    change(merged.workspace)
    merged.train(0, code=code)
    merged("client", "status", "--id", 0, code=0 if "inbox" in name or "adapter" in name else code)


@pytest.mark.slow
def test_locks_and_times_of_the_workspace_keep_no_party_from_its_work(merged: Place) -> None:
    code = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX); print('held', flush=True); input()"
    for path in merged.workspace.rglob("*"):
        os.utime(path, (4e9, 4e9))
    lock = merged.workspace / "server.lock"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        merged.train(0)
        merged("status")
        holder.communicate("\n")


# What runs as a party


@pytest.mark.slow
def test_workers_import_nothing_of_the_folder_that_they_start_in(small: Path, tmp_path: Path) -> None:
    for name in ("multiprocessing", "pickle", "typer", "yaml", "torch", "json", "fedcli"):
        (small / f"{name}.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nraise SystemExit(99)\n")
    # as the console script starts: without the current folder in its path, and without -P, which children inherit
    code = "import sys; del sys.path[0]; from fedcli.__main__ import entry_point; entry_point()"
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"}
    words = [sys.executable, "-c", code, "run", "--workers", "2"]
    done = subprocess.run(words, cwd=small, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "mark").exists()


@pytest.fixture
def theirs(small: Path) -> Path:
    """A workspace whose fedcli.yaml is another user's."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")
    os.chown(small / "fedcli.yaml", 12_345, -1)
    return small


def test_fedcli_yaml_of_another_user_sends_no_jobs(theirs: Path) -> None:
    federation = Federation.open(theirs)
    for send in (
        federation.slurm.write_scripts,
        federation.slurm.submit,
        lambda: federation.slurm.submit(dry_run=True),
    ):
        with pytest.raises(ConfigError, match="is another user's: its slurm section"):
            send()
    assert not (theirs / "slurm/round-00000").exists()


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ("{every: 1, benchmarks: [mt-bench], judge_model: x, judge_url: 'http://127.0.0.1:9'}", "eval.judge_url"),
        ("{every: 1, benchmarks: [humaneval], allow_code_execution: true}", "eval.allow_code_execution"),
    ],
)
def test_fedcli_yaml_of_another_user_gets_no_key_and_runs_no_code(theirs: Path, section: str, named: str) -> None:
    config = theirs / "fedcli.yaml"
    config.write_text(f"{config.read_text()}\neval: {section}\n")
    federation = Federation.open(theirs)
    name = federation.state.config.eval.benchmarks[0]
    told = _score(federation.state, Unscored(round=0, benchmark=name, name=name), federation.runtimes, None)
    assert f"is another user's: {named} would run or send things as you" in told
