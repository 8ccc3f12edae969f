"""Adapters as safetensors bytes: encoding, and decoding that trusts nothing."""

import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save

from fedcli.algos import Array, Arrays
from fedcli.workspace.records import TensorEntry
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.strict_json import parse_object

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_MINIMUM_HEADER_LIMIT = 2**20


def encode(arrays: Arrays) -> bytes:
    """Return named float32 arrays as the bytes of a safetensors file; the same arrays give the same bytes."""
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata={"format": "pt"})


def schema_of(arrays: Arrays) -> dict[str, TensorEntry]:
    """Return the manifest's tensor list of float32 arrays."""
    return {name: TensorEntry(shape=array.shape, dtype="F32") for name, array in arrays.items()}


def largest_file(schema: Mapping[str, TensorEntry]) -> int:
    """Return the most bytes that a file with these tensors may have: float32 and the largest header."""
    return 8 + _header_limit(schema) + sum(4 * math.prod(entry.shape) for entry in schema.values())


def decode(data: bytes | memoryview, schema: Mapping[str, TensorEntry]) -> dict[str, Array]:
    """Return the arrays of a safetensors file that has exactly the schema's names and shapes, all of them finite.

    F32 and F16 come back as views of `data`, BF16 as float32. Raises Refusal with code header, duplicate, schema or
    nonfinite.
    """
    header, body = _split(memoryview(data), schema)
    if header.keys() != schema.keys():
        odd = sorted(header.keys() ^ schema.keys())
        raise Refusal("schema", f"{len(odd)} tensor names differ from the manifest's, the first is {odd[0]!r}")
    arrays: dict[str, Array] = {}
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(item)[0]):
        dtype, start, end = _check_entry(name, entry, schema[name])
        if start != position:
            raise Refusal("header", f"tensor {name!r} begins at byte {start}, not {position}: an overlap or a hole")
        if end > len(body):
            raise Refusal("header", f"tensor {name!r} ends at byte {end} of {len(body)}")
        position = end
        array = np.frombuffer(body[start:end], dtype=_DTYPES[dtype]).reshape(schema[name].shape)
        if dtype == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        if not np.isfinite(array).all():
            raise Refusal("nonfinite", f"tensor {name!r} holds NaN or infinity")
        arrays[name] = array
    if position != len(body):
        raise Refusal("header", f"{len(body) - position} bytes follow the last tensor")
    return arrays


def _split(data: memoryview, schema: Mapping[str, TensorEntry]) -> tuple[dict[str, Any], memoryview]:
    """Return the header without its metadata, and the bytes behind it."""
    if len(data) < 8:
        raise Refusal("header", f"{len(data)} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", data[:8])
    if length > _header_limit(schema):
        raise Refusal("header", f"a header of {length} bytes, {_header_limit(schema)} are allowed")
    if 8 + length > len(data):
        raise Refusal("header", f"a header of {length} bytes in a file of {len(data)}")
    try:
        header = parse_object(bytes(data[8 : 8 + length]), "the safetensors header")
    except Refusal as refusal:
        code = "header" if refusal.code == "json" else refusal.code
        raise Refusal(code, refusal.reason) from refusal
    header.pop("__metadata__", None)
    return header, data[8 + length :]


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


def _check_entry(name: str, entry: dict[str, Any], expected: TensorEntry) -> tuple[str, int, int]:
    """Return dtype and offsets of a tensor whose shape is the expected one."""
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise Refusal("schema", f"tensor {name!r} has dtype {dtype!r}, not one of {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or tuple(shape) != expected.shape or any(type(size) is not int for size in shape):
        raise Refusal("schema", f"tensor {name!r} has shape {shape!r}, not {list(expected.shape)}")
    start, end = _offsets((name, entry))
    size = math.prod(expected.shape) * _DTYPES[dtype].itemsize
    if end - start != size:
        raise Refusal("header", f"tensor {name!r} takes {end - start} bytes, not {size}")
    return dtype, start, end
