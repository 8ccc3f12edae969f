"""Sharing a secret among n holders so that any t of them give it back, and fewer know nothing (Shamir 1979)."""

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

PRIME = 2**255 - 19
SECRET_BYTES = 32
_HALF = SECRET_BYTES // 2
_ELEMENT = 32


class BadShares(ValueError):
    """Shares do not fit together."""


def evaluate(coefficients: Sequence[int], point: int) -> int:
    """Return a polynomial's value at a point; the first coefficient is the constant."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value


def interpolate_at_zero(points: Mapping[int, int]) -> int:
    """Return the constant of the polynomial of least degree through these points."""
    return sum(y * weight for y, weight in zip(points.values(), _weights(tuple(points)), strict=True)) % PRIME


@lru_cache(maxsize=256)
def _weights(points: tuple[int, ...]) -> list[int]:
    """Return what Lagrange's formula weighs the values at these points with, at zero."""
    weights = []
    for x in points:
        over, under = 1, 1
        for other in points:
            if other != x:
                over = over * other % PRIME
                under = under * (other - x) % PRIME
        weights.append(over * pow(under, -1, PRIME) % PRIME)
    return weights


def split(secret: bytes, threshold: int, points: Sequence[int]) -> dict[int, bytes]:
    """Return one share of 64 bytes for each point (1 and on).

    Each half of the secret, 16 bytes, is shared by itself: 32 bytes need not be below the prime.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= len(points) or min(points) < 1:
        raise ValueError("a secret has 32 bytes, points begin with 1, and no more are needed than there are")
    shares = dict.fromkeys(points, b"")
    for half in (secret[:_HALF], secret[_HALF:]):
        constant = int.from_bytes(half, "little")
        coefficients = [constant, *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
        for point in points:
            shares[point] += evaluate(coefficients, point).to_bytes(_ELEMENT, "little")
    return shares


def join(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret that as many shares as are needed, or more, give; raise BadShares where they give none."""
    secret = b""
    for start in (0, _ELEMENT):
        points = {x: int.from_bytes(share[start : start + _ELEMENT], "little") for x, share in shares.items()}
        half = interpolate_at_zero(points)
        if half >= 2 ** (8 * _HALF):
            raise BadShares("these shares give no secret")
        secret += half.to_bytes(_HALF, "little")
    return secret
