"""Rounds of task grpo by trl's trainer: against a loop written by hand in torch, and federated."""

import http.server
import json
import math
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import TINY, farthest, make_config, make_model, same_bits
from support.plugins import install, python_path
from support.processes import ENVIRONMENT, command, settings
from support.processes import fedcli as warm_fedcli

from fedcli import Federation
from fedcli.algos import Array, Arrays, ClientRule
from fedcli.algos.client_rule import ControlVariate, Proximal
from fedcli.data.demo import LABELS, demo_questions, demo_rows
from fedcli.data.encoded import EncodedRow
from fedcli.data.encoding import Encoder
from fedcli.model.lora import AdaptedModel, start_adapter
from fedcli.tasks import GRPO, SFT
from fedcli.tasks.conversation import Question, Turn, instruct
from fedcli.tasks.rewards import Answer
from fedcli.training.reports import StepReport, TrainSettings
from fedcli.training.trainer import fit
from fedcli.training.work import Answering, RoundWork

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
GENERATIONS = 4
LEARNING_RATE = 5e-3
MAX_GRAD_NORM = 0.05
WEIGHT_DECAY = 0.1


def advantages(rewards: Sequence[float]) -> list[float]:
    """Return (R - mean) / (deviation + 1e-4) of one group, with the deviation of a sample."""
    mean = sum(rewards) / len(rewards)
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))
    return [(reward - mean) / (deviation + 1e-4) for reward in rewards]


def k3(log_prob: Any, reference: Any, exp: Callable[[Any], Any] = math.exp) -> Any:
    """Return e^(ref - l) - (ref - l) - 1 (Schulman's third estimator of the divergence)."""
    return exp(reference - log_prob) - (reference - log_prob) - 1


def reward_of(answers: Sequence[Answer]) -> list[float]:
    """Reward answers by their letters: groups differ, whatever the model says."""
    return [sum(map(ord, answer.text)) % 7 / 7 for answer in answers]


@pytest.fixture(scope="module")
def adapted() -> AdaptedModel:
    return make_model(dropout=0.1)


@pytest.fixture(scope="module")
def start() -> dict[str, Array]:
    """An adapter whose B is not zero."""
    arrays, _ = start_adapter(TINY, make_config(), seed=3, trust_remote_code=False)
    draw = np.random.default_rng(0)
    return {
        name: array if ".lora_A." in name else draw.normal(scale=0.05, size=array.shape).astype(np.float32)
        for name, array in arrays.items()
    }


@pytest.fixture(scope="module")
def rows(adapted: AdaptedModel) -> list[EncodedRow]:
    """Rows of two steps, two prompts each."""
    found = demo_questions(0)["train"][:400:100]
    items = (Question((Turn("user", row["prompt"]),), row["answer"]) for row in found)
    return list(Encoder(adapted.tokenizer).encode(items, 128))


@dataclass
class Trained:
    """What came of a round: the adapter, the steps' losses and reports, and the tokens of prompts and answers."""

    values: dict[str, Array]
    losses: list[float]
    reports: list[StepReport]
    generated: list[tuple[torch.Tensor, int]]


def train(
    adapted: AdaptedModel,
    start: Arrays,
    rows: list[EncodedRow],
    folder: Path,
    rule: ClientRule | None = None,
    kl: float = 0.0,
    score: Callable[..., Sequence[float]] = reward_of,
    **changes: Any,
) -> Trained:
    """Train a round of two steps with fedcli and trl, and listen to what is generated."""
    from fedcli.training.grpo import train_round

    values = {
        "batch_size": 2 * GENERATIONS, "micro_batch_size": None, "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_GRAD_NORM, "gradient_checkpointing": False, "seed": 5,
        "hyperparameters": {"generations": GENERATIONS, "max_new_tokens": 6, "reward": "x", "kl": kl},
    }  # fmt: skip
    reports: list[StepReport] = []
    generated: list[tuple[torch.Tensor, int]] = []
    generate = adapted.model.generate

    def listened(**arguments: Any) -> torch.Tensor:
        found = generate(**arguments)
        generated.append((found.clone(), arguments["input_ids"].shape[1]))
        return found

    adapted.load(start)
    adapted.model.generate = listened
    end_id = Encoder(adapted.tokenizer).end_id
    work = RoundWork(
        adapted, rows, GRPO, TrainSettings(**(values | changes)), rule, reports.append, (),
        Answering(end_id, score, folder),
    )  # fmt: skip
    try:
        losses = train_round(work)
    finally:
        del adapted.model.generate
    return Trained(adapted.values(), losses, reports, generated)


