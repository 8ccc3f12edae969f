"""Noise is Gaussian, drawn again from its key alone, and never twice; what it guarantees is what others compute."""

import hashlib
import math
import random
from statistics import NormalDist

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fedcli.privacy.accounting import (
    gaussian_delta,
    gaussian_epsilon,
    gaussian_noise,
    poisson_epsilon,
    poisson_noise,
)
from fedcli.privacy.noise import BLOCK, NoiseStream, hash_of, new_key

slow = pytest.mark.slow
KEY = bytes(range(32))


def by_definition(key: bytes, name: str, num: int) -> list[float]:
    """Return the first block of a draw as docs/PROTOCOL.md has it, number by number, by Python's own quantiles."""
    derived = hashlib.blake2b(f"name\n{name}".encode(), key=key, digest_size=32, person=b"fedcli-noise-v1").digest()
    stream = Cipher(algorithms.ChaCha20(derived, bytes(16)), mode=None).encryptor().update(bytes(8 * 4 * num))
    found = []
    for position in range(num):
        parts = []
        for summand in range(4):
            start = 8 * (summand * num + position)
            word = int.from_bytes(stream[start : start + 8], "little")
            distance = -NormalDist().inv_cdf(((word >> 12) + 0.5) / 2**53)
            parts.append(-distance if word & 1 else distance)
        found.append(sum(parts) / 2)
    return found


def test_the_noise_is_that_of_the_page() -> None:
    drawn = NoiseStream(KEY).normal((10, 100), name="a tensor")
    assert drawn.reshape(-1) == pytest.approx(by_definition(KEY, "a tensor", 1000), rel=1e-14, abs=1e-15)


def test_a_key_gives_the_same_bytes_on_every_processor() -> None:
    drawn = NoiseStream(KEY).normal(3 * BLOCK + 5, name="tensor").astype("<f8").tobytes()
    assert hashlib.sha256(drawn).hexdigest() == "4a734a68c189b852f1660ea4b223f9ed85c8bc4b4d0ba9039fd55e1885d42413"


def test_the_hash_of_a_key_is_that_of_the_page() -> None:
    assert hash_of(KEY) == hashlib.sha256(b"fedcli-noise-v1\n" + KEY).hexdigest()
    assert len({new_key() for _ in range(100)}) == 100


def test_a_draw_is_never_repeated_within_a_key() -> None:
    stream = NoiseStream(KEY)
    draws = [stream.normal(50, name="a"), stream.normal(50, name="b"), stream.normal(50), stream.normal(50)]
    draws += [NoiseStream(new_key()).normal(50, name="a"), NoiseStream(KEY).normal(50, name="0")]
    assert len({number for draw in draws for number in draw.tolist()}) == 6 * 50
    with pytest.raises(ValueError, match="was drawn before"):
        stream.normal(50, name="a")
    again = NoiseStream(KEY)
    again.normal(7, name="b")  # what was drawn before does not matter
    assert again.normal(50, name="a").tolist() == draws[0].tolist()


