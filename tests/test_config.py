"""fedcli.yaml: defaults, faults, overrides, the schedule, and what may not change."""

import math
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from support.processes import settings

from fedcli import Federation
from fedcli.algos import ALGORITHMS
from fedcli.cli import main
from fedcli.config import Config, algorithm_from, apply_overrides, parse_config, read_document
from fedcli.errors import ConfigError, IntegrityError, UsageError
from fedcli.server.create import presets
from fedcli.workspace.layout import Workspace

HERE = Path("fedcli.yaml")


def config_of(text: str) -> Config:
    return parse_config(read_document(text, HERE), HERE)


def set_to(override: str) -> object:
    document: dict[str, object] = {}
    apply_overrides(document, [f"a.b={override}"])
    return document["a"]["b"]  # type: ignore[index]


def fault_of(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config_of(text)
    assert caught.value.message.startswith("fedcli.yaml has 1 fault:\n  ")
    return caught.value.message.partition("\n  ")[2]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("train: {steps: yes}", "train: steps is true, which is no number"),
        ("train: {steps: {max: on, epochs: 1}}", "train.steps: max is true, which is no number"),
        ("federation: {per_round: false}", "federation: per_round is false, which is no number"),
        ("aggregation: {lora_fair: true}", "aggregation: lora_fair is true, which is no number"),
        ("eval: {every: true}", "eval: every is true, which is no number"),
        ("adapter: {alpha: true}", "adapter: alpha is true, which is no number"),
    ],
)
def test_true_and_false_are_no_numbers(text: str, fault: str) -> None:
    assert fault in fault_of(text)
    assert config_of("aggregation: {lora_fresh: true, lora: exact}").aggregation.lora_fresh


def test_the_defaults_are_the_contracts() -> None:
    expected = {
        "task": "sft",
        "model": {"base": "builtin:tiny", "quantization": "none", "revision": None, "trust_remote_code": False},
        "adapter": {
            "rank": 32,
            "alpha": 64,
            "dropout": 0.05,
            "target_modules": None,
            "init": None,
        },
        "train": {
            "steps": 10,
            "batch_size": 16,
            "max_length": 512,
            "learning_rate": 5e-5,
            "learning_rate_min": 1e-6,
            "beta": None,  # the task's: 0.1 of dpo
            "gradient_checkpointing": False,
        },
        "data": {"format": None},
        "algorithm": {"name": "fedavg"},
        "federation": {"quorum": 1.0},
    }
    found = config_of("").model_dump(mode="json")
    for section, values in expected.items():
        chosen = {key: found[section][key] for key in values} if isinstance(values, dict) else found[section]
        assert chosen == values