def by_hand(
    adapted: AdaptedModel,
    start: Arrays,
    rows: list[EncodedRow],
    told: Trained,
    rule: ClientRule | None = None,
    kl: float = 0.0,
) -> dict[str, Array]:
    """Train from `start` on the same answers in a plain loop, one answer at a time, without padding."""
    adapted.load(start)
    adapted.model.eval()
    end_id = Encoder(adapted.tokenizer).end_id
    parameters = adapted.parameters
    for name, parameter in parameters.items():
        parameter.requires_grad_(rule is None or rule.trains(name))
    optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def log_probs(prompt: list[int], answer: list[int]) -> torch.Tensor:
        ids = torch.tensor(prompt + answer)
        said = adapted.model(ids[None]).logits[0, :-1].log_softmax(-1)
        return said[torch.arange(len(ids) - 1), ids[1:]][len(prompt) - 1 :]

    references: list[list[torch.Tensor]] = []
    batches: list[list[tuple[list[int], list[int], float]]] = []
    for step, (ids, width) in enumerate(told.generated):
        batch, texts = [], []
        for number, answer in enumerate(ids[:, width:].tolist()):
            answer = answer[: answer.index(end_id) + 1] if end_id in answer else answer
            side = rows[2 * step + number // GENERATIONS].sides[0]
            batch.append((side.ids[: side.prompt_length].tolist(), answer))
            texts.append(adapted.tokenizer.decode(answer, skip_special_tokens=True))
        rewards = reward_of([Answer(text, "") for text in texts])
        assert told.losses[step] == pytest.approx(1 - np.mean(rewards), abs=1e-6)
        groups = [advantages(rewards[at : at + GENERATIONS]) for at in range(0, len(rewards), GENERATIONS)]
        batches.append([(*each, a) for each, a in zip(batch, [a for group in groups for a in group], strict=True)])
        with torch.no_grad():
            references.append([log_probs(prompt, answer) for prompt, answer in batch])
    for batch, known in zip(batches, references, strict=True):
        optimizer.zero_grad()
        for (prompt, answer, advantage), reference in zip(batch, known, strict=True):
            said = log_probs(prompt, answer)
            ratio = (said - said.detach()).exp()
            loss = (-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)).mean()
            loss = loss + kl * k3(said, reference, torch.exp).mean()
            (loss / len(batch)).backward()
        trained = [parameter for parameter in parameters.values() if parameter.grad is not None]
        assert float(torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)) > 1.5 * MAX_GRAD_NORM
        with torch.no_grad():
            for name, parameter in parameters.items():
                term = None if rule is None else rule.gradient_term(parameter, torch.tensor(rule.arrays[name]))
                if term is not None and parameter.grad is not None:
                    parameter.grad += term
        optimizer.step()
        with torch.no_grad():
            for name, parameter in parameters.items():
                term = None if rule is None else rule.weight_term(torch.tensor(rule.arrays[name]), LEARNING_RATE)
                if term is not None and parameter.requires_grad:
                    parameter += term
    optimizer.zero_grad()
    for parameter in parameters.values():
        parameter.requires_grad_()
    return adapted.values()


@dataclass(frozen=True)
class Half(Proximal):
    """Freezes the factors A, and pulls B."""

    def trains(self, tensor: str) -> bool:
        return ".lora_B." in tensor


def test_the_formulas_give_the_numbers_of_the_notes() -> None:
    """With the deviation of a population the notes have .9998; trl divides by that of a sample."""
    assert advantages([1, 0, 0, 1]) == pytest.approx([0.8658754, -0.8658754, -0.8658754, 0.8658754], abs=1e-7)
    assert pytest.approx([0.9998], abs=1e-7) == [0.5 / (0.5 + 1e-4)]
    assert k3(-1.0, -1.2) == pytest.approx(0.0187308, abs=1e-7)


