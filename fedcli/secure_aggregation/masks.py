"""Masks: ChaCha20's keystream as numbers of the ring, block by block."""

from collections.abc import Sequence

import numpy as np

from fedcli.secure_aggregation.fixed_point import Ring

BLOCK = 2**15
"""Numbers that are masked at once: a quarter of a megabyte, which stays in the processor's cache."""
_NONCE = bytes(16)
"""Counter and nonce are zero: a key is used once."""


class Keystream:
    """The numbers that a key gives, one after another; a call's numbers are overwritten by the next one's."""

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

        self._encryptor = Cipher(ChaCha20(key, _NONCE), mode=None).encryptor()
        self._zeros = memoryview(bytes(8 * BLOCK))
        self._memory = bytearray(8 * BLOCK)

    def take(self, count: int) -> Ring:
        """Return the next `count` numbers, BLOCK at most."""
        size = self._encryptor.update_into(self._zeros[: 8 * count], self._memory)
        return np.frombuffer(self._memory, "<u8", size // 8)


def add_masks(numbers: Ring, added: Sequence[bytes] = (), subtracted: Sequence[bytes] = ()) -> None:
    """Add the keystreams of some keys to a vector, and subtract those of others, in place."""
    plus, minus = [Keystream(key) for key in added], [Keystream(key) for key in subtracted]
    for begin in range(0, numbers.size, BLOCK):
        block = numbers[begin : begin + BLOCK]
        for stream in plus:
            np.add(block, stream.take(block.size), out=block)
        for stream in minus:
            np.subtract(block, stream.take(block.size), out=block)
