"""Merging a round by the products of LoRA's factors: each module of all updates side by side, one after the other.

The updates are read twice: the first pass checks them, the second reads module by module. Memory holds one module of
all updates, in float64, a few times over.
"""

import json
import math
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np

from fedcli.algos import Algorithm, Array, Arrays, MergedUpdates, products
from fedcli.algos.lora import LEAST_WEIGHT, LoraRule, cut, is_first_factor, pairs
from fedcli.algos.reducer import Reducer, Stacks, WeightedMean
from fedcli.algos.robust import Rule
from fedcli.config.adapter_config import at_rank
from fedcli.errors import ConfigError
from fedcli.randomness import stream
from fedcli.server.merge import Merge, Merged, MergeInputs, check_finite, files_of, read_all, weight_of
from fedcli.workspace.history import Round
from fedcli.workspace.inbox import Update
from fedcli.workspace.layout import ADAPTER_CONFIG_NAME, ADAPTER_FILE, BASE_DELTA_CONFIG_NAME, BASE_DELTA_NAME
from fedcli.workspace.lora_records import LoraErrors, LoraMerge
from fedcli.workspace.merge_records import Aggregation
from fedcli.workspace.tensors import encode

MOST_RANKS = 8
"""Of base_delta/, in ranks of the adapter, where max_rank is not set."""


def combine_lora(lora: LoraRule, rule: Rule | None, inputs: MergeInputs) -> Merged:
    """Merge a round's updates as `merge.combine` does, by their products; of `rule` weight_cap alone may be set.

    Raises what `combine` does, and ConfigError where the algorithm or the rule does not go with it.
    """
    base, algorithm = inputs.base, inputs.algorithm
    _check(lora, rule, base, algorithm)
    terms, rule = base.manifest.lora, rule or Rule()
    has_mean = lora.lora == "factors" and lora.lora_fair is None and rule.is_plain_mean
    is_streamed = has_mean and (terms is None or terms.ranks is None)
    reducer = _MeanReadAgain() if is_streamed else _ReadAgain()
    merge = _LoraMerge(base, algorithm, reducer, inputs.file_reducers(), lora=lora, rule=rule)
    read_all(inputs, merge)
    if not merge.counted:
        return None, merge.aggregation()
    with np.errstate(over="ignore", invalid="ignore"):  # the result is checked instead
        following, state = algorithm.apply(merge.adapter, merge.result(), base.state(algorithm))
    check_finite(base, following, state | merge.delta, merge.magnitudes)
    return files_of(algorithm, following, state) | merge.next_delta(), merge.aggregation()


def lapack() -> str:
    """Return which LAPACK numpy was built with."""
    found = np.show_config(mode="dicts")["Build Dependencies"]["lapack"]
    return f"{found['name']} {found['version']}"


def _check(lora: LoraRule, rule: Rule | None, base: Round, algorithm: Algorithm) -> None:
    """Raise ConfigError for what fedcli.yaml excludes, which a round that was opened before may yet have."""
    name = f"aggregation.lora: {lora.lora}"
    odd = None
    if rule is not None and (rule.rule != "mean" or rule.nearest_mixing):
        odd = f"aggregation.rule: {rule.rule}{', nearest_mixing' if rule.nearest_mixing else ''}"
    elif type(algorithm).reducer is not Algorithm.reducer:
        odd = f"the algorithm {algorithm.name}, which merges in a way of its own,"
    elif lora.lora != "factors" and (algorithm.state_prefixes or algorithm.private_state or algorithm.update_files):
        odd = f"the algorithm {algorithm.name}, which keeps numbers of the factors from round to round,"
    elif base.manifest.update_tensors is not None:
        odd = "updates that carry some of the factors only, as aggregation.share or the algorithm asked when it opened,"
    elif lora.lora != "factors" and base.manifest.encoding is not None:
        odd = f"aggregation.encoding: {base.manifest.encoding.name}, as which the round's step is sent,"
    if odd is not None:
        raise ConfigError(
            f"round {base.number}: {name} and {odd} exclude each other",
            hint="Set aggregation.lora to factors until that round is merged, or choose another algorithm or rule.",
        )


class _ReadAgain(Reducer):
    """Measures an update, and remembers it well enough to be read again."""

    reads_again = True

    def result(self, stacks: Stacks) -> "dict[str, Array]":
        return {}


class _MeanReadAgain(WeightedMean):
    """Adds up the mean of the factors as any other merge does, and remembers updates for their errors."""

    reads_again = True


class _Memory(threading.local):
    """Memory of each thread that is taken again and again: what is new comes page by page, and that takes long."""

    def __init__(self) -> None:
        self._held: dict[str, Array] = {}

    def take(self, name: str, size: int) -> Array:
        """Return so many float64 numbers, which hold what the last one who took them left."""
        if name not in self._held or self._held[name].size < size:
            self._held[name] = np.empty(size)
        return self._held[name][:size]