@pytest.mark.parametrize(
    ("kind", "kl"),
    [(None, 0.0), (None, 0.7), (Proximal, 0.0), (ControlVariate, 0.0), (Half, 0.7)],
    ids=["plain", "kl", "fedprox", "scaffold", "frozen-kl"],
)
def test_a_round_is_that_of_the_formula_with_the_client_rule(
    adapted: AdaptedModel,
    start: dict[str, Array],
    rows: list[EncodedRow],
    tmp_path: Path,
    kind: type[ClientRule] | None,
    kl: float,
) -> None:
    draw = np.random.default_rng(1)
    own = {name: (array + draw.normal(scale=0.1, size=array.shape)).astype(np.float32) for name, array in start.items()}
    rule = None if kind is None else kind(own) if kind is ControlVariate else kind(own, mu=0.3)
    told = train(adapted, start, rows, tmp_path, rule, kl)
    expected = by_hand(adapted, start, rows, told, rule, kl)
    assert farthest(told.values, expected) < 2e-5
    moved = {name: float(abs(array - start[name]).max()) for name, array in told.values.items()}
    assert all((distance > 1e-3) == (rule is None or rule.trains(name)) for name, distance in moved.items())
    assert [report.step for report in told.reports] == [1, 2]
    assert [report.loss for report in told.reports] == told.losses
    lengths = [
        GENERATIONS * sum(row.sides[0].prompt_length for row in rows[at : at + 2]) + 2 * GENERATIONS for at in (0, 2)
    ]
    assert all(report.num_tokens >= least for report, least in zip(told.reports, lengths, strict=True))
    assert list(tmp_path.iterdir()) == []


def test_one_seed_gives_one_adapter_however_the_batch_is_cut_and_the_model_is_as_it_was(
    adapted: AdaptedModel, start: dict[str, Array], rows: list[EncodedRow], tmp_path: Path
) -> None:
    examples = [instruct(row["instruction"], row["output"], row["input"]) for row in demo_rows(0)["train"][:8]]
    learnt = list(Encoder(adapted.tokenizer).encode(examples, 128))
    values = TrainSettings(
        batch_size=8, micro_batch_size=8, learning_rate=1e-3, weight_decay=0.0, max_grad_norm=1.0,
        gradient_checkpointing=False, seed=1,
    )  # fmt: skip

    def sft(model: AdaptedModel) -> dict[str, Array]:
        model.load(start)
        fit(model, learnt, SFT, values, on_step=lambda report: None)
        return model.values()

    fresh = make_model(dropout=0.1)
    before = sft(fresh)
    first = train(fresh, start, rows, tmp_path, kl=0.5, gradient_checkpointing=True)
    assert not {"forward", "_original_forward"} & {*vars(fresh.base), *vars(fresh.model)}
    assert list(fresh.model.peft_config) == ["default"]
    assert all(parameter.requires_grad for parameter in fresh.parameters.values())
    assert same_bits(sft(fresh), before), "dropout and all"
    again = train(fresh, start, rows, tmp_path, kl=0.5, gradient_checkpointing=True)
    assert same_bits(first.values, again.values)
    assert first.losses == again.losses
    parts = train(fresh, start, rows, tmp_path, kl=0.5, micro_batch_size=2)
    assert farthest(first.values, parts.values) < 2e-5
    other = train(fresh, start, rows, tmp_path, kl=0.5, seed=6)
    assert not same_bits(first.values, other.values)


# Federated

FEW = (
    *("federation.clients=2", "federation.rounds=2", "train.steps=2", "train.batch_size=8", "train.generations=4"),
    *("adapter.rank=4", "adapter.target_modules=[q_proj, v_proj]"),
)


def fedcli(*arguments: object, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=cwd, env=ENVIRONMENT | more, capture_output=True, text=True, timeout=300
    )


PLUGIN = '''"""A reward function of a package."""

from fedcli.tasks.rewards import Reward

LETTERS = Reward("letters", "the share of letters e", lambda answers: [
    answer.text.count("e") / max(1, len(answer.text)) for answer in answers
])
'''


