"""Files of differences in fewer bytes than float32 takes: what a manifest's `encoding` asks for, both ways."""

import math
from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise

import numpy as np

from fedcli.algos import Array, Arrays
from fedcli.algos.packing import packing_of
from fedcli.randomness import stream
from fedcli.workspace.encoding_record import EncodingRecord
from fedcli.workspace.records import Manifest, TensorEntry
from fedcli.workspace.tensors import (
    FLOATS,
    PACKED,
    Span,
    file_of,
    header_bytes,
    locate,
    numbers,
)

Draw = Callable[[str], np.random.Generator]
"""Returns the stream that rounds a tensor's numbers, by its name."""
PACKED_NAME = "packed"
"""The one tensor of a file of packed differences: headers that name each would weigh more than small tensors do."""
_LARGEST_F16 = 65504.0


def client_draw(manifest: Manifest, client: int) -> Draw:
    """Return what rounds a client's differences in a round: the same whenever it trains again."""
    return lambda tensor: stream(
        manifest.train.seed, "encoding", round_number=manifest.round, client=client, part=tensor
    )


def server_draw(manifest: Manifest) -> Draw:
    """Return what rounds the step that the server makes of a round's updates."""
    return lambda tensor: stream(manifest.train.seed, "encoding-step", round_number=manifest.round, part=tensor)


def encode_differences(differences: Arrays, encoding: EncodingRecord, draw: Draw) -> bytes:
    """Return a safetensors file of float32 differences."""
    parts = [_packed(differences[name], encoding, draw(name)) for name in sorted(differences)]
    if packing_of(encoding.name, encoding.top_k) is None:
        return file_of({name: array.shape for name, array in differences.items()}, encoding.name.upper(), parts)
    return file_of({PACKED_NAME: (sum(map(len, parts)),)}, PACKED[0], parts)


def decode_differences(data: bytes, schema: Mapping[str, TensorEntry], encoding: EncodingRecord) -> dict[str, Array]:
    """Return the float32 differences of a file with exactly these tensors; raise Refusal where it is none.

    Whether they are values that an update may hold is not looked at.
    """
    spans = locate_differences(data, schema, encoding)
    return {name: numbers(data, span).astype(np.float32).reshape(schema[name].shape) for name, span in spans.items()}


def locate_differences(
    data: bytes | memoryview,
    schema: Mapping[str, TensorEntry],
    encoding: EncodingRecord | None,
    num_bytes: int | None = None,
) -> dict[str, Span]:
    """Return where a file of differences has its tensors, as `tensors.locate` does; None: it is one of values."""
    packing = None if encoding is None else packing_of(encoding.name, encoding.top_k)
    if encoding is None or packing is None:
        return locate(data, schema, num_bytes, FLOATS if encoding is None else (encoding.name.upper(),))
    counts = {name: math.prod(schema[name].shape) for name in sorted(schema)}
    sizes = [packing.num_bytes(count) for count in counts.values()]
    whole = locate(data, {PACKED_NAME: TensorEntry(shape=(sum(sizes),), dtype="F32")}, num_bytes, PACKED)[PACKED_NAME]
    ends = [*accumulate(sizes, initial=whole.start)]
    places = zip(counts.items(), pairwise(ends), strict=True)
    return {name: Span(whole.dtype, start, end, count, packing) for (name, count), (start, end) in places}


def differences_size(schema: Mapping[str, TensorEntry], encoding: EncodingRecord) -> int:
    """Return the bytes of the file that `encode_differences` makes of tensors of this schema."""
    packing = packing_of(encoding.name, encoding.top_k)
    counts = {name: math.prod(entry.shape) for name, entry in schema.items()}
    if packing is None:
        shapes = {name: entry.shape for name, entry in schema.items()}
        return header_bytes(shapes, encoding.name.upper()) + 2 * sum(counts.values())
    size = sum(map(packing.num_bytes, counts.values()))
    return header_bytes({PACKED_NAME: (size,)}, PACKED[0]) + size


def numbers_sent(schema: Mapping[str, TensorEntry], encoding: EncodingRecord | None) -> int:
    """Return how many numbers of tensors of this schema a client sends."""
    packing = None if encoding is None else packing_of(encoding.name, encoding.top_k)
    counts = [math.prod(entry.shape) for entry in schema.values()]
    return sum(counts if packing is None else map(packing.num_sent, counts))


def _packed(values: Array, encoding: EncodingRecord, rng: np.random.Generator) -> bytes:
    """Return a tensor's bytes; 16-bit numbers are the nearest ones, and float16 ends at 65,504."""
    packing = packing_of(encoding.name, encoding.top_k)
    if packing is not None:
        return packing.pack(values, rng)
    if encoding.name == "f16":
        return bytes(np.clip(values, -_LARGEST_F16, _LARGEST_F16).astype("<f2").tobytes())
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # of two that are as near the even one
    return bytes(nearest.astype("<u2").tobytes())
