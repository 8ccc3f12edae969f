"""Merging a round of unit client: each update is clipped, the sum gets noise, and a fixed number divides it.

McMahan et al. 2018 (1710.06963), Andrew et al. 2021 (1905.03871): x+ = x + (sum_k w_k clip(d_k) + N(0, (z C)^2)) / m.
What is clipped is one vector of all tensors of all files of an update. All weights are 1, or min(rows / row_cap, 1);
m is the manifest's `expected`, whoever answers. So one client more or less moves the sum by C at most.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from fedcli.algos import Algorithm, Array, MergedUpdates
from fedcli.algos.reducer import Reducer, Stacks, WeightedMean
from fedcli.errors import ConfigError, IntegrityError
from fedcli.privacy.noise import NoiseStream, hash_of
from fedcli.server.merge import Merge, Merged, MergeInputs, files_of, next_step, read_all
from fedcli.workspace.inbox import Update
from fedcli.workspace.layout import ADAPTER_FILE
from fedcli.workspace.noise_keys import NoiseKey, NoiseSource
from fedcli.workspace.privacy_records import MergeNoise, PrivacyRecord, noise_multiplier

BITS = "below"
"""The name of the noise on the number of updates that are not clipped."""


def combine_privately(inputs: MergeInputs, noise: NoiseSource) -> Merged:
    """Merge a round's updates as `merge.combine` does, with noise; no file where `noise` has no key for them.

    Raises ConfigError where the algorithm merges in a way of its own, or the noise is beyond float32.
    """
    base, algorithm, count = inputs.base, inputs.algorithm, inputs.count
    check_algorithm(algorithm)
    privacy = base.manifest.privacy
    assert privacy is not None
    assert privacy.expected is not None
    if count > privacy.expected:
        raise IntegrityError(
            f"round {base.number} would count {count} updates, and its privacy expects {privacy.expected}",
            hint="Restore its manifest from a backup; `fedcli verify` lists what is wrong.",
        )
    names = algorithm.update_files
    merge = _PrivateMerge(base, algorithm, WeightedMean(), {name: WeightedMean() for name in names}, privacy=privacy)
    read_all(inputs, merge)
    aggregation = merge.aggregation()
    if not merge.counted:
        return None, aggregation
    key = noise(aggregation)
    if key is None:
        return None, aggregation
    stream = NoiseStream(key.key)
    with np.errstate(over="ignore", invalid="ignore"):  # the result is checked instead
        merged = merge.noisy(stream, inputs.num_clients)
        following, state = next_step(base, algorithm, merge.adapter, merged)
    if not all(np.isfinite(array).all() for arrays in (following, state) for array in arrays.values()):
        raise ConfigError(
            f"round {base.number}'s noise, {privacy.noise:g} x {privacy.clip:g}, is too large for float32",
            hint="Set a smaller privacy.clip or privacy.noise in fedcli.yaml, from the first round on.",
        )
    return files_of(algorithm, following, state), aggregation.model_copy(update={"privacy": merge.record(key, stream)})


def check_algorithm(algorithm: Algorithm) -> None:
    """Raise ConfigError for an algorithm with a reducer of its own: how far a client moves that is not known."""
    for name in ("reducer", "file_reducer"):
        if getattr(type(algorithm), name) is not getattr(Algorithm, name):
            raise ConfigError(
                f"privacy.unit is client, and the algorithm {algorithm.name} merges in a way of its own",
                hint="Choose another algorithm, or set privacy.unit to row or group.",
            )


def _cut(ratio: float) -> float:
    """Return a ratio cut to 40 bits: what is scaled by it is never longer, and last digits of a norm change nothing."""
    mantissa, exponent = math.frexp(ratio)
    return math.ldexp(math.floor(math.ldexp(mantissa, 40)), exponent - 40)


class _Norm(Reducer):
    """Measures an update, and keeps nothing."""

    def result(self, stacks: Stacks) -> "dict[str, Array]":
        return {}


@dataclass
class _PrivateMerge(Merge):
    """Clips each update before it is summed."""

    privacy: PrivacyRecord = field(default_factory=PrivacyRecord)
    num_below: int = 0
    """Updates whose norm is not above the clip."""

    def add(self, client: int, update: Update) -> None:
        """Count one client's update, which moves the sum by the clip at most."""
        clip = self.privacy.clip
        assert clip is not None
        norm = math.hypot(
            _Norm().add(update.files[ADAPTER_FILE], 0.0, update.origin(self.adapter)),
            *(_Norm().add(update.files[name], 0.0) for name in self.files),
        )
        self.num_below += norm <= clip
        factor = 1.0 if norm <= clip else _cut(clip / norm)
        weight = self._weight(update.record.num_samples)
        assert isinstance(self.differences, WeightedMean)
        self.differences.add(update.files[ADAPTER_FILE], weight * factor, update.origin(self.adapter))
        for name, reducer in self.files.items():
            reducer.add(update.files[name], factor)
        self.note(client, update, 1.0, norm)

    def _weight(self, num_samples: int) -> float:
        return 1.0 if self.privacy.row_cap is None else min(num_samples / self.privacy.row_cap, 1.0)

    def noisy(self, stream: NoiseStream, num_clients: int) -> MergedUpdates:
        """Return the noisy sum over `expected`; of other files over what the algorithm divides theirs by."""
        zeros = {name: np.broadcast_to(np.float32(0), array.shape) for name, array in self.adapter.items()}
        expected = self.privacy.expected
        assert expected is not None
        return MergedUpdates(
            zeros | self._noisy(stream, ADAPTER_FILE, self.differences, expected),
            {name: zeros | self._noisy(stream, name, reducer, num_clients) for name, reducer in self.files.items()},
        )

    def _noisy(self, stream: NoiseStream, file: str, reducer: Reducer, divisor: int) -> "dict[str, Array]":
        assert isinstance(reducer, WeightedMean)
        assert self.privacy.clip is not None
        deviation = noise_multiplier(self.privacy) * self.privacy.clip
        sums = reducer.sums()
        for tensor, total in sums.items():
            noise = stream.normal(total.shape, name=f"{file}/{tensor}")
            np.multiply(noise, deviation, out=noise)
            np.add(total, noise, out=total)
            np.divide(total, divisor, out=total)
        return sums

    def record(self, key: NoiseKey, stream: NoiseStream) -> MergeNoise:
        """Return what the manifest tells of the noise."""
        below, adaptive, expected = None, self.privacy.adaptive, self.privacy.expected
        if adaptive is not None and expected is not None:
            # each bit is +1/2 or -1/2, and 0 of who did not answer: that moves by 1/2 with a client
            centred = self.num_below - len(self.counted) / 2
            below = centred + expected / 2 + adaptive.bit_noise * float(stream.normal(1, name=BITS)[0])
        return MergeNoise(
            noise_sha256=hash_of(key.key),
            noise=noise_multiplier(self.privacy),
            below=below,
            releases=key.releases if key.releases > 1 else None,
        )
