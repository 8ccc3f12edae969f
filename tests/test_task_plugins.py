"""Tasks and formats of other packages: CONTRIBUTING.md's own code, built, installed and trained with."""

import json
import re
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
from fedcli.data.encoding import Encoder
from fedcli.data.order import draw
from fedcli.errors import RequirementError
from fedcli.model.base import find_base
from fedcli.model.lora import AdaptedModel
from fedcli.plugins import Registry
from fedcli.tasks import DPO, FORMATS, Task
from fedcli.tasks.conversation import Preference, Turn

ROOT = Path(__file__).parents[1]
BETA = 0.7


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes that see the package."""
    walk = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Adding a format")[2]
    source = "\n\n".join(re.findall(r"```python\n(.*?)```", walk.partition("## Adding a benchmark")[0], re.DOTALL))
    entry_points = {
        "fedcli.tasks": {"dpo-norm": "fedcli_walk:NORMALISED"},
        "fedcli.formats": {"question-answer": "fedcli_walk:QUESTIONS"},
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


def test_names_of_a_package_are_known_while_it_is_installed(plugin: dict[str, str], tmp_path: Path) -> None:
    near = fedcli("init", *settings("task=dpo-nrom"), cwd=tmp_path, **plugin)
    assert (near.returncode, near.stdout) == (3, "")
    assert "task: unknown task 'dpo-nrom'. Did you mean dpo-norm" in near.stderr
    other = fedcli("init", *settings("task=dpo-norm", "data.format=question-answer"), cwd=tmp_path, **plugin)
    assert "data.format question-answer is not for task dpo-norm, whose formats are preference, " in other.stderr
    wrong = fedcli("init", *settings("task=dpo", "data.format=alpaca"), cwd=tmp_path, **plugin)
    assert "whose formats are preference, ultrafeedback, ultrafeedback-binarized, hh-rlhf" in wrong.stderr
    without = fedcli("init", *settings("task=dpo-norm"), cwd=tmp_path)
    assert without.returncode == 3
    assert "task: unknown task 'dpo-norm'. Known: dpo, sft." in without.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("loaded", "fault"),
    [
        (DPO, "it is no Task of the name 'other'"),
        (FORMATS["alpaca"], "it is no Task"),
        (print, "it is no Task"),
        (replace(DPO, name="other", hyperparameters=("gamma",)), "the section train has no gamma"),
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
