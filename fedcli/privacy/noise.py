"""Gaussian noise that whoever has a key can draw again, and nobody else can predict.

The key comes from the operating system, never from federation.seed, which is public. Each draw has a name, and a
ChaCha20 keystream of its own under BLAKE2b(name, key): no two draws share a byte. A number is the sum of four
independent Gaussians, halved, against attacks on the floating point of a single one (Holohan and Braghin 2021,
2107.10138). That is noise in float64, and no proof for real numbers.

A Gaussian is the inverse of the normal distribution function (Wichura 1988, algorithm AS 241) of a uniform number. It
takes IEEE additions, multiplications, divisions and square roots alone, the logarithm included: every processor and
every numpy give the same bytes.
"""

import hashlib
import math
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedcli.algos.arrays import Array

KEY_BYTES = 32
BLOCK = 2**13
"""Numbers that are made at once: what is computed on the way stays in the processor's cache."""
_SUMMANDS = 4


def new_key() -> bytes:
    """Return a key of the operating system's randomness."""
    return os.urandom(KEY_BYTES)


def hash_of(key: bytes) -> str:
    """Return what a manifest says of a key."""
    return hashlib.sha256(b"fedcli-noise-v1\n" + key).hexdigest()


class NoiseStream:
    """Draws of one key. Draws without a name are numbered: a process that begins anew needs another key."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a noise key has {KEY_BYTES} bytes, not {len(key)}")
        self._key = key
        self._drawn: set[str] = set()
        self._number = 0

    def normal(self, shape: "int | tuple[int, ...]", *, name: str | None = None) -> "Array":
        """Return independent numbers of mean 0 and deviation 1, float64; raise ValueError for a name drawn before."""
        import numpy as np

        result = np.empty(shape)
        flat, words = result.reshape(-1), self._words(name)
        for begin in range(0, flat.size, BLOCK):
            part = flat[begin : begin + BLOCK]
            first, second, third, fourth = _gaussians(words(_SUMMANDS * part.size)).reshape(_SUMMANDS, -1)
            np.multiply((first + second) + (third + fourth), 0.5, out=part)
        return result

    def uniform(self, num: int, *, name: str | None = None) -> "Array":
        """Return independent numbers from [0, 1), multiples of 2^-53; raise ValueError for a name drawn before."""
        import numpy as np

        return (self._words(name)(num) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def _words(self, name: str | None) -> "Callable[[int], Array]":
        """Return what gives the next 64-bit words of a draw's keystream."""
        import numpy as np
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

        if name is None:
            draw, self._number = f"number\n{self._number}", self._number + 1
        else:
            draw = f"name\n{name}"
        if draw in self._drawn:
            raise ValueError(f"noise for {name} was drawn before: the same noise twice hides nothing")
        if name is not None:
            self._drawn.add(draw)
        key = hashlib.blake2b(draw.encode(), key=self._key, digest_size=KEY_BYTES, person=b"fedcli-noise-v1").digest()
        stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
        return lambda num: np.frombuffer(stream.update(bytes(8 * num)), dtype="<u8")


def _gaussians(words: "Array") -> "Array":
    """Return a Gaussian for each word: 52 bits are the distance from the median, one bit is the sign."""
    import numpy as np

    tail = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1/2), exactly
    centre = 0.5 - tail
    r = 0.180625 - centre * centre
    found = centre * _polynomial(_CENTRE_TOP, r) / _polynomial(_CENTRE_BOTTOM, r)
    (outside,) = np.nonzero(centre > 0.425)
    r = np.sqrt(-_log(tail[outside]))
    near = r - 1.6
    values = _polynomial(_TAIL_TOP, near) / _polynomial(_TAIL_BOTTOM, near)
    (far,) = np.nonzero(r > 5.0)
    beyond = r[far] - 5.0
    values[far] = _polynomial(_FAR_TOP, beyond) / _polynomial(_FAR_BOTTOM, beyond)
    found[outside] = values
    return np.where((words & np.uint64(1)).astype(bool), -found, found)


def _log(x: "Array") -> "Array":
    """Return log x: 2 artanh((m - 1) / (m + 1)) + e log 2, where x = m 2^e and m is around 1."""
    import numpy as np

    mantissa, exponent = np.frexp(x)
    is_low = mantissa < math.sqrt(0.5)
    mantissa = np.where(is_low, mantissa * 2, mantissa)
    exponent = exponent - is_low
    s = (mantissa - 1) / (mantissa + 1)
    result: Array = 2 * s * _polynomial(_ARTANH, s * s) + exponent * math.log(2)
    return result


def _polynomial(coefficients: tuple[float, ...], x: "Array") -> "Array":
    """Return a polynomial's values; the coefficient of the highest power comes first."""
    import numpy as np

    result: Array = np.full(x.shape, coefficients[0])
    for coefficient in coefficients[1:]:
        result *= x
        result += coefficient
    return result


_ARTANH = tuple(1 / power for power in range(25, 0, -2))
_CENTRE_TOP = (
    2509.0809287301227,
    33430.57558358813,
    67265.7709270087,
    45921.95393154987,
    13731.69376550946,
    1971.5909503065513,
    133.14166789178438,
    3.3871328727963665,
)
_CENTRE_BOTTOM = (
    5226.495278852854,
    28729.085735721943,
    39307.89580009271,
    21213.794301586597,
    5394.196021424751,
    687.1870074920579,
    42.31333070160091,
    1.0,
)
_TAIL_TOP = (
    0.0007745450142783414,
    0.022723844989269184,
    0.2417807251774506,
    1.2704582524523684,
    3.6478483247632045,
    5.769497221460691,
    4.630337846156546,
    1.4234371107496835,
)
_TAIL_BOTTOM = (
    1.0507500716444169e-09,
    0.0005475938084995345,
    0.015198666563616457,
    0.14810397642748008,
    0.6897673349851,
    1.6763848301838038,
    2.053191626637759,
    1.0,
)
_FAR_TOP = (
    2.0103343992922881e-07,
    2.7115555687434876e-05,
    0.0012426609473880784,
    0.026532189526576124,
    0.29656057182850487,
    1.7848265399172913,
    5.463784911164114,
    6.657904643501103,
)
_FAR_BOTTOM = (
    2.0442631033899397e-15,
    1.421511758316446e-07,
    1.8463183175100548e-05,
    0.0007868691311456133,
    0.014875361290850615,
    0.1369298809227358,
    0.599832206555888,
    1.0,
)
