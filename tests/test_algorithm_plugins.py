"""Algorithms of other packages, and what takes the place of the weighted mean: exact numbers, bounded memory."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.federation import ADAPTER, read_adapter, read_manifest
from support.formulas import drop, drop_all
from support.plugins import install, python_path
from support.processes import ENVIRONMENT, SMALL, command, settings

from fedcli import Federation
from fedcli.algos import ALGORITHMS, Algorithm
from fedcli.algos.reducer import PIECE, Reducer, Stacks
from fedcli.algos.scaffold import DELTA_FILE, Scaffold
from fedcli.cli import main
from fedcli.errors import WorkspaceError
from fedcli.workspace.layout import Workspace
from fedcli.workspace.records import file_entry

CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
PACKAGE = '''"""The coordinate median, as somebody else's package."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedcli.algos.algorithm import Algorithm
from fedcli.algos.arrays import Array
from fedcli.algos.hyperparameters import Positive
from fedcli.algos.reducer import Reducer, Stacks


MEDIAN

@dataclass(frozen=True, kw_only=True)
class FedMedian(Algorithm):
    """x+ = x + median_k (y_k - x)."""

    name: Literal["fedmedian"] = "fedmedian"
    scale: Positive = 1.0

    def reducer(self) -> Reducer:
        return Median()


@dataclass(frozen=True, kw_only=True)
class Weightless(Algorithm):
    name: Literal["weightless"] = "weightless"
    given: float = 0.0

    def weight(self, num_samples: int) -> float:
        return {2.0: np.nan, 3.0: np.inf}.get(self.given, self.given)


@dataclass(frozen=True, kw_only=True)
class Misnamed(Algorithm):
    name: Literal["other"] = "other"


class Foreign:
    name = "foreign"
