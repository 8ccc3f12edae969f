"""Adapters as safetensors bytes: encoding, and decoding that trusts nothing."""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from fedcli.algos import Array, Arrays
from fedcli.algos.packing import MalformedError, Packing
from fedcli.workspace.parsing import parse_object
from fedcli.workspace.records import TensorEntry
from fedcli.workspace.refusal import Refusal

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U64": np.dtype("<u8"),
    "U8": np.dtype("u1"),
}
FLOATS = ("F32", "F16", "BF16")
RING = ("U64",)
"""Of masked updates: numbers of the ring of 2^64."""
PACKED = ("U8",)
"""Of tensors whose numbers are packed (fedcli/algos/packing.py)."""
_MINIMUM_HEADER_LIMIT = 2**20
LARGEST_VALUE = 2.0**32
"""Of an adapter's numbers: far beyond any that trained, and what is made of such in float32 stays finite."""


class Span(NamedTuple):
    """Where a tensor lies in a safetensors file: its first byte, and the one behind its last."""

    dtype: str
    start: int
    end: int
    size: int
    """Its numbers."""
    packing: Packing | None = None
    """How they lie in these bytes, where `dtype` does not tell."""

    def num_bytes(self, count: int) -> int:
        """Return the bytes of its first numbers."""
        return count * _DTYPES[self.dtype].itemsize if self.packing is None else self.packing.num_bytes(count)

    def part(self, numbers: slice) -> "Span":
        """Return where some of the flattened tensor's numbers lie; packed ones begin at a multiple of PIECE."""
        start, end = (self.start + self.num_bytes(number) for number in (numbers.start, numbers.stop))
        return self._replace(start=start, end=end, size=numbers.stop - numbers.start)

    def moved(self, start: int) -> "Span":
        """Return the same bytes where they begin elsewhere."""
        return self._replace(start=start, end=start + self.end - self.start)


