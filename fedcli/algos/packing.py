"""Differences in fewer bytes than float32 takes: int8 blocks, and the largest numbers alone with error feedback.

int8: q = floor(v / s + U[0, 1)) with s = (the largest |v| of the block) / 127; rounding so is unbiased. top_k sends the
largest |d + e| of each piece, and what it did not send is the next e: Stich et al. 2018 (1809.07599), algorithm 1. A
piece's bytes depend on how many numbers it has and on nothing else, so that a part of a tensor can be read alone.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from fedcli.algos.arrays import Array

if TYPE_CHECKING:
    import numpy as np

PackingName = Literal["int8", "top_k"]
BLOCK = 64
"""Numbers that have one scale."""
PIECE = 2**14
"""Numbers of a tensor that are read again, and checked, at once; of so many the largest are sent."""
LARGEST_SCALE = 2.0**32
_INT8 = 127


class MalformedError(ValueError):
    """Bytes that no packing wrote; `is_number` where what is wrong is a number that is none or too large."""

    def __init__(self, problem: str, *, is_number: bool = False) -> None:
        super().__init__(problem)
        self.is_number = is_number


class Packing(ABC):
    """How a tensor's numbers lie in bytes."""

    @abstractmethod
    def num_bytes(self, count: int) -> int:
        """Return the bytes of a tensor's first `count` numbers: of all, or of a multiple of PIECE."""

    @abstractmethod
    def num_sent(self, count: int) -> int:
        """Return how many of `count` numbers are sent at all."""

    @abstractmethod
    def pack(self, values: Array, rng: "np.random.Generator | None") -> bytes:
        """Return the bytes of a tensor's numbers, rounded at random by `rng`, or without one to the nearest."""

    @abstractmethod
    def unpack(self, data: "bytes | memoryview", count: int) -> Array:
        """Return the float32 numbers of bytes that may be hostile; raise MalformedError."""