'''


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed package, its reducer as CONTRIBUTING.md shows it."""
    shown = CONTRIBUTING.read_text().split("A `Reducer`")[1].split("```python\n")[1].split("   ```")[0]
    median = "".join(line[3:] or "\n" for line in shown.splitlines(keepends=True))
    kinds = ("FedMedian", "Weightless", "Misnamed", "Foreign", "Gone")
    names = {kind.lower(): kind for kind in kinds}
    points = {"fedcli.algorithms": {name: f"somebodys_median:{kind}" for name, kind in names.items()}}
    return install(tmp_path_factory.mktemp("package"), "somebodys-median", PACKAGE.replace("MEDIAN", median), points)


def run(package: Path, workspace: Path, *arguments: object, code: int = 0) -> str:
    """Run a fedcli process that sees the package; return what it printed."""
    environment = ENVIRONMENT | python_path(package)
    done = subprocess.run(command(*arguments), cwd=workspace, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_federation_with_another_packages_algorithm_gives_the_median_and_is_verified(package, tmp_path):
    overrides = settings(*SMALL, "algorithm.name=fedmedian", "algorithm.scale=2")
    run(package, tmp_path, "init", ".", *overrides)
    run(package, tmp_path, "run")
    assert "no violation" in run(package, tmp_path, "verify")
    assert "fedmedian (scale 2.0)" in run(package, tmp_path, "status")
    for number in range(2):
        assert read_manifest(tmp_path, number + 1)["aggregation"]["algorithm"] == {"name": "fedmedian", "scale": 2.0}
        x, after = read_adapter(tmp_path, number), read_adapter(tmp_path, number + 1)
        updates = [load_file(tmp_path / "inbox" / str(client) / f"round-{number:05d}" / ADAPTER) for client in range(3)]
        for name, array in after.items():
            median = np.median([update[name].astype(float) - x[name] for update in updates], axis=0)
            np.testing.assert_array_equal(array, (x[name] + median).astype(np.float32))
    without = subprocess.run(
        command("verify"), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )  # the package is not there now
    assert without.returncode != 0
    assert "Traceback" not in without.stderr
    assert "'fedmedian'" in without.stdout + without.stderr


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("fedmedain", 3, "algorithm.name: unknown algorithm 'fedmedain'. Did you mean fedmedian or fedadam?"),
        ("misnamed", 8, "'misnamed' of the package somebodys-median cannot be loaded: ValueError: its name is 'other'"),
        ("foreign", 8, "it is no dataclass that inherits fedcli.algos.Algorithm"),
        ("gone", 8, "'gone' of the package somebodys-median cannot be loaded: AttributeError"),
    ],
)
def test_what_is_wrong_with_another_packages_algorithm_is_told(package, tmp_path, name, code, said):
    assert said in run(package, tmp_path, "init", ".", "--set", f"algorithm.name={name}", code=code)


@pytest.mark.slow
@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(0, id="zero"),
        pytest.param(-1, id="negative", marks=pytest.mark.slow),
        pytest.param(2, id="nan", marks=pytest.mark.slow),
        pytest.param(3, id="inf", marks=pytest.mark.slow),
    ],
)
def test_a_weight_that_is_none_is_told_and_nothing_is_published(package, tmp_path, weight):
    run(package, tmp_path, "init", ".", *settings(*SMALL, "algorithm.name=weightless", f"algorithm.given={weight}"))
    run(package, tmp_path, "client", "train", "--any")
    told = run(package, tmp_path, "server", "aggregate", "--partial", code=3)
    assert "the algorithm weightless gives client" in told
    assert not (tmp_path / "rounds/00001").exists()


def test_hyperparameters_and_algo_of_another_packages_algorithm_are_checked_like_fedclis_own(package, small):
    wrong = ["--set", "algorithm.name=fedmedian", "--set", "algorithm.scale=0", "--set", "algorithm.scalee=1"]
    said = run(package, small.parent, "init", "new", *wrong, code=3)
    assert "algorithm.scale: Input should be greater than 0 (found 0)" in said
    assert "algorithm.scalee: unknown key. Did you mean scale?" in said
    drop_all(small, 0)
    run(package, small, "server", "aggregate", "--algo", "fedmedian")
    assert read_manifest(small, 1)["aggregation"]["algorithm"] == {"name": "fedmedian", "scale": 1.0}


class Median(Reducer):
    reads_again = True

    def result(self, stacks):
        return stacks.reduce(partial(np.median, axis=0))


class Krum(Reducer):
    """Two passes: the differences' Gram matrix, then the row with the lowest score for one hostile update."""

    reads_again = True

    def result(self, stacks):
        gram = sum(rows @ rows.T for _, _, rows in stacks.blocks())
        squares = gram.diagonal()
        distances = squares[:, None] + squares - 2 * gram
        scores = np.sort(distances, axis=1)[:, 1 : len(gram) - 2].sum(axis=1)
        return stacks.reduce(lambda rows: rows[scores.argmin()])


@dataclass(frozen=True, kw_only=True)
class FedMedian(Algorithm):
    name: Literal["fedmedian"] = "fedmedian"

    def reducer(self):
        return Median()


@dataclass(frozen=True, kw_only=True)
class MedianScaffold(Scaffold):
    name: Literal["medianscaffold"] = "medianscaffold"

    def file_reducer(self, num_clients):
        return Median()


@pytest.fixture(scope="module")
def own() -> Iterator[None]:
    """This module's algorithms are fedcli's own, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (FedMedian, MedianScaffold):
            patch.setitem(ALGORITHMS._own, kind.name, kind)
        yield


@pytest.fixture(scope="module")
def answered(own: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation of medianscaffold whose clients have answered round 0; tests must not change it."""
    folder = tmp_path_factory.mktemp("answered")
    assert main(["init", str(folder), *settings(*SMALL, "algorithm.name=medianscaffold")]) == 0
    drop_all(folder, 0)
    return folder


@pytest.mark.parametrize("size", [1, 2, PIECE, 3 * PIECE + 5])
def test_a_median_and_krum_of_the_literature_in_passes_over_blocks(size):
    """Median and Krum (n - f - 2 neighbours) of seven updates of which one is hostile, as ByzFL's code gives them."""
    table = np.array([(1, 0), (1.2, 0.1), (0.9, -0.1), (1.1, 0.2), (1.03, 0.1), (0.8, 0), (50, -40)])
    shapes = {"b": (1, 1), "a": (size,)}

    def fill(row, name, block, out):
        out[:] = np.full(max(shapes[name]), row[0] if name == "a" else row[1])[block]

    stacks = Stacks(shapes, [partial(fill, row) for row in table])
    for reducer, expected in ((Median(), (1.03, 0)), (Krum(), (1.03, 0.1))):
        result = reducer.result(stacks)
        assert {name: array.shape for name, array in result.items()} == {"a": (size,), "b": (1, 1)}
        if size == 1 or isinstance(reducer, Median):
            np.testing.assert_allclose(result["a"], expected[0], rtol=1e-12)
            np.testing.assert_allclose(result["b"], expected[1], rtol=0, atol=1e-12)


def test_the_files_beside_the_adapters_are_reduced_as_the_algorithm_says(answered, tmp_path):
    folder = Path(shutil.copytree(answered, tmp_path / "workspace"))
    deltas = [load_file(folder / f"inbox/{client}/round-00000" / DELTA_FILE) for client in range(3)]
    Federation.open(folder).server.aggregate()
    for name, array in load_file(folder / "rounds/00001/control.safetensors").items():
        expected = np.median([delta[name].astype(float) for delta in deltas], axis=0)
        np.testing.assert_array_equal(array, expected.astype(np.float32))
    assert Federation(Workspace(folder)).verify().violations == []


def changed(path: Path) -> None:
    """Give one number of an adapter another valid value, in place."""
    contents = bytearray(path.read_bytes())
    contents[-4:] = np.float32(1e30).tobytes()
    path.write_bytes(contents)


def linked(path: Path) -> None:
    """Replace a file by a link to the same contents."""
    os.rename(path, path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


CHANGES: list[Callable[[Path], object]] = [
    changed,
    linked,
    Path.unlink,
    lambda path: os.truncate(path, path.stat().st_size - 4),
    lambda path: shutil.rmtree(path.parent),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [ADAPTER, DELTA_FILE])
def test_an_update_that_changes_between_the_passes_is_never_counted(answered, tmp_path, monkeypatch, change, name):
    folder = Path(shutil.copytree(answered, tmp_path / "workspace"))
    monkeypatch.setattr(MedianScaffold, "reducer", lambda self: Median())
    original = Median.result

    def spoilt(self, stacks):
        path = folder / "inbox/1/round-00000" / name
        if path.exists() and not path.is_symlink():
            change(path)
        return original(self, stacks)

    monkeypatch.setattr(Median, "result", spoilt)
    with pytest.raises(WorkspaceError, match="client 1's update changed while it was merged"):
        Federation.open(folder).server.aggregate()
    assert not (folder / "rounds/00001").exists()
    monkeypatch.setattr(Median, "result", original)
    if change is not linked and name == ADAPTER:  # the next merge refuses it, or misses it
        Federation.open(folder).server.aggregate(partial=True)
        assert [entry["client"] for entry in read_manifest(folder, 1)["aggregation"]["counted"]] == [0, 2]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_median_of_half_and_single_precision_is_exact(own, small, dtype):
    updates = drop_all(small, 0)
    entry = json.loads((small / "inbox/1/round-00000/update.json").read_bytes())
    path = small / "inbox/1/round-00000" / ADAPTER
    halves = {name: array.astype(dtype) for name, array in updates[1][1].items()}
    save_file(halves, path)
    entry["files"][ADAPTER] = file_entry(path.read_bytes()).model_dump()
    (path.parent / "update.json").write_text(json.dumps(entry))
    Federation.open(small).server.aggregate(algorithm="fedmedian")
    x = read_adapter(small, 0)
    sent = [updates[0][1], halves, updates[2][1]]
    for name, array in read_adapter(small, 1).items():
        median = np.median([update[name].astype(float) - x[name] for update in sent], axis=0)
        np.testing.assert_array_equal(array, (x[name] + median).astype(np.float32))


@pytest.mark.slow
def test_a_median_of_forty_updates_takes_as_much_memory_as_of_four(own, tmp_path):
    peaks = {}
    for clients in (4, 40):
        folder = tmp_path / str(clients)
        overrides = (*SMALL, "adapter.rank=2048", f"federation.clients={clients}", "algorithm.name=fedmedian")
        assert main(["init", str(folder), *settings(*overrides)]) == 0
        sizes = drop_many(folder, clients)
        tracemalloc.start()
        Federation.open(folder).server.aggregate()
        peaks[clients] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert sizes > 3e6
    assert peaks[40] < peaks[4] + 2**23 * 8 + sizes  # of 40 updates of that size


def drop_many(workspace: Path, clients: int) -> int:
    """Let clients drop updates of random numbers; return the size of one in bytes."""
    shapes = {name: entry["shape"] for name, entry in read_manifest(workspace, 0)["tensors"].items()}
    rng = np.random.default_rng(0)
    for client in range(clients):
        drop(workspace, 0, client, (10, {n: rng.standard_normal(s, np.float32) for n, s in shapes.items()}, {}))
    return (workspace / "inbox/0/round-00000" / ADAPTER).stat().st_size


def test_only_a_name_is_read_without_numpy():
    code = (
        "import sys\nfrom pathlib import Path\nfrom fedcli.config import parse_config\n"
        "for name in ('fedavg', 'fedyogi', 'scaffold'): parse_config({'algorithm': {'name': name}}, Path('x'))\n"
        "print('numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