@pytest.mark.parametrize(
    ("name", "hyperparameters"),
    [
        ("fedavg", {}),
        ("fedprox", {"mu": 0.01}),
        ("scaffold", {}),
        ("fedavgm", {"beta1": 0.9, "momentum": "damped"}),
        ("fedadagrad", {"eta": 1e-3, "tau": 1e-3}),
        ("fedyogi", {"eta": 1e-3, "tau": 1e-3, "beta1": 0.9, "beta2": 0.99, "second_moment": "momentum"}),
        ("fedadam", {"eta": 1e-3, "tau": 1e-3, "beta1": 0.9, "beta2": 0.99, "second_moment": "momentum"}),
        ("diloco", {"eta": 0.7, "mu": 0.9}),
    ],
)
def test_an_algorithm_has_its_hyperparameters_with_their_defaults_and_no_other(
    name: str, hyperparameters: dict[str, object]
) -> None:
    config = config_of(f"algorithm: {{name: {name}}}")
    assert config.model_dump(mode="json")["algorithm"] == {"name": name, **hyperparameters}
    assert asdict(config.algorithm) == {"name": name, **hyperparameters}  # as a manifest has it
    assert algorithm_from({"name": name}) == algorithm_from(asdict(config.algorithm)) == config.algorithm


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"name": "odd"},
        {"name": "fedprox", "mu": -1.0},
        {"name": "fedavg", "mu": 0.01},
        {"name": "fedadam", "tau": 0},
    ],
)
def test_a_manifest_with_an_unknown_algorithm_is_no_fault_of_the_configuration(record: dict[str, object]) -> None:
    with pytest.raises(IntegrityError, match="this version does not know"):
        algorithm_from(record)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("trian: {steps: 2}", "trian: unknown key. Did you mean train?"),
        ("train: {stepz: 2}", "train.stepz: unknown key. Did you mean steps?"),
        ("adapter: {rnak: 2}", "adapter.rnak: unknown key. Did you mean rank?"),
        ("federation: {client: 2}", "federation.client: unknown key. Did you mean clients?"),
        ("model: {bse: x}", "model.bse: unknown key. Did you mean base?"),
        ("data: {sorce: x}", "data.sorce: unknown key. Did you mean source?"),
        ("algorithm: {name: fedavg, nam: 1}", "algorithm.nam: unknown key. Did you mean name?"),
        ("algorithm: {name: fedagv}", "algorithm.name: unknown algorithm 'fedagv'. Did you mean fedavg or fedavgm?"),
        (
            "algorithm: {name: zzz}",
            f"algorithm.name: unknown algorithm 'zzz'. Known: {', '.join(sorted(ALGORITHMS))}.",
        ),
        ("algorithm: {name: fedyogi, second: delta}", "algorithm.second: unknown key. Did you mean second_moment?"),
        ("algorithm: {name: fedadam, beta: 0.1}", "algorithm.beta: unknown key. Did you mean beta2 or beta1?"),
        # Hyperparameters of another algorithm:
        ("aggregation: {encoding: int4}", "aggregation.encoding: unknown encoding 'int4'. Did you mean int8?"),
        (
            "clusters: {by: groups, groups: {a: [0, 1, 2, 3, 4], b: []}}",
            "clusters: groups.b names no client: nobody would train its adapter",
        ),
        (
            "clusters: {by: loss, count: 6}",
            "clusters.count is 6, and federation.clients is 5: an adapter would have no client",
        ),
        (
            "clusters: {by: loss, count: 2, split_below: 0.3}",
            "clusters: split_below is of by: direction, and by is loss",
        ),
        ("algorithm: {name: fedavg, mu: 0.1}", "algorithm.mu: unknown key. Known: name."),
        ("algorithm: {name: scaffold, state_prefixes: 1}", "algorithm.state_prefixes: unknown key. Known: name."),
        ("algorithm: {name: fedprox, eta: 0.1}", "algorithm.eta: unknown key. Known: mu, name."),
        (
            "algorithm: {name: fedavgm, second_moment: delta}",
            "algorithm.second_moment: unknown key. Known: beta1, momentum, name.",
        ),
        ("algorithm: {name: fedadagrad, beta1: 0.9}", "algorithm.beta1: unknown key. Did you mean eta?"),
    ],
)
def test_an_unknown_name_is_a_fault_that_names_the_nearest_match(text: str, fault: str) -> None:
    assert fault_of(text) == fault


def test_an_unknown_key_of_a_partition_names_the_nearest_match() -> None:
    with pytest.raises(ConfigError, match=r"shard_by: unknown key\. Did you mean shards_by\?"):
        config_of("data: {partition: {shard_by: topic}}")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("train: {steps: 0}", "train.steps: Input should be greater than or equal to 1 (found 0)"),
        ("adapter: {dropout: 1.0}", "adapter.dropout: Input should be less than 1 (found 1.0)"),
        ("adapter: {target_modules: []}", "adapter.target_modules: a list of linear layers is wanted here"),
        ("train: {learning_rate: .inf}", "train.learning_rate: Input should be a finite number (found inf)"),
        ("train: {learning_rate: 1e-7}", "train: learning_rate_min is larger than learning_rate"),
        (
            "federation: {deadline: soon}",
            "federation.deadline: not a length of time such as 90s, 30m, 2h or 1d (found soon)",
        ),
        ("federation: {deadline: true}", "federation.deadline: not a length of time such as 90s"),
        ("train: {micro_batch_size: 3}", "train: micro_batch_size 3 does not divide batch_size 16"),
        ("train: {beta: 0}", "train.beta: Input should be greater than 0 (found 0)"),
        ("train: {beta: -0.1}", "train.beta: Input should be greater than 0 (found -0.1)"),
        ("train: {beta: .inf}", "train.beta: Input should be a finite number (found inf)"),
        ("train: {gradient_checkpointing: maybe}", "train.gradient_checkpointing: Input should be a valid boolean"),
        ("task: rlhf", "task: unknown task 'rlhf'. Known: dpo, grpo, kto, orpo, sft, simpo."),
        ("task: dop", "task: unknown task 'dop'. Did you mean dpo?"),
        ("model: {quantization: int4}", "model.quantization: unknown quantization 'int4'. Did you mean int8?"),
        ("data: {format: csv}", "data.format: unknown format 'csv'. Known: alpaca, codealpaca, fingpt, "),
        (
            "data: {format: prefernce}",
            "data.format: unknown format 'prefernce'. Did you mean preference or openai-preference?",
        ),
        ("data: {template: alpca}", "data.template: unknown template 'alpca'. Did you mean alpaca?"),
        ("data: {partition: source}", "data.partition: unknown partition 'source'. Did you mean sources?"),
        ("algorithm: {name: fedprox, mu: -1}", "algorithm.mu: Input should be greater than or equal to 0 (found -1)"),
        ("algorithm: {name: fedadagrad, eta: 0}", "algorithm.eta: Input should be greater than 0 (found 0)"),
        ("algorithm: {name: fedadam, tau: .nan}", "algorithm.tau: Input should be a finite number (found nan)"),
        ("algorithm: {name: fedavgm, beta1: 1.0}", "algorithm.beta1: Input should be less than 1 (found 1.0)"),
        ("algorithm: {name: fedyogi, beta2: -0.1}", "algorithm.beta2: Input should be greater than or equal to 0"),
        (
            "algorithm: {name: fedyogi, second_moment: square}",
            "algorithm.second_moment: unknown second_moment 'square'. Known: delta, momentum.",
        ),
        (
            "algorithm: {name: fedavgm, momentum: nesterov}",
            "algorithm.momentum: unknown momentum 'nesterov'. Known: damped, heavy_ball.",
        ),
        (
            "algorithm: fedavg",
            "algorithm: it is a section with a name, as in algorithm: {name: fedavg} (found 'fedavg')",
        ),
        ("federation: {per_round: 6}", "federation: per_round 6 is more than the 5 clients"),
        ("federation: {quorum: 0}", "federation.quorum: Input should be greater than 0 (found 0)"),
        ("train: 5", "train: a section is wanted"),
    ],
)
def test_a_value_out_of_range_is_a_fault_of_its_key(text: str, fault: str) -> None:
    assert fault_of(text).startswith(fault)