@dataclass
class _LoraMerge(Merge):
    """Merges each module's products."""

    lora: LoraRule = field(default_factory=LoraRule)
    rule: Rule = field(default_factory=Rule)
    delta: "dict[str, Array]" = field(default_factory=dict)
    """The next base_delta/; empty where it stays as it is."""
    factor_errors: dict[str, float] = field(default_factory=dict)
    merged_errors: dict[str, float] = field(default_factory=dict)
    is_factorised: bool = False
    _memory: _Memory = field(default_factory=_Memory)

    def add(self, client: int, update: Update) -> None:
        """Count one client's update; one of a smaller rank differs from the adapter's first components."""
        origin = self._origin(self.base.manifest.rank_of(client))
        if self.lora.lora_weights == "norm":
            norm = _norm(update.values(origin))
            weight = max(float(f"{norm:.9g}"), LEAST_WEIGHT)  # last digits are the processor's
        else:
            weight = weight_of(self.base, self.algorithm, client, update.record)
        delta_norm = self.differences.add(update.files[ADAPTER_FILE], weight, update.origin(origin))
        norms = [reducer.add(update.files[name], 1.0) for name, reducer in self.files.items()]
        self.magnitudes[client] = max(delta_norm, *norms, 0.0)
        self.note(client, update, weight, delta_norm)

    def result(self) -> MergedUpdates:
        """Return what leads to the next adapter, and set the next base_delta/."""
        shares = self.rule.shares(np.array(self.weights))
        self._old_delta = self.base.base_delta()
        self._next_delta: dict[str, dict[str, Array]] = {}
        following = {name: np.zeros(array.shape) for name, array in self.adapter.items()}
        modules = pairs(self.adapter)

        def merge(module: str) -> None:
            first, second = modules[module]
            a, b = self._module(module, self._values(first), self._values(second), shares)
            following[first], following[second] = a, b

        with ThreadPoolExecutor(2) as both:  # numpy's arithmetic, reading and hashing let other threads run
            list(both.map(merge, modules))
        for name in self.adapter.keys() - {each for names in modules.values() for each in names}:
            following[name] = sum(share * y for share, y in zip(shares, self._values(name), strict=True))
        self._finish_delta()
        difference = {name: array - self.adapter[name] for name, array in following.items()}
        if isinstance(self.differences, WeightedMean):
            difference = self.differences.result(Stacks({}, []))
        zeros = {name: np.broadcast_to(np.float32(0), array.shape) for name, array in self.adapter.items()}
        return MergedUpdates(
            difference, {name: zeros | self._reduce(reducer, name, None) for name, reducer in self.files.items()}
        )

    def aggregation(self) -> Aggregation:
        """Return the record of the merge."""
        found = super().aggregation()
        errors = LoraErrors(factors=_rounded(self.factor_errors), merged=_rounded(self.merged_errors))
        record = LoraMerge(
            **asdict(self.lora),
            errors=errors if self.lora.tells_errors and self.counted else None,
            lapack=lapack() if self.is_factorised else None,
        )
        found = found.model_copy(update={"lora": record})
        if self.rule.is_plain_mean or not self.counted:
            return found
        shares = dict(
            zip([each.client for each in self.counted], self.rule.shares(np.array(self.weights)), strict=True)
        )
        counted = [each.model_copy(update={"weight": float(shares[each.client])}) for each in found.counted]
        return found.model_copy(update={"counted": counted, "rule": asdict(self.rule)})

    def next_delta(self) -> dict[str, bytes]:
        """Return the next base_delta/, in PEFT's layout."""
        if not self.delta:
            return {}
        settings = json.loads(self.base.read(ADAPTER_CONFIG_NAME))
        rank = next(array.shape[0] for name, array in self.delta.items() if is_first_factor(name))
        text = json.dumps(at_rank(settings, rank, lora_dropout=0.0), indent=1, sort_keys=True) + "\n"
        return {BASE_DELTA_NAME: encode(self.delta), BASE_DELTA_CONFIG_NAME: text.encode()}

    def _origin(self, rank: int | None) -> Arrays:
        return self.adapter if rank is None else cut(self.adapter, rank)

    def _values(self, tensor: str) -> "list[Array]":
        """Return a tensor of each update, float64, of its own rank: the adapter's and the update's difference.

        They are views of one array, one behind the other, in memory that the same thread's next call takes.
        """
        origins = [self._origin_of(tensor, self.base.manifest.rank_of(entry.client)) for entry in self.counted]
        memory = self._memory.take("A" if is_first_factor(tensor) else "B", sum(origin.size for origin in origins))
        found, begin = [], 0
        for origin, stored in zip(origins, self.stored, strict=True):
            values = memory[begin : begin + origin.size]
            begin += origin.size
            fill = stored[ADAPTER_FILE].filling({tensor: origin})
            fill(tensor, slice(0, origin.size), values)
            np.add(values, origin.reshape(-1), out=values)
            found.append(values.reshape(origin.shape))
        return found

    def _origin_of(self, tensor: str, rank: int | None) -> Array:
        array = self.adapter[tensor]
        return array if rank is None else np.ascontiguousarray(cut({tensor: array}, rank)[tensor])

    def _module(self, module: str, as_: "list[Array]", bs: "list[Array]", shares: Array) -> "tuple[Array, Array]":
        """Return a module's next A and B; note its errors, and its part of base_delta/."""
        first, _ = pairs(self.adapter)[module]
        old, rank = self.adapter[first].astype(np.float64), self.adapter[first].shape[0]
        mean_a, mean_b = _padded_mean(as_, shares, rank, axis=0), _padded_mean(bs, shares, rank, axis=1)
        if not self.lora.tells_errors:
            return mean_a, mean_b
        rows, width = sum(len(a) for a in as_), as_[0].shape[1]
        memory = self._memory.take("left", bs[0].shape[0] * rows).reshape(-1, rows)
        both = memory, self._memory.take("A", rows * width).reshape(rows, width)
        left, right = products.stacked(bs, as_, shares, both)
        self.factor_errors[module] = products.shortfall(left, right, mean_b, mean_a)
        if self.lora.lora == "product":
            found = products.with_old_rows(products.truncated(left, right, rank, mean_a), old)
            self.is_factorised = True
            self.merged_errors[module] = found.error
            return found.a, found.b
        if self.lora.lora_fair is not None:
            mean_b = mean_b + products.corrected(
                [_padded(b, rank, 1) for b in bs], [_padded(a, rank, 0) for a in as_], shares, self.lora.lora_fair
            )
            self.merged_errors[module] = products.shortfall(left, right, mean_b, mean_a)
            self.is_factorised = True
        if self.lora.lora == "factors":
            return mean_a, mean_b
        if not self.lora.lora_fresh:
            left, right = products.residual(bs, as_, shares)
        else:
            bound = 1 / math.sqrt(old.shape[1])
            fresh = stream(self.base.manifest.train.seed, "lora", round_number=self.base.number + 1, part=first)
            mean_a, mean_b = fresh.uniform(-bound, bound, old.shape), np.zeros_like(mean_b)
        self._extend_delta(module, left, right, mean_a, mean_b)
        return mean_a, mean_b

    def _extend_delta(self, module: str, left: Array, right: Array, a: Array, b: Array) -> None:
        """Note what base_delta/ becomes beside A and B in a module: all of it, or the best of the rank it may have."""
        first, second = pairs(self.adapter)[module]
        if self._old_delta is not None:
            left = np.concatenate([self._old_delta[second].astype(np.float64), left], axis=1)
            right = np.concatenate([self._old_delta[first].astype(np.float64), right], axis=0)
        most, self.merged_errors[module] = self._most_rank(), 0.0
        if left.shape[1] > most:
            found = products.truncated(left, right, most)
            whole, kept = (
                (np.concatenate([b, beside_b], axis=1), np.concatenate([a, beside_a], axis=0))
                for beside_b, beside_a in ((left, right), (found.b, found.a))
            )
            self.merged_errors[module] = products.shortfall(*whole, *kept)
            left, right = found.b, found.a
            self.is_factorised = True
        self._next_delta[module] = {first: right.astype(np.float32), second: left.astype(np.float32)}

    def _most_rank(self) -> int:
        """Return the rank that base_delta/ may have: no more than the widest module can use."""
        modules = pairs(self.adapter).values()
        rank = max(self.adapter[first].shape[0] for first, _ in modules)
        widest: int = max(min(self.adapter[first].shape[1], self.adapter[second].shape[0]) for first, second in modules)
        return min(self.lora.max_rank or MOST_RANKS * rank, widest)

    def _finish_delta(self) -> None:
        parts = {name: array for found in self._next_delta.values() for name, array in found.items()}
        if any(array.size for array in parts.values()):
            self.delta = parts


def _padded(array: Array, rank: int, axis: int) -> Array:
    """Return a factor with zeros up to the adapter's rank."""
    if array.shape[axis] == rank:
        return array
    room = [(0, 0)] * array.ndim
    room[axis] = (0, rank - array.shape[axis])
    return np.pad(array, room)


def _padded_mean(arrays: "list[Array]", shares: Array, rank: int, axis: int) -> Array:
    """Return the mean of factors, of which those of smaller ranks count as zero beyond (HetLoRA)."""
    shape = list(arrays[0].shape)
    shape[axis] = rank
    total = np.zeros(shape)
    for share, array in zip(shares, arrays, strict=True):
        part = total[: array.shape[0]] if axis == 0 else total[:, : array.shape[1]]
        part += share * array
    return total


def _norm(arrays: Arrays) -> float:
    """Return the norm of all of an update's products."""
    modules = pairs(arrays).values()
    return math.hypot(
        *(
            products.norm(arrays[second].astype(np.float64), arrays[first].astype(np.float64))
            for first, second in modules
        )
    )


def _rounded(errors: Mapping[str, float]) -> dict[str, float]:
    return {module: float(f"{error:.6g}") for module, error in errors.items()}
