"""Tasks and formats of other packages: CONTRIBUTING.md's own code, built, installed and trained with."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.plugins import install, python_path
from support.processes import ENVIRONMENT, SMALL, command, settings

from fedcli import tasks
from fedcli.data.demo import demo_preferences
from fedcli.data.encoding import Encoder
from fedcli.data.order import draw
from fedcli.errors import RequirementError
from fedcli.model.base import find_base
from fedcli.model.lora import AdaptedModel
from fedcli.plugins import Registry
from fedcli.tasks import DPO, FORMATS, Task
from fedcli.tasks.conversation import Preference, Turn, instruct

ROOT = Path(__file__).parents[1]
KTO_FILE = ROOT / "tests/support/kto.py"
BETA = 0.7


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes that see the package."""
    walk = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Adding a format")[2]
    source = "\n\n".join(re.findall(r"```python\n(.*?)```", walk.partition("## Adding a benchmark")[0], re.DOTALL))
    entry_points = {
        "fedcli.tasks": {"dpo-norm": "fedcli_walk:NORMALISED"},
        "fedcli.formats": {"question-answer": "fedcli_walk:QUESTIONS"},
        "fedcli.rewards": {"short": "fedcli_walk:SHORT"},
    }
    return python_path(install(tmp_path_factory.mktemp("plugin"), "fedcli-walk", source, entry_points))


def fedcli(*arguments: object, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=cwd, env=ENVIRONMENT | more, capture_output=True, text=True, timeout=120
    )


def answer(*arguments: object, cwd: Path, **more: str) -> dict:
    """Run a command that must succeed, and return its document."""
    done = fedcli(*arguments, "--json", cwd=cwd, **more)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def log_probs(model: AdaptedModel, pair: tuple[np.ndarray, ...]) -> list[tuple[float, int]]:
    """Return each side's log-probability by a plain forward pass, and its number of learnt tokens."""
    found = []
    for ids, start in pair:
        tokens = torch.tensor(ids.astype(np.int64))
        with torch.no_grad():
            said = model.model(tokens[None]).logits[0, :-1].double().log_softmax(-1)
        found.append((said[torch.arange(start - 1, len(ids) - 1), tokens[start:]].sum().item(), len(ids) - start))
    return found


@pytest.mark.slow
def test_length_normalised_dpo_of_a_package_is_trained_as_its_formula_says(
    plugin: dict[str, str], tmp_path: Path
) -> None:
    one = ("train.steps=1", "train.batch_size=8", "train.learning_rate=0.003", f"train.beta={BETA}")
    overrides = settings(*SMALL, *one, "task=dpo-norm", "algorithm.name=fedavg")
    answer("init", "--preset", "demo-dpo", *overrides, cwd=tmp_path, **plugin)
    assert answer("run", cwd=tmp_path, **plugin)["state"] == "finished"
    assert answer("verify", cwd=tmp_path, **plugin)["violations"] == []
    told = []  # the losses of client 0's steps, one a round
    for number in (1, 2):
        manifest = json.loads((tmp_path / f"rounds/{number:05d}/manifest.json").read_text())
        assert (manifest["task"], manifest["train"]["beta"]) == ("dpo-norm", BETA)
        told.append(manifest["aggregation"]["counted"][0]["train_loss"])
    assert told[0] == pytest.approx(np.log(2), abs=1e-6)  # the policy is the reference

    folder = tmp_path / "rounds/00001/adapter"
    base = find_base("builtin:tiny", revision=None, root=tmp_path)
    model = AdaptedModel(base, json.loads((folder / "adapter_config.json").read_text()), trust_remote_code=False)
    model.model.eval()
    rows = [json.loads(line) for line in (tmp_path / "data/client-0.jsonl").read_text().splitlines()]
    pairs = Encoder(model.tokenizer).encode(
        (Preference((Turn("user", row["prompt"]),), row["chosen"], row["rejected"]) for row in rows), 128
    )
    drawn = [pairs[index] for index in draw(len(rows), seed=0, client=0, first=8, count=8)]
    sides = [tuple((side.ids, side.prompt_length) for side in pair.sides) for pair in drawn]
    said = []
    for number in (0, 1):  # the reference's, then the policy's
        model.load(load_file(tmp_path / f"rounds/{number:05d}/adapter/adapter_model.safetensors"))
        said.append([log_probs(model, pair) for pair in sides])
    losses = []
    for reference, policy in zip(*said, strict=True):
        chosen, rejected = ((p - r) / count for (r, count), (p, _) in zip(reference, policy, strict=True))
        losses.append(np.log1p(np.exp(-BETA * (chosen - rejected))))
    assert abs(np.mean(losses) - np.log(2)) > 1e-3
    assert told[1] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.slow