@pytest.mark.parametrize("text", ["algorithm: {}", "algorithm: {mu: 0.1}"])
def test_an_algorithm_needs_a_name(text: str) -> None:
    assert fault_of(text) == f"algorithm: it has no name. Known: {', '.join(ALGORITHMS)}."


@pytest.mark.parametrize(("task", "fits", "other"), [("sft", "alpaca", "preference"), ("dpo", "preference", "alpaca")])
def test_the_rows_must_be_of_the_format_of_the_task(task: str, fits: str, other: str) -> None:
    assert config_of(f"task: {task}").task == task
    assert config_of(f"task: {task}\ndata: {{format: {fits}}}").data.format == fits
    fault = fault_of(f"task: {task}\ndata: {{format: {other}}}")
    assert f"data.format {other} is not for task {task}, whose formats are {fits}, " in fault
    assert fault.count(other) == 1  # it is not among those


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_a_base_model_may_be_quantised(quantization: str) -> None:
    assert config_of(f"model: {{quantization: {quantization}}}").model.quantization == quantization


def test_all_faults_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        config_of("train: {steps: 0, batch: 1}\nfederation: {rounds: x}")
    heading, *faults = caught.value.message.split("\n  ")
    assert heading == "fedcli.yaml has 3 faults:"
    assert sorted(fault.split(":")[0] for fault in faults) == ["federation.rounds", "train.batch", "train.steps"]


@pytest.mark.parametrize("text", ["task: sft\ntask: sft\n", "train:\n  steps: 1\n  steps: 2\n"])
def test_a_key_that_stands_twice_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"duplicate key '(task', line 2|steps', line 3)"):
        read_document(text, HERE)


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "- 1", "just text", "a: !!python/object:x.y {}"])
def test_what_is_no_mapping_of_yaml_is_refused_with_its_file(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^fedcli\.yaml "):
        read_document(text, HERE)


def test_every_preset_loads() -> None:
    shipped = presets()
    assert "demo" in shipped
    for path in shipped.values():
        parse_config(read_document(path.read_text(encoding="utf-8"), path), path)


def test_every_yaml_file_that_ships_is_yaml() -> None:
    files = [path for pattern in ("*.yaml", "*.yml") for path in presets()["demo"].parents[1].rglob(pattern)]
    assert files
    for path in files:
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20", 20),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("{shards_by: topic}", {"shards_by": "topic"}),
        ("a=b", "a=b"),
        ("builtin:tiny", "builtin:tiny"),
        ("5e-5", "5e-5"),  # PyYAML's float needs a point; the type of the key makes it a number
    ],
)
def test_the_value_of_an_override_is_yaml(text: str, value: object) -> None:
    assert set_to(text) == value