def test_a_packages_reward_is_trained_with_any_algorithm_quietly_and_without_a_network(tmp_path: Path) -> None:
    asked: list[str] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Stay quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site = install(
        tmp_path / "package", "letters-reward", PLUGIN, {"fedcli.rewards": {"letters": "letters_reward:LETTERS"}}
    )
    online = python_path(site) | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    try:
        for algorithm in ("scaffold", "fedadam"):
            place = tmp_path / algorithm
            sets = settings(*FEW, "train.reward=letters", f"algorithm.name={algorithm}")
            assert fedcli("init", place, "--preset", "demo-grpo", *sets, cwd=tmp_path, **online).returncode == 0
            done = fedcli("run", "-w", place, "--json", cwd=tmp_path, **online)
            assert (done.returncode, done.stderr) == (0, "")
            assert json.loads(done.stdout)["state"] == "finished"
            checked = fedcli("verify", "-w", place, "--json", cwd=tmp_path, **online)
            assert json.loads(checked.stdout)["violations"] == []
            manifest = json.loads((place / "rounds/00001/manifest.json").read_text())
            train = manifest["train"]
            assert (train["generations"], train["max_new_tokens"], train["kl"]) == (4, 8, 0.0)
            assert (train["reward"], train["beta"]) == ("letters", None)
            assert all(0 < each["train_loss"] <= 1 for each in manifest["aggregation"]["counted"])
            left = {path.name.partition("-")[0] for path in (place / "private/0").iterdir()}
            assert left - {"lock"} == {"tokens"} | ({"control"} if algorithm == "scaffold" else set())
    finally:
        server.shutdown()
        server.server_close()
    assert asked == []
    without = fedcli("client", "train", "--id", "0", "-w", tmp_path / "scaffold", cwd=tmp_path)
    assert (without.returncode, without.stdout) == (3, "")
    assert "train.reward: unknown reward function 'letters'" in without.stderr
    assert "Traceback" not in without.stderr


def test_the_demo_raises_exact_answers_over_the_adapter_that_it_starts_from(tmp_path: Path) -> None:
    assert warm_fedcli("init", "sft", "--set", "federation.rounds=3", cwd=tmp_path).returncode == 0
    assert warm_fedcli("run", "-w", "sft", cwd=tmp_path).returncode == 0
    sets = settings(f"adapter.init={tmp_path}/sft/rounds/00003/adapter", "federation.rounds=3")
    done = warm_fedcli("init", "grpo", "--preset", "demo-grpo", *sets, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert warm_fedcli("run", "-w", "grpo", cwd=tmp_path).returncode == 0
    done = warm_fedcli("eval", "demo", "-w", "grpo", "--round", "0", "--round", "3", "--json", cwd=tmp_path)
    before, after = (each["scores"]["exact_match"]["value"] for each in json.loads(done.stdout)["scores"])
    assert 0.2 < before < after
    row = json.loads((tmp_path / "grpo/data/client-0.jsonl").read_text().partition("\n")[0])
    assert {*row} == {"prompt", "answer", "topic"}
    assert row["answer"] in LABELS


def test_masked_updates_of_grpo_merge_as_those_of_any_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "homes"))
    one = ("data.source=null", "federation.clients=3", "federation.rounds=1", "privacy.secure_aggregation=pairwise")
    place = tmp_path / "masked"
    homes = {"XDG_DATA_HOME": str(tmp_path / "homes")}
    done = fedcli("init", place, "--preset", "demo-grpo", *settings(*FEW, *one), cwd=tmp_path, **homes)
    assert done.returncode == 0, done.stderr
    federation = Federation.open(place)
    for client in range(3):
        rows = tmp_path / f"rows-{client}.jsonl"
        asked = demo_questions(client)["train"][:8]
        rows.write_text(
            "".join(json.dumps({"prompt": row["prompt"], "answer": "(?is)[a-m].*"}) + "\n" for row in asked)
        )
        joined = federation.client(client).join(rows, share="minimal", floors=["rows=4", "batch_size=2"])
        federation.server.enrol(client, joined.commit())
    done = [Federation.open(place).client(client).train() for client in range(3)]
    assert [each.status for each in done] == ["submitted"] * 3
    assert all(0 <= loss <= 1 for each in done for loss in each.training.losses)
    assert any(0 < loss < 1 for each in done for loss in each.training.losses)
    assert Federation.open(place).server.aggregate().status == "published"
    manifest = json.loads((place / "rounds/00001/manifest.json").read_text())
    assert [each["train_loss"] for each in manifest["aggregation"]["counted"]] == [None] * 3
    before, after = (Federation.open(place).round(number).adapter() for number in (0, 1))
    assert farthest(before, after) > 1e-4
    assert Federation.open(place).verify().violations == []