def test_names_of_a_package_are_known_while_it_is_installed(plugin: dict[str, str], tmp_path: Path) -> None:
    near = fedcli("init", *settings("task=dpo-nrom"), cwd=tmp_path, **plugin)
    assert (near.returncode, near.stdout) == (3, "")
    assert "task: unknown task 'dpo-nrom'. Did you mean dpo-norm" in near.stderr
    other = fedcli("init", *settings("task=dpo-norm", "data.format=question-answer"), cwd=tmp_path, **plugin)
    assert "data.format question-answer is not for task dpo-norm, whose formats are preference, " in other.stderr
    wrong = fedcli("init", *settings("task=dpo", "data.format=alpaca"), cwd=tmp_path, **plugin)
    assert "whose formats are preference, ultrafeedback, ultrafeedback-binarized, hh-rlhf" in wrong.stderr
    reward = fedcli("init", *settings("task=grpo", "train.reward=shrt"), cwd=tmp_path, **plugin)
    assert "train.reward: unknown reward function 'shrt'. Did you mean short?" in reward.stderr
    without = fedcli("init", *settings("task=dpo-norm"), cwd=tmp_path)
    assert without.returncode == 3
    assert "task: unknown task 'dpo-norm'. Known: dpo, grpo, kto, orpo, sft, simpo." in without.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of a prompt, a completion and a label, one of which has none."""
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if number % 3 else "rejected"], "label": number % 3 > 0}
        for number, row in enumerate(demo_preferences(0)["train"][::20])
    ]
    path = tmp_path_factory.mktemp("judged") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "label": "good"}]))
    return path


@pytest.mark.slow
def test_a_kto_of_a_package_is_trained_as_its_formula_says(judged: Path, tmp_path: Path) -> None:
    points = {
        "fedcli.tasks": {"kto-plain": "kto_walk:KTO_PLAIN"},
        "fedcli.formats": {"plain-verdicts": "kto_walk:PLAIN"},
    }
    environment = python_path(install(tmp_path / "package", "kto-walk", KTO_FILE.read_text(), points))
    workspace = tmp_path / "workspace"
    one = ("train.steps=1", "train.batch_size=8", "train.micro_batch_size=4", "train.learning_rate=0.01")
    overrides = settings(
        *SMALL, *one, f"train.beta={BETA}", "task=kto-plain", f"data.source={judged}", "data.partition=iid"
    )
    answer("init", workspace, *overrides, cwd=tmp_path, **environment)
    assert json.loads((workspace / "data/card.json").read_text())["left_out"] == {"malformed": 1}
    assert answer("run", "-w", workspace, cwd=tmp_path, **environment)["state"] == "finished"
    train = json.loads((workspace / "rounds/00002/manifest.json").read_text())["train"]
    told = []
    for number in (1, 2):
        manifest = json.loads((workspace / f"rounds/{number:05d}/manifest.json").read_text())
        told.append(manifest["aggregation"]["counted"][0]["train_loss"])
    assert told[0] == pytest.approx(0.5, abs=1e-6)  # the policy is the reference

    folder = workspace / "rounds/00001/adapter"
    base = find_base("builtin:tiny", revision=None, root=tmp_path)
    model = AdaptedModel(base, json.loads((folder / "adapter_config.json").read_text()), trust_remote_code=False)
    model.model.eval()
    rows = [json.loads(line) for line in (workspace / "data/client-0.jsonl").read_text().splitlines()]
    encoded = Encoder(model.tokenizer).encode(
        (instruct(row["prompt"], row["completion"]) for row in rows), train["max_length"]
    )
    indices = draw(len(rows), seed=0, client=0, first=8, count=8)
    labels = [rows[index]["label"] for index in indices]
    assert len(set(labels)) == 2
    sides = [(side.ids, side.prompt_length) for index in indices for side in encoded[index].sides]
    others = [  # each prompt with the next response
        (np.concatenate([ids[:start], answer_ids[answer_start:]])[: max(len(ids), len(answer_ids))], start)
        for (ids, start), (answer_ids, answer_start) in zip(sides, [*sides[1:], sides[0]], strict=True)
    ]
    said = []
    for number in (0, 1):  # the reference's, then the policy's
        model.load(load_file(workspace / f"rounds/{number:05d}/adapter/adapter_model.safetensors"))
        said.append([log_prob for log_prob, _ in log_probs(model, (*sides, *others))])
    ratios = np.array(said[1]) - np.array(said[0])
    kl = max(0.0, ratios[8:].mean())
    values = 1 / (1 + np.exp(-BETA * np.where(labels, ratios[:8] - kl, kl - ratios[:8])))
    assert kl > 1e-3
    assert abs(1 - values.mean() - 0.5) > 1e-4
    assert told[1] == pytest.approx(1 - values.mean(), rel=1e-5)


@pytest.mark.slow
def test_that_kto_in_fedcli_would_be_a_file_and_its_object(judged: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "fedcli", tmp_path / "site/fedcli", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "workspace_template", tmp_path / "site/workspace_template")
    names = tmp_path / "site/fedcli/tasks/__init__.py"
    source = names.read_text().replace("(SFT, DPO, ", "(SFT, DPO, KTO_PLAIN, ", 1)
    names.write_text(
        source.replace("from fedcli.tasks.sft", "from fedcli.tasks.kto_plain import KTO_PLAIN\nfrom fedcli.tasks.sft")
    )
    shutil.copy(KTO_FILE, names.with_name("kto_plain.py"))
    environment = python_path(tmp_path / "site")
    workspace = tmp_path / "workspace"
    overrides = settings(*SMALL, "task=kto-plain", f"data.source={judged}", "data.partition=iid")
    answer("init", workspace, *overrides, cwd=tmp_path, **environment)
    assert answer("client", "train", "--id", 0, "-w", workspace, cwd=tmp_path, **environment)["num_samples"] == 20
    demo = fedcli("init", tmp_path / "demo", *settings("task=kto-plain"), cwd=tmp_path, **environment)
    assert (demo.returncode, demo.stdout) == (3, "")
    assert "data.source: builtin:demo has no rows for task kto-plain" in demo.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("group", "kind"), [("fedcli.tasks", "task"), ("fedcli.formats", "data.format")])
def test_a_broken_task_or_format_stops_who_asks_for_it_alone(group: str, kind: str, tmp_path: Path) -> None:
    other = python_path(install(tmp_path, "broken-one", "import nothing_such", {group: {"odd": "broken_one:X"}}))
    fault = "'odd' of the package broken-one cannot be loaded: ModuleNotFoundError: No module named 'nothing_such'"
    asked = fedcli("init", tmp_path / "asked", *settings(f"{kind}=odd"), cwd=tmp_path, **other)
    assert (asked.returncode, asked.stdout) == (8, "")
    assert f"fedcli: error: {fault}" in asked.stderr
    assert "pip uninstall broken-one" in asked.stderr
    done = fedcli("init", tmp_path / "workspace", *settings(*SMALL), "--json", cwd=tmp_path, **other)
    assert done.returncode == 0
    assert done.stderr.splitlines() == ([f"fedcli: warning: {fault}"] if group == "fedcli.formats" else [])
    trained = fedcli("client", "train", "--id", 0, "-w", tmp_path / "workspace", cwd=tmp_path, **other)
    assert trained.returncode == 0


@pytest.mark.parametrize(
    ("loaded", "fault"),
    [
        (DPO, "it is no Task of the name 'other'"),
        (FORMATS["alpaca"], "it is no Task"),
        (print, "it is no Task"),
        (replace(DPO, name="other", hyperparameters=("delta",)), "the section train has no delta"),
    ],
)
def test_what_an_entry_point_gives_must_be_a_task_of_its_name_and_of_known_keys(loaded: object, fault: str) -> None:
    registry = Registry("fedcli.tasks", {}, tasks._check(Task))
    registry.__dict__["_others"] = {"other": SimpleNamespace(name="other", value="x", dist=None, load=lambda: loaded)}
    with pytest.raises(RequirementError, match=fault):
        registry["other"]


@pytest.mark.slow
def test_rows_of_a_packages_format_are_split_and_trained_on(plugin: dict[str, str], tmp_path: Path) -> None:
    rows = [{"question": f"What is {number} and one?", "answer": str(number + 1)} for number in range(30)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question": "?"}]))
    workspace = tmp_path / "workspace"
    overrides = settings(*SMALL, f"data.source={source}", "data.format=question-answer", "data.partition=iid")
    answer("init", workspace, *overrides, cwd=tmp_path, **plugin)
    assert json.loads((workspace / "data/card.json").read_text())["left_out"] == {"malformed": 1}
    done = answer("client", "train", "--id", 1, "-w", workspace, cwd=tmp_path, **plugin)
    assert (done["num_samples"], done["num_unusable"]) == (10, 0)
    gone = fedcli("client", "train", "--id", 0, "-w", workspace, cwd=tmp_path)
    assert gone.returncode == 3
    assert "data.format: unknown format 'question-answer'" in gone.stderr
    assert "Traceback" not in gone.stderr