@dataclass(frozen=True)
class Int8Blocks(Packing):
    """Each block is a float32 scale, little-endian, and a signed byte for each of its numbers: 68 bytes for 64."""

    block: int = BLOCK

    def num_bytes(self, count: int) -> int:
        """Return one byte a number, and four a block, of which the last may be shorter."""
        return count + 4 * -(-count // self.block)

    def num_sent(self, count: int) -> int:
        """Return all of them."""
        return count

    def pack(self, values: Array, rng: "np.random.Generator | None") -> bytes:
        """Return scales and rounded numbers; a block of zeros has the scale 0."""
        import numpy as np

        flat = np.asarray(values, np.float32).reshape(-1)
        blocks = np.zeros((-(-flat.size // self.block), self.block))
        blocks.reshape(-1)[: flat.size] = flat
        scales = (np.abs(blocks).max(axis=1, initial=0.0) / _INT8).astype("<f4")
        divisors = np.where(scales > 0, scales, np.float32(1)).astype(np.float64)
        np.divide(blocks, divisors[:, None], out=blocks)
        blocks[scales == 0] = 0.0
        # float32 draws are enough for 255 steps, and half as many bytes of the stream
        blocks += 0.5 if rng is None else rng.random(blocks.shape, np.float32)
        steps = np.clip(np.floor(blocks, out=blocks), -_INT8, _INT8).astype(np.int8)
        packed = np.empty((len(blocks), 4 + self.block), np.uint8)
        packed[:, :4] = scales.view(np.uint8).reshape(-1, 4)
        packed[:, 4:] = steps.view(np.uint8)
        return packed.tobytes()[: self.num_bytes(flat.size)]

    def unpack(self, data: "bytes | memoryview", count: int) -> Array:
        """Return the scales times the steps; a scale is finite, not negative, and none is beyond 2^32."""
        import numpy as np

        packed = np.zeros((-(-count // self.block), 4 + self.block), np.uint8)
        packed.reshape(-1)[: len(data)] = np.frombuffer(data, np.uint8)
        scales = np.ascontiguousarray(packed[:, :4]).view("<f4")
        if not np.isfinite(scales).all() or (scales > LARGEST_SCALE).any():
            raise MalformedError("a block's scale is NaN, infinite or beyond 2^32", is_number=True)
        if np.signbit(scales).any():
            raise MalformedError("a block's scale is negative")
        steps = packed[:, 4:].view(np.int8)
        if (steps == -128).any():
            raise MalformedError("a number is -128 steps, and 127 are the most")
        return (steps * scales.astype(np.float32)).reshape(-1)[:count]


@dataclass(frozen=True)
class Largest(Packing):
    """Of each piece of m numbers the ceil(share m) largest: which they are, and then themselves in float32.

    Which they are is told by a bit for each of the m, or by a uint16 for each that is sent: the fewer bytes of the two.
    """

    share: float
    piece: int = PIECE

    def num_bytes(self, count: int) -> int:
        """Return the bytes of whole pieces, and of a shorter one."""
        whole, rest = divmod(count, self.piece)
        return whole * self._piece_bytes(self.piece) + self._piece_bytes(rest)

    def num_sent(self, count: int) -> int:
        """Return how many numbers all pieces send."""
        whole, rest = divmod(count, self.piece)
        return whole * self._kept(self.piece) + self._kept(rest)

    def pack(self, values: Array, rng: "np.random.Generator | None" = None) -> bytes:
        """Return each piece's largest numbers; of two that are as large the first is sent."""
        import numpy as np

        flat = np.asarray(values, np.float32).reshape(-1)
        parts = []
        for begin in range(0, flat.size, self.piece):
            piece = flat[begin : begin + self.piece]
            places = np.sort(np.argsort(-np.abs(piece), kind="stable")[: self._kept(piece.size)])
            if self._has_bits(piece.size):
                bits = np.zeros(piece.size, np.bool_)
                bits[places] = True
                parts.append(np.packbits(bits, bitorder="little").tobytes())
            else:
                parts.append(places.astype("<u2").tobytes())
            parts.append(piece[places].astype("<f4").tobytes())
        return b"".join(parts)

    def unpack(self, data: "bytes | memoryview", count: int) -> Array:
        """Return what was sent, and zero elsewhere."""
        import numpy as np

        found = np.zeros(count, np.float32)
        view, position = memoryview(data), 0
        for begin in range(0, count, self.piece):
            piece = found[begin : begin + self.piece]
            end = position + self._piece_bytes(piece.size)
            values = np.frombuffer(view[position:end][-4 * self._kept(piece.size) :], "<f4")
            piece[self._places(view[position : end - 4 * values.size], piece.size)] = values
            position = end
        return found

    def _places(self, data: memoryview, size: int) -> Array:
        """Return where a piece's numbers belong: as many places as are sent, rising."""
        import numpy as np

        if self._has_bits(size):
            bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
            if bits[size:].any():
                raise MalformedError(f"a bit is set behind the last of {size} numbers")
            places: Array = np.flatnonzero(bits)
            if places.size != self._kept(size):
                raise MalformedError(f"{places.size} bits of a piece are set, not {self._kept(size)}")
            return places
        places = np.frombuffer(data, "<u2").astype(np.int64)
        if not (np.diff(places) > 0).all():
            raise MalformedError("the places of a piece's numbers do not rise")
        if places[-1] >= size:
            raise MalformedError(f"a place is {places[-1]}, and the piece has {size} numbers")
        return places

    def _kept(self, size: int) -> int:
        return math.ceil(Fraction(str(self.share)) * size)  # exact, as whoever writes 0.1 means it

    def _has_bits(self, size: int) -> bool:
        return -(-size // 8) <= 2 * self._kept(size)

    def _piece_bytes(self, size: int) -> int:
        kept = self._kept(size)
        return 4 * kept + min(-(-size // 8), 2 * kept)


def packing_of(name: str, share: float | None) -> Packing | None:
    """Return the packing of an encoding; None for one whose numbers a safetensors file has a type for."""
    if name == "int8":
        return Int8Blocks()
    return Largest(share) if name == "top_k" and share is not None else None
