"""Which settings stand together: each combination is refused by a configuration error with its reason, or it runs."""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from support.federation import Stub, configure
from support.processes import SMALL, settings

from fedcli import Federation, Observer
from fedcli.algos import ALGORITHMS
from fedcli.algos.robust import RuleName
from fedcli.cli import main
from fedcli.client.due import train_client
from fedcli.config.parsing import parse_config
from fedcli.errors import ConfigError
from fedcli.workspace.layout import Workspace

RULES: tuple[str, ...] = get_args(RuleName)
SHARES = ("[A, B]", "[B]", "[A]", "alternate")
ENCODINGS = ("f32", "f16", "bf16", "int8", "top_k")
LORAS = ("factors", "product", "exact")
NAMES = ("fedavg", "fedprox", "scaffold", "fedavgm", "fedadagrad", "fedyogi", "fedadam", "diloco")
TASKS = ("sft", "dpo", "kto", "orpo", "simpo", "grpo")
AXES = {
    "aggregation.rule": RULES,
    "aggregation.share": SHARES,
    "aggregation.encoding": ENCODINGS,
    "aggregation.lora": LORAS,
    "algorithm.name": NAMES,
}
BESIDE = {"aggregation.step_weighting": ("none", "fednova"), "aggregation.staleness": (0, 2)}
CLIENTS = 3
"""As many as krum needs where it tolerates none."""


def test_the_axes_are_all_that_there_is():
    assert {*NAMES} == {*ALGORITHMS._own}


def _combinations(axes: dict[str, tuple[object, ...]]) -> Iterator[dict[str, object]]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _document(chosen: dict[str, object]) -> dict[str, object]:
    """Return fedcli.yaml with these keys."""
    document: dict[str, dict[str, object]] = {
        "federation": {"clients": CLIENTS, "rounds": 2},
        "aggregation": {"tolerate": 0},
        "train": {"batch_size": 4, "steps": 2, "reward": "regex" if chosen.get("task") == "grpo" else None},
    }
    for key, value in chosen.items():
        section, _, name = key.partition(".")
        if name:
            value = ["A", "B"] if value == "[A, B]" else [value[1]] if str(value).startswith("[") else value
            document.setdefault(section, {})[name] = value
        else:
            document[section] = value  # type: ignore[assignment]
    return document


def _refusal(chosen: dict[str, object]) -> str | None:
    """Return why a combination is refused; None where it is not."""
    try:
        parse_config(_document(chosen), "fedcli.yaml")
    except ConfigError as error:
        return error.message
    return None


@pytest.mark.slow
def test_each_refused_combination_is_refused_for_a_pair_of_its_own_keys():
    """Of all rules, shares, encodings, products, algorithms and tasks, and of what is late and unequal beside them."""
    found: Counter[bool] = Counter()
    for chosen in _combinations({**AXES, "task": TASKS}):
        refusal = _refusal(chosen)
        found[refusal is None] += 1
        if refusal is not None:
            assert "exclude each other: " in refusal or "takes no account" in refusal, (chosen, refusal)
            told = refusal.partition("exclude each other")[0]
            assert sum(f"{key}: " in told for key in chosen) >= 2, (chosen, refusal)
    assert found[True] > 1000
    assert found[False] > 1000


def _covering(axes: dict[str, tuple[object, ...]]) -> list[dict[str, object]]:
    """Return combinations that are allowed, among which each allowed pair of values of two axes occurs."""
    allowed = [chosen for chosen in _combinations(axes) if _refusal(chosen) is None]
    pairs = {pair for chosen in allowed for pair in itertools.combinations(chosen.items(), 2)}
    kept = []
    while pairs:
        best = max(allowed, key=lambda chosen: len(pairs & {*itertools.combinations(chosen.items(), 2)}))
        kept.append(best)
        pairs -= {*itertools.combinations(best.items(), 2)}
    return kept


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose round 0 is made again for each combination."""
    folder = tmp_path_factory.mktemp("combinations") / "here"
    rows = ("data.source=builtin:demo", "data.partition=iid", "data.max_rows=60", f"federation.clients={CLIENTS}")
    assert main(["init", str(folder), *settings(*SMALL, *rows)]) == 0
    return folder


@pytest.mark.slow
def test_each_allowed_pair_of_settings_of_a_merge_runs_two_rounds_and_verifies(template, tmp_path):
    """Clients do all that they do but for the model; all that is published is computed again."""
    axes = {**AXES, **BESIDE}
    chosen_ones = _covering(axes)
    assert len(chosen_ones) >= len(RULES) * len(NAMES) / 2
    for number, chosen in enumerate(chosen_ones):
        folder = Path(shutil.copytree(template, tmp_path / str(number)))
        shutil.rmtree(folder / "rounds")
        configure(folder, "aggregation.tolerate=0", *(f"{key}={value}" for key, value in chosen.items()))
        Federation(Workspace(folder)).server.open()
        federation = Federation.open(folder)
        for _ in range(2):
            for client in range(CLIENTS):
                done = train_client(federation.state, client, Stub(), observer=Observer())
                assert done.status == "submitted", (chosen, done)
            federation.server.aggregate()
        assert federation.state.head.manifest.state == "finished", chosen
        assert federation.verify().violations == [], chosen
        shutil.rmtree(folder)


@pytest.mark.slow
def test_each_allowed_pair_with_a_task_trains_a_real_model_and_verifies(tmp_path):
    """The built-in model: a round of each task with each rule, share, encoding, product and algorithm that it bears."""
    axes = {"task": TASKS, **AXES}
    for number, chosen in enumerate(_covering(axes)):
        folder = tmp_path / str(number)
        document = _document(chosen)
        given = [f"{key}={value}" for key, value in chosen.items()]
        small = ("federation.rounds=1", "train.steps=1", "train.batch_size=4", f"federation.clients={CLIENTS}")
        small += (
            "adapter.rank=2",
            "aggregation.tolerate=0",
            "adapter.target_modules=[q_proj]",
            "data.partition=iid",
            "data.max_rows=60",
        )
        reward = ("train.reward=regex",) if json.dumps(document["train"]).count("regex") else ()
        assert main(["init", str(folder), *settings("data.source=builtin:demo", *small, *reward, *given)]) == 0, chosen
        assert main(["run", "-w", str(folder)]) == 0, chosen
        assert Federation.open(folder).verify().violations == [], chosen
        shutil.rmtree(folder)