def test_overrides_take_the_types_of_their_keys() -> None:
    document = {"train": {"steps": 3}, "data": {"partition": "iid"}}
    apply_overrides(
        document,
        [
            "train.steps=20",
            "train.learning_rate=5e-5",
            "adapter.target_modules=[q_proj]",
            "data.partition.shards_by=topic",
            "model.base=./my=model",
        ],
    )
    config = parse_config(document, HERE)
    assert (config.train.steps, config.train.learning_rate) == (20, 5e-5)
    assert config.adapter.target_modules == ("q_proj",)
    assert config.data.partition.model_dump() == {"shards_by": "topic"}
    assert config.model.base == "./my=model"


@pytest.mark.parametrize("override", ["train.steps", "=5", "train.=5", ".steps=5", "train..steps=5", ""])
def test_a_malformed_override_is_a_usage_error(override: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UsageError, match=r"is not of the form key\.path=value"):
        apply_overrides({}, [override])
    assert main(["init", str(tmp_path / "w"), *settings(override)]) == 2
    assert f"--set {override!r}" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_the_learning_rate_falls_along_a_cosine() -> None:
    train = config_of("train: {learning_rate: 4.0e-3, learning_rate_min: 4.0e-4}").train
    assert train.learning_rate_of(0, 10) == 4e-3
    assert train.learning_rate_of(10, 10) == pytest.approx(4e-4, rel=1e-15)
    assert train.learning_rate_of(5, 10) == pytest.approx(2.2e-3, rel=1e-15)
    for number in range(11):
        formula = 4e-4 + (4e-3 - 4e-4) * (1 + math.cos(math.pi * number / 10)) / 2
        assert train.learning_rate_of(number, 10) == formula


@pytest.mark.parametrize(
    ("quorum", "cohort", "needed"),
    [(1.0, 5, 5), (0.5, 5, 3), (0.6, 5, 3), (0.1, 5, 1), (0.7, 10, 7), (0.07, 100, 7), (0.29, 100, 29)],
)
def test_the_quorum_is_counted_in_exact_decimals(quorum: float, cohort: int, needed: int) -> None:
    # In binary floating point 0.07 x 100 is 7.000000000000001, whose ceiling is 8.
    assert config_of(f"federation: {{quorum: {quorum}}}").federation.needed_answers(cohort) == needed


def test_a_config_is_frozen() -> None:
    config = config_of("")
    for section, key in ((config, "task"), (config.train, "steps"), (config.federation, "rounds")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 1)
    with pytest.raises(AttributeError):
        config.algorithm.name = "other"


@pytest.mark.parametrize(
    ("section", "key", "value", "fault"),
    [
        ("model", "revision", "v2", "model.revision: was None, is now 'v2'"),
        ("model", "quantization", "nf4", "model.quantization: was 'none', is now 'nf4'"),
        ("adapter", "rank", 8, "adapter.rank: was 4, is now 8"),
        ("federation", "clients", 4, "federation.clients: was 3, is now 4"),
        ("federation", "seed", 1, "federation.seed: was 0, is now 1"),
    ],
)
def test_what_init_fixed_may_not_change(small: Path, section: str, key: str, value: object, fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        assert Federation(edited(small, section, key, value)).state.config
    assert caught.value.message.endswith(f"changes what was fixed by `fedcli init`:\n  {fault}")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "base", "moved/there"),
        ("train", "steps", 7),
        ("train", "beta", 0.5),
        ("train", "gradient_checkpointing", True),
        ("federation", "rounds", 9),
        ("federation", "quorum", 0.5),
        ("data", "max_rows", 3),
    ],
)
def test_the_rest_may_change_between_rounds(small: Path, section: str, key: str, value: object) -> None:
    assert getattr(getattr(Federation(edited(small, section, key, value)).state.config, section), key) == value


def test_the_task_may_not_change(small: Path) -> None:
    path = small / "fedcli.yaml"
    document = yaml.safe_load(path.read_text())
    del document["data"]
    path.write_text(yaml.safe_dump(document | {"task": "dpo"}))
    with pytest.raises(ConfigError, match="task: was 'sft', is now 'dpo'"):
        assert Federation.open(small)


def test_the_algorithm_may_change_between_rounds(small: Path) -> None:
    path = small / "fedcli.yaml"
    document = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(document | {"algorithm": {"name": "fedprox", "mu": 0.5}}))
    algorithm = Federation.open(small).state.config.algorithm
    assert asdict(algorithm) == {"name": "fedprox", "mu": 0.5}


def edited(folder: Path, section: str, key: str, value: object) -> Workspace:
    path = folder / "fedcli.yaml"
    document = yaml.safe_load(path.read_text())
    document[section][key] = value
    path.write_text(yaml.safe_dump(document))
    return Workspace(folder)
