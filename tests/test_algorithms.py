"""The eight algorithms: their formulas, written again here from the contract, and what real servers make of them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.federation import read_adapter, read_manifest, stored_hashes
from support.formulas import OTHER, Formulas, drop_all
from support.processes import SMALL, fedcli, settings

from fedcli import Federation
from fedcli.algos import ALGORITHMS, FedAvg, MergedUpdates
from fedcli.algos.adaptive import FedAdagrad, FedAdam, FedYogi
from fedcli.algos.client_rule import ControlVariate
from fedcli.algos.diloco import DiLoCo
from fedcli.algos.fedavgm import FedAvgM
from fedcli.algos.fedprox import FedProx
from fedcli.algos.reducer import BLOCK, Stacks, WeightedMean
from fedcli.algos.scaffold import DELTA_FILE, Scaffold
from fedcli.cli import main
from fedcli.config import apply_overrides, parse_config
from fedcli.errors import ConfigError

VARIANTS = (
    {"name": "fedavg"},
    {"name": "fedprox", "mu": 0.5},
    {"name": "scaffold"},
    {"name": "fedavgm"},
    {"name": "fedavgm", "beta1": 0.8, "momentum": "heavy_ball"},
    {"name": "fedadagrad", "eta": 0.05, "tau": 0.01},
    {"name": "fedyogi"},
    {"name": "fedyogi", "second_moment": "delta", **OTHER},
    {"name": "fedadam", **OTHER},
    {"name": "fedadam", "second_moment": "delta"},
    {"name": "diloco", "eta": 0.7, "mu": 0.8},
)
OFTEN = ("fedavg", "scaffold", "fedadagrad", "fedyogi")
"""The variants that every run tries: those without settings that others have as well."""


@pytest.mark.parametrize(
    "algorithm",
    [
        pytest.param(
            variant,
            id="-".join(map(str, variant.values())),
            marks=[] if variant["name"] in OFTEN and "second_moment" not in variant else pytest.mark.slow,
        )
        for variant in VARIANTS
    ],
)
def test_five_rounds_are_the_formulas_and_a_restart_between_them_changes_no_bit(tmp_path, algorithm):
    processes = tmp_path / "processes"
    overrides = ["federation.rounds=5", "federation.per_round=2", *(f"algorithm.{k}={v}" for k, v in algorithm.items())]
    assert main(["init", str(processes), *settings(*SMALL, *overrides)]) == 0
    looped = Path(shutil.copytree(processes, tmp_path / "looped"))
    formulas = Formulas(read_adapter(looped, 0), **algorithm)
    formulas.check(processes, 0)
    took_part = []
    for number in range(5):
        updates = drop_all(processes, number)
        drop_all(looped, number)
        took_part.append(sorted(updates))
        formulas.step(updates)
        done = fedcli("server", "aggregate", cwd=processes)
        assert done.returncode == 0, done.stderr
        assert Federation.open(looped).server.aggregate().published
        formulas.check(processes, number + 1)
        assert stored_hashes(processes / "rounds") == stored_hashes(looped / "rounds")
    assert [len(cohort) for cohort in took_part] == [2] * 5
    assert {client for cohort in took_part for client in cohort} == {0, 1, 2}
    recorded = read_manifest(processes, 5)["aggregation"]["algorithm"]
    assert recorded.items() >= algorithm.items()


QUARTERS = {"eta": 0.5, "tau": 2.0, "beta1": 0.5, "beta2": 0.75}
PLAIN = ([1, -2, 0.5], [-1, 0, 0.25])
ADAM = ([2, -2, 0], [6, -2, 0])
ADAM_FIRST = ([1.25, 1.75, 3], {"m.w": ADAM[0], "v.w": [4, 4, 3]})
YOGI = ([2, 1, -4], [-2, 5, 0])  # g is v, under it, and over it
Y, Z = 2 + 0.5 / (3.75**0.5 + 2), 3 - 2 / (8**0.5 + 2)
YOGI_FIRST = ([1.25, Y, Z], {"m.w": YOGI[0], "v.w": [4, 3.75, 8]})
MOMENTUM_FIRST = ([2, 0, 3.5], {"m.w": PLAIN[0]})
STEPS = (
    (FedAvg(), PLAIN, ([2, 0, 3.5], {}), ([1, 0, 3.75], {})),
    (FedProx(mu=0.5), PLAIN, ([2, 0, 3.5], {}), ([1, 0, 3.75], {})),
    (Scaffold(), PLAIN, ([2, 0, 3.5], {"w": [0.5, -1, 0]}), ([1, 0, 3.75], {"w": [0.75, 0, 2]})),
    (FedAvgM(beta1=0.5), PLAIN, MOMENTUM_FIRST, ([2, -1, 3.875], {"m.w": [0, -1, 0.375]})),
    (FedAvgM(beta1=0.5, momentum="heavy_ball"), PLAIN, MOMENTUM_FIRST, ([1.5, -1, 4], {"m.w": [-0.5, -1, 0.5]})),
    (
        FedAdagrad(eta=0.5, tau=3.0),
        ([4, -4, 0], [12, 0, -4]),
        ([1.25, 1.75, 3], {"v.w": [25, 25, 9]}),
        ([1.625, 1.75, 2.75], {"v.w": [169, 25, 25]}),
    ),
    (
        FedAdam(**QUARTERS),
        ADAM,
        ADAM_FIRST,
        ([1.25 + 2 / (7**0.5 + 2), 1.5, 3], {"m.w": [4, -2, 0], "v.w": [7, 4, 2.25]}),
    ),
    (
        FedAdam(**QUARTERS, second_moment="delta"),
        ADAM,
        ADAM_FIRST,
        ([1.25 + 2 / (12**0.5 + 2), 1.5, 3], {"m.w": [4, -2, 0], "v.w": [12, 4, 2.25]}),
    ),
    (
        FedYogi(**QUARTERS),
        YOGI,
        YOGI_FIRST,
        ([1.25, Y + 1.5 / (6**0.5 + 2), Z - 1 / (7**0.5 + 2)], {"m.w": [0, 3, -2], "v.w": [4, 6, 7]}),
    ),
    (
        FedYogi(**QUARTERS, second_moment="delta"),
        YOGI,
        YOGI_FIRST,
        ([1.25, Y + 1.5 / (10**0.5 + 2), Z - 1 / (8**0.5 + 2)], {"m.w": [0, 3, -2], "v.w": [4, 10, 8]}),
    ),
    (
        DiLoCo(eta=0.5, mu=0.5),
        PLAIN,
        ([1.75, 0.5, 3.375], {"m.w": PLAIN[0]}),
        ([1.125, 0.25, 3.625], {"m.w": [-0.5, -1, 0.5]}),
    ),
)


@pytest.mark.parametrize(("algorithm", "means", "first", "second"), STEPS)
def test_two_steps_give_these_numbers_and_leave_their_inputs_alone(algorithm, means, first, second):
    adapter, state = {"w": np.array([1, 2, 3], np.float32)}, {}
    controls = ([0.5, -1, 0], [0.25, 1, 2]) if algorithm.update_files else (None, None)
    for mean, control, (expected, expected_state) in zip(means, controls, (first, second), strict=True):
        sent = {"w": np.array(control)} if control else {}
        merged = MergedUpdates({"w": np.array(mean, float)}, {DELTA_FILE: sent})
        inputs = [adapter, merged.difference, sent, state]
        copies = [{name: array.copy() for name, array in arrays.items()} for arrays in inputs]
        adapter, state = algorithm.apply(*inputs[:1], merged, state)
        for before, after in zip(copies, inputs, strict=True):
            assert before.keys() == after.keys()
            assert all((before[name] == after[name]).all() for name in before)
        assert {array.dtype for array in (adapter | state).values()} == {np.dtype(np.float32)}
        np.testing.assert_allclose(adapter["w"], expected, rtol=2e-7, atol=0)
        assert {name: array.tolist() for name, array in state.items()} == expected_state


def test_diloco_makes_the_steps_of_its_vector():
    adapter, state, found = {"w": np.zeros(1, np.float32)}, {}, []
    for difference in (1.0, 1.0, 0.0):
        adapter, state = DiLoCo().apply(adapter, MergedUpdates({"w": np.array([difference])}), state)
        found.append((round(float(adapter["w"][0]), 4), round(float(state["m.w"][0]), 4)))
    assert found == [(1.33, 1.0), (3.227, 1.9), (4.3043, 1.71)]


def test_the_table_of_steps_has_every_algorithm():
    assert {type(algorithm) for algorithm, *_ in STEPS} == set(ALGORITHMS.values())
    assert {variant["name"] for variant in VARIANTS} == set(ALGORITHMS)


@pytest.mark.parametrize("make", [lambda values: np.array(values, np.float32), torch.tensor])
def test_client_rules_give_arrays_and_tensors_the_same_terms(make):
    w, x, c = make([1.0, -2.0, 4.0]), make([0.5, 2.0, 4.0]), make([4.0, -8.0, 0.0])
    prox, scaffold = FedProx(mu=0.5).client_rule({"w": x}, {}, {}), ControlVariate({"w": c})
    assert prox.arrays["w"] is x
    assert type(prox.gradient_term(w, x)) is type(scaffold.weight_term(c, 0.25)) is type(w)
    assert prox.gradient_term(w, x).tolist() == [0.25, -2.0, 0.0]
    assert scaffold.weight_term(c, 0.25).tolist() == [-1.0, 2.0, 0.0]
    assert (prox.weight_term(x, 0.25), scaffold.gradient_term(w, c)) == (None, None)


def test_only_fedprox_and_scaffold_change_how_clients_train():
    assert {name for name, kind in ALGORITHMS.items() if kind().changes_clients()} == {"fedprox", "scaffold"}


def test_a_control_delta_is_the_second_option_of_the_paper():
    x, y, c = ({"w": np.array(v, np.float32)} for v in ([1, 2, 3], [0.5, 2.5, 3], [0.25, 0, -1]))
    sent, kept = Scaffold().client_step(x, y, c, {"w": np.float32([1, 0, 2])}, steps=2, learning_rate=0.25)
    assert (sent[DELTA_FILE]["w"].dtype, sent[DELTA_FILE]["w"].tolist()) == (np.float32, [0.75, -1, 1])
    assert (kept["w"].dtype, kept["w"].tolist()) == (np.float32, [1.75, -1, 3])


OUT_OF_RANGE = """
fedprox.mu=-0.01 fedprox.mu=.nan fedadagrad.eta=0 fedadagrad.tau=0 fedadam.eta=-1 fedadam.eta=.inf fedadam.beta2=1
fedyogi.tau=-0.001 fedyogi.tau=.nan fedyogi.beta1=1.5 fedyogi.second_moment=difference fedavgm.beta1=1
fedavgm.beta1=-0.1 fedavgm.momentum=nesterov fedavg.mu=0.01
"""


@pytest.mark.parametrize("setting", OUT_OF_RANGE.split())
def test_a_hyperparameter_out_of_range_is_a_fault_of_its_key(setting):
    name, _, override = setting.partition(".")
    document = {"algorithm": {"name": name}}
    apply_overrides(document, [f"algorithm.{override}"])
    with pytest.raises(ConfigError, match=rf"has 1 fault:\n  algorithm\.{override.split('=')[0]}: "):
        parse_config(document, Path("fedcli.yaml"))


CURVATURES = np.array([[1, 2, 4], [3, 1, 0.5]])
OPTIMA = np.array([[1, 0, -1], [-1, 2, 3]])
SGD_STEPS, RATE = 50, 0.05


def train_on_quadratics(algorithm, rounds, clients=(0, 1)):
    """Return x after some rounds of plain SGD on sum_i a_i (w_i - b_i)^2 / 2, two clients of equal weight."""
    x, state = {"w": np.zeros(3, np.float32)}, {}
    own = {client: {} for client in clients}
    for _ in range(rounds):
        differences, files = algorithm.reducer(), {name: algorithm.file_reducer(2) for name in algorithm.update_files}
        for client in clients:
            rule = algorithm.client_rule(x, state, own[client])
            w = x["w"].astype(np.float64)
            for _ in range(SGD_STEPS):
                gradient = CURVATURES[client] * (w - OPTIMA[client])
                pull = rule.gradient_term(w, rule.arrays["w"]) if rule else None
                w = w - RATE * (gradient if pull is None else gradient + pull)
                shift = rule.weight_term(rule.arrays["w"], RATE) if rule else None
                w = w if shift is None else w + shift
            differences.add({"w": w - x["w"]}, algorithm.weight(10))
            sent, own[client] = algorithm.client_step(
                x, {"w": w}, state, own[client], steps=SGD_STEPS, learning_rate=RATE
            )
            for name, arrays in sent.items():
                files[name].add(arrays, 1.0)
        none = Stacks({}, [])
        merged = MergedUpdates(differences.result(none), {name: file.result(none) for name, file in files.items()})
        x, state = algorithm.apply(x, merged, state)
    return x["w"]


def test_scaffold_reaches_the_joint_optimum_of_two_quadratics_and_fedavg_does_not():
    optimum = (CURVATURES * OPTIMA).sum(axis=0) / CURVATURES.sum(axis=0)
    reached = 1 - (1 - RATE * CURVATURES) ** SGD_STEPS  # of the way to its own optimum, by a client in one round
    drifted = (reached * OPTIMA).sum(axis=0) / reached.sum(axis=0)
    assert np.abs(drifted - optimum).min() > 0.25
    np.testing.assert_allclose(train_on_quadratics(FedAvg(), 100), drifted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(train_on_quadratics(Scaffold(), 100), optimum, rtol=0, atol=1e-5)


def test_fedprox_is_fedavg_without_mu_and_tends_to_it():
    fedavg = train_on_quadratics(FedAvg(), 20)
    assert (train_on_quadratics(FedProx(mu=0.0), 20) == fedavg).all()
    distances = [np.abs(train_on_quadratics(FedProx(mu=mu), 20) - fedavg).max() for mu in (1e-1, 1e-2, 1e-3)]
    assert 1e-2 < distances[0] < 1e-1
    assert distances[0] / distances[1] == pytest.approx(10, rel=0.2)
    assert distances[1] / distances[2] == pytest.approx(10, rel=0.2)


def test_the_order_of_clients_changes_a_mean_by_rounding_only():
    generator = np.random.default_rng(0)
    members = [({"w": generator.normal(size=1000)}, float(weight)) for weight in generator.integers(1, 10**6, size=50)]
    means = []
    for order in (range(50), reversed(range(50)), generator.permutation(50)):
        mean = WeightedMean()
        for index in order:
            mean.add(*members[index])
        means.append(mean.result(Stacks({}, []))["w"])
    for mean in means[1:]:
        assert np.abs(mean - means[0]).max() <= 1e-12 * np.abs(means[0]).max()
    np.testing.assert_array_equal(train_on_quadratics(Scaffold(), 20), train_on_quadratics(Scaffold(), 20, (1, 0)))


def test_a_mean_without_weight_is_an_error():
    mean = WeightedMean()
    with pytest.raises(ZeroDivisionError):
        mean.result(Stacks({}, []))
    mean.add({"w": np.ones(3)}, 0.0)
    with pytest.raises(ZeroDivisionError):
        mean.result(Stacks({}, []))


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 7])
def test_a_sum_block_by_block_is_the_sum_of_whole_arrays(size):
    generator = np.random.default_rng(size)
    origin = {"w": generator.normal(size=size).astype("float32"), "b": np.float32([[1, 2], [3, 4]])}
    members = [{name: array + generator.normal(size=array.shape).astype("float32") for name, array in origin.items()}
               for _ in range(3)]  # fmt: skip
    members[1] = {name: np.asfortranarray(array.astype("float16")) for name, array in members[1].items()}
    mean, expected = WeightedMean(), dict.fromkeys(origin, np.float64(-0.0))
    for weight, member in enumerate(members, 3):
        deltas = {name: array.astype("float64") - origin[name].astype("float64") for name, array in member.items()}
        norm = mean.add(member, float(weight), origin)
        assert norm == pytest.approx(np.linalg.norm(np.concatenate([d.ravel() for d in deltas.values()])), rel=1e-12)
        expected = {name: expected[name] + weight * delta for name, delta in deltas.items()}
    for name, array in mean.result(Stacks({}, [])).items():
        np.testing.assert_array_equal(array, expected[name] / 12.0)