@pytest.mark.parametrize("num", [50_000, pytest.param(4_000_000, marks=slow)])
def test_the_noise_has_the_moments_and_the_distribution_of_a_gaussian(num: int) -> None:
    drawn = np.sort(NoiseStream(KEY).normal(num, name=f"{num}"))
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((drawn**power).mean() - expected) < 5 * math.sqrt(variance / num)
    exact = np.array([NormalDist().cdf(value) for value in drawn[:: max(1, num // 50_000)].tolist()])
    ranks = np.arange(num)[:: max(1, num // 50_000)] / num
    assert np.abs(exact - ranks).max() < 1.95 / math.sqrt(num)  # Kolmogorov-Smirnov: once in a thousand keys
    assert abs(np.corrcoef(NoiseStream(KEY).normal((2, num), name="pair"))[0, 1]) < 5 / math.sqrt(num)


def test_uniform_numbers_are_spread_evenly() -> None:
    drawn = NoiseStream(KEY).uniform(100_000)
    assert 0 <= drawn.min() < 1e-4
    assert 1 - 1e-4 < drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 100_000)


CLOSED = [
    *((1, 10, 17.86), (1, 50, 54.38), (1, 200, 159.4), (2, 10, 7.51), (2, 50, 20.68), (2, 200, 54.4)),
    *((5, 10, 2.59), (5, 50, 6.57), (5, 200, 15.5), (10, 10, 1.20), (10, 50, 2.94), (10, 200, 6.57)),
    *((5 / math.sqrt(10), 1, 2.594), (5, 100, 9.9973), (1, 1, 4.3772)),
]


@pytest.mark.parametrize(("noise", "rounds", "epsilon"), CLOSED)
def test_rounds_without_sampling_spend_what_the_literature_says(noise: float, rounds: int, epsilon: float) -> None:
    assert gaussian_epsilon(noise, 1e-5, rounds) == pytest.approx(epsilon, rel=5e-3)


def test_the_closed_form_is_exact_and_calibration_inverts_it() -> None:
    assert gaussian_delta(1.0, 4.377178) == pytest.approx(1e-5, rel=1e-5)
    assert gaussian_epsilon(1.0, 1e-5, 0) == 0.0
    assert gaussian_noise(8, 1e-2, 50) == pytest.approx(2.88756, rel=1e-4)
    noise = gaussian_noise(3, 1e-6, 40)
    assert gaussian_epsilon(noise, 1e-6, 40) <= 3 < gaussian_epsilon(noise * (1 - 1e-9), 1e-6, 40)


POISSON = [
    *((64 / 5000, 0.6, 1000, 2e-6, 10.3), (128 / 5000, 0.6, 1000, 2e-6, 19.5), (256 / 5000, 0.6, 1000, 2e-6, 39.5)),
    *((64 / 5000, 0.8, 1000, 2e-6, 4.50), (128 / 5000, 0.8, 1000, 2e-6, 9.15), (256 / 5000, 0.8, 1000, 2e-6, 19.5)),
    *((64 / 5000, 1.0, 1000, 2e-6, 2.65), (128 / 5000, 1.0, 1000, 2e-6, 5.61), (256 / 5000, 1.0, 1000, 2e-6, 12.2)),
    *((64 / 5000, 1.5, 1000, 2e-6, 1.33), (128 / 5000, 1.5, 1000, 2e-6, 2.84), (256 / 5000, 1.5, 1000, 2e-6, 6.17)),
    *((0.1, 1.0, 100, 1e-5, 7.0466), (0.05, 1.0, 100, 1e-4, 2.8696)),
]


@slow
@pytest.mark.parametrize(("sampling", "noise", "steps", "delta", "epsilon"), POISSON)
def test_poisson_steps_spend_what_the_handbook_says(
    sampling: float, noise: float, steps: int, delta: float, epsilon: float
) -> None:
    assert poisson_epsilon([(sampling, noise, steps)], delta) == pytest.approx(epsilon, rel=5e-3)
    half = steps // 2
    parts = [(sampling, noise, half), (sampling, noise, steps - half), (1.0, 5.0, 0)]
    assert poisson_epsilon(parts, delta) == poisson_epsilon([(sampling, noise, steps)], delta)


@slow
def test_poisson_noise_is_calibrated_from_above() -> None:
    noise = poisson_noise(8.0, 1e-5, 0.1, 100)
    assert 0.93593 <= noise <= 0.93593 * 1.006
    assert poisson_epsilon([(0.1, noise, 100)], 1e-5) <= 8.0


@slow
def test_thirty_settings_agree_with_dp_accounting() -> None:
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    draw = random.Random(17)
    for _ in range(30):
        noise, rounds, delta = draw.uniform(0.5, 20), draw.randint(1, 300), 10 ** draw.uniform(-8, -2)
        accountant = PLDAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
        accountant.compose(SelfComposedDpEvent(GaussianDpEvent(noise), rounds))
        expected = accountant.get_epsilon(delta)
        assert gaussian_epsilon(noise, delta, rounds) == pytest.approx(expected, rel=0.01, abs=1e-3)