def encode(arrays: Arrays, metadata: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """Return named float32 arrays as the bytes of a safetensors file; the same arrays give the same bytes.

    They are those of `safetensors.numpy.save`, which copies the arrays three times.
    """
    tensors = {name: np.ascontiguousarray(arrays[name], "<f4") for name in sorted(arrays)}
    return b"".join(
        [
            _header({name: array.shape for name, array in tensors.items()}, metadata),
            *(array.data for array in tensors.values()),
        ]
    )


def encoded_size(schema: Mapping[str, TensorEntry]) -> int:
    """Return the bytes that `encode` makes of arrays of this schema."""
    return len(_header({name: entry.shape for name, entry in schema.items()}, {})) + sum(
        4 * math.prod(entry.shape) for entry in schema.values()
    )


def header_of(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """Return what stands before the numbers of tensors of the ring, which lie in the order of their names."""
    return _header(shapes, {}, "U64")


def file_of(shapes: Mapping[str, tuple[int, ...]], dtype: str, parts: Sequence[bytes]) -> bytes:
    """Return a safetensors file of tensors of one type; their bytes lie in the order of their names."""
    return b"".join([_header(shapes, {}, dtype), *parts])


def header_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    """Return the bytes that stand before the numbers of `file_of`."""
    return len(_header(shapes, {}, dtype))


def _header(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], dtype: str = "F32") -> bytes:
    """Return what stands before the numbers of tensors of one type, which lie in the order of their names."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + _DTYPES[dtype].itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def schema_of(arrays: Arrays) -> dict[str, TensorEntry]:
    """Return the manifest's tensor list of float32 arrays."""
    return {name: TensorEntry(shape=array.shape, dtype="F32") for name, array in arrays.items()}


def largest_file(schema: Mapping[str, TensorEntry], itemsize: int = 4) -> int:
    """Return the most bytes that a file with these tensors may have: float32, or so many a number, and a header."""
    return 8 + _header_limit(schema) + sum(itemsize * math.prod(entry.shape) for entry in schema.values())


def decode(data: bytes | memoryview, schema: Mapping[str, TensorEntry]) -> dict[str, Array]:
    """Return the arrays of a safetensors file that has exactly the schema's names and shapes, all of them finite.

    F32 and F16 come back as views of `data`, BF16 as float32. Raises Refusal with code header, duplicate, schema or
    nonfinite.
    """
    arrays = {name: numbers(data, span).reshape(schema[name].shape) for name, span in locate(data, schema).items()}
    check_finite(arrays)
    return arrays


def numbers(data: bytes | memoryview, span: Span) -> Array:
    """Return a tensor's numbers, flat: F32 and F16 as a view of `data`, BF16 and packed ones as float32.

    Raises Refusal(schema) or (nonfinite) for bytes that no packing wrote.
    """
    if span.packing is not None:
        try:
            return span.packing.unpack(memoryview(data)[span.start : span.end], span.size)
        except MalformedError as error:
            raise Refusal("nonfinite" if error.is_number else "schema", str(error)) from error
    found = np.frombuffer(memoryview(data)[span.start : span.end], dtype=_DTYPES[span.dtype])
    return (found.astype(np.uint32) << 16).view(np.float32) if span.dtype == "BF16" else found


def check_finite(arrays: Arrays) -> None:
    """Raise Refusal(nonfinite) where an array holds NaN or infinity."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise Refusal("nonfinite", f"tensor {name!r} holds NaN or infinity")


def check_values(arrays: Arrays) -> None:
    """Raise Refusal(nonfinite) where an update's array holds NaN, infinity or a number that would lead there."""
    for name, array in arrays.items():
        if are_values(array):
            continue
        check_finite({name: array})
        largest = max(float(array.max()), -float(array.min()))
        problem = f"tensor {name!r} holds {largest:.3g}, and what is beyond {LARGEST_VALUE:.3g} overflows later"
        raise Refusal("nonfinite", problem)


def are_values(array: Array) -> bool:
    """Return whether all numbers are finite, and none beyond LARGEST_VALUE."""
    if not array.size:
        return True
    least, most = float(array.min()), float(array.max())  # of float16, too, which LARGEST_VALUE is beyond
    return least >= -LARGEST_VALUE and most <= LARGEST_VALUE  # NaN is neither


def locate(
    data: bytes | memoryview,
    schema: Mapping[str, TensorEntry],
    num_bytes: int | None = None,
    dtypes: Sequence[str] = FLOATS,
) -> dict[str, Span]:
    """Return where a safetensors file with exactly the schema's names and shapes has its tensors, in the file's order.

    `num_bytes` is the file's size where `data` is only its beginning, as far as the header goes; `dtypes` are the types
    that may be. Raises Refusal with code header, duplicate or schema.
    """
    header, begin = _read_header(memoryview(data), _header_limit(schema))
    header.pop("__metadata__", None)
    if header.keys() != schema.keys():
        odd = sorted(header.keys() ^ schema.keys())
        raise Refusal("schema", f"{len(odd)} tensor names differ from the manifest's, the first is {odd[0]!r}")
    spans: dict[str, Span] = {}
    position, size = 0, (len(data) if num_bytes is None else num_bytes) - begin
    for name, entry in sorted(header.items(), key=lambda item: _offsets(item)[0]):
        dtype, start, end = _check_entry(name, entry, schema[name], dtypes)
        if start != position:
            raise Refusal("header", f"tensor {name!r} begins at byte {start}, not {position}: an overlap or a hole")
        if end > size:
            raise Refusal("header", f"tensor {name!r} ends at byte {end} of {size}")
        position = end
        spans[name] = Span(dtype, begin + start, begin + end, math.prod(entry["shape"]))
    if position != size:
        raise Refusal("header", f"{size - position} bytes follow the last tensor")
    return spans


def read_metadata(data: bytes) -> dict[str, Any]:
    """Return the metadata of a safetensors file with any tensors; raise Refusal with code header or duplicate."""
    found = _read_header(memoryview(data), len(data))[0].get("__metadata__", {})
    return found if isinstance(found, dict) else {}


def _read_header(data: memoryview, limit: int) -> tuple[dict[str, Any], int]:
    """Return a header of at most `limit` bytes, and where the first tensor begins."""
    if len(data) < 8:
        raise Refusal("header", f"{len(data)} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", data[:8])
    if length > limit:
        raise Refusal("header", f"a header of {length} bytes, {limit} are allowed")
    if 8 + length > len(data):
        raise Refusal("header", f"a header of {length} bytes in a file of {len(data)}")
    try:
        header = parse_object(bytes(data[8 : 8 + length]), "the safetensors header")
    except Refusal as refusal:
        code = "header" if refusal.code == "json" else refusal.code
        raise Refusal(code, refusal.reason) from refusal
    return header, 8 + length


def _header_limit(schema: Mapping[str, TensorEntry]) -> int:
    """Return the largest header in bytes: 1 MiB, or four times what the manifest's tensor list needs."""
    needed = sum(len(name.encode()) + 16 * len(entry.shape) + 80 for name, entry in schema.items())
    return max(_MINIMUM_HEADER_LIMIT, 4 * needed)


def _offsets(item: tuple[str, Any]) -> tuple[int, int]:
    """Return a tensor's first byte and the one behind its last."""
    name, entry = item
    match entry:
        case {"data_offsets": [int(start), int(end)]} if 0 <= start <= end:
            return start, end
    raise Refusal("header", f"tensor {name!r} has no proper data_offsets")


def _check_entry(
    name: str, entry: dict[str, Any], expected: TensorEntry, dtypes: Sequence[str]
) -> tuple[str, int, int]:
    """Return dtype and offsets of a tensor whose shape is the expected one."""
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise Refusal("schema", f"tensor {name!r} has dtype {dtype!r}, not one of {', '.join(dtypes)}")
    if not isinstance(shape, list) or tuple(shape) != expected.shape or any(type(size) is not int for size in shape):
        raise Refusal("schema", f"tensor {name!r} has shape {shape!r}, not {list(expected.shape)}")
    start, end = _offsets((name, entry))
    size = math.prod(expected.shape) * _DTYPES[dtype].itemsize
    if end - start != size:
        raise Refusal("header", f"tensor {name!r} takes {end - start} bytes, not {size}")
    return dtype, start, end
