"""Packed differences: the vectors and errors of the sources, digit for digit, and bytes that no packing wrote."""

import numpy as np
import pytest

from fedcli.algos.packing import PIECE, Int8Blocks, Largest, MalformedError, packing_of
from fedcli.workspace.encoded_differences import Draw, decode_differences, differences_size, encode_differences
from fedcli.workspace.encoding_record import EncodingRecord
from fedcli.workspace.records import TensorEntry

DRAW: Draw = lambda tensor: np.random.default_rng([*tensor.encode()])  # noqa: E731


def gaussian(size: int = 2**18, scale: float = 1e-4) -> np.ndarray:
    """Return differences as training makes them."""
    return np.random.default_rng(0).normal(scale=scale, size=size).astype(np.float32)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the relative L2 error."""
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted.astype(np.float64)))


def sent_as(values: np.ndarray, name: str, top_k: float | None = None) -> np.ndarray:
    """Return what is received of differences."""
    record = EncodingRecord(name=name, top_k=top_k, down="int8")
    schema = {"x": TensorEntry(shape=values.shape, dtype="F32")}
    contents = encode_differences({"x": values}, record, DRAW)
    assert len(contents) == differences_size(schema, record)
    return decode_differences(contents, schema, record)["x"]


def test_top_k_sends_the_largest_and_its_error_feedback_sends_the_rest_later():
    largest, d = Largest(0.5), np.array([3, -1, 0.5, 2], np.float32)
    sent = largest.unpack(largest.pack(d), 4)
    assert sent.tolist() == [3, 0, 0, 2]
    e = d - sent
    assert e.tolist() == [0, -1, 0.5, 0]
    sent = largest.unpack(largest.pack(np.array([0, -1, 0.5, 0], np.float32) + e), 4)
    assert sent.tolist() == [0, -2, 1, 0]
    assert (np.array([0, -1, 0.5, 0]) + e - sent).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("block", "wanted", "num_bytes"), [(64, 0.0060, 1.0625), (256, 0.0070, 1.016)])
def test_int8_blocks_lose_what_the_sources_say(block, wanted, num_bytes):
    packing, values = Int8Blocks(block), gaussian()
    packed = packing.pack(values, None)
    # Of many numbers it is 0.0059 and 0.0070: the sources round the first one up.
    assert error(packing.unpack(packed, values.size), values) == pytest.approx(wanted, rel=0.011)
    assert len(packed) / values.size == pytest.approx(num_bytes, abs=4e-4)


def test_rounding_at_random_is_unbiased_and_costs_a_root_of_two():
    packing, values = Int8Blocks(), gaussian(2**12)
    rng = np.random.default_rng(1)
    draws = [packing.unpack(packing.pack(values, rng), values.size) for _ in range(100)]
    assert error(draws[0], values) == pytest.approx(2**0.5 * 0.0060, rel=0.03)
    assert error(np.mean(draws, axis=0), values) == pytest.approx(2**0.5 * 0.0060 / 100**0.5, rel=0.06)


def test_16_bit_differences_keep_what_16_bit_values_lose():
    difference, adapter = gaussian(), np.random.default_rng(1).normal(scale=0.02, size=2**18).astype(np.float32)
    trained = adapter + difference
    as_bf16 = lambda x: sent_as(x, "bf16")  # noqa: E731
    assert round(error(as_bf16(difference), difference), 4) == 0.0017
    assert round(error(sent_as(difference, "f16"), difference), 4) == 0.0002
    assert round(error(as_bf16(trained) - adapter, difference), 2) == 0.33
    assert round(error(sent_as(trained, "f16") - adapter, difference), 2) == 0.04


@pytest.mark.parametrize(("share", "wanted"), [(0.25, 0.53), (0.1, 0.75), (0.01, 0.96)])
def test_top_k_without_feedback_loses_what_the_sources_say(share, wanted):
    values = gaussian()
    assert round(error(sent_as(values, "top_k", share), values), 2) == wanted


@pytest.mark.parametrize(("share", "bits"), [(0.1, True), (0.01, False), (0.0625, True), (0.0624, False)])
def test_which_numbers_are_sent_is_told_in_the_fewer_bytes(share, bits):
    kept = -(-int(share * PIECE * 10**6) // 10**6)
    assert Largest(share).num_bytes(PIECE) == 4 * kept + (PIECE // 8 if bits else 2 * kept)


@pytest.mark.parametrize("packing", [Int8Blocks(), Largest(0.1), Largest(0.01)])
@pytest.mark.parametrize("size", [1, 63, 64, 65, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 70])
def test_a_part_is_unpacked_as_the_whole(packing, size):
    values = gaussian(size)
    packed = packing.pack(values, np.random.default_rng(0))
    assert len(packed) == packing.num_bytes(size)
    whole = packing.unpack(packed, size)
    for begin in range(0, size, PIECE):
        end = min(begin + PIECE, size)
        part = packing.unpack(packed[packing.num_bytes(begin) : packing.num_bytes(end)], end - begin)
        assert (part == whole[begin:end]).all()


@pytest.mark.parametrize("values", [np.zeros(70), np.full(70, 1e-45), np.full(70, 3e38), np.array([0.0])])
@pytest.mark.parametrize("name", ["f16", "bf16", "int8"])
def test_odd_numbers_are_sent_without_a_warning(values, name):
    if name == "int8" and values.max() > 1e30:
        return  # beyond what an update may hold
    assert np.isfinite(sent_as(values.astype(np.float32), name)).all()


def scales(*found: float) -> bytes:
    """Return blocks with these scales, and steps of 1."""
    return b"".join(np.float32(scale).tobytes() + b"\x01" * 64 for scale in found)


@pytest.mark.parametrize(
    ("data", "is_number", "words"),
    [
        (scales(1, np.nan), True, "NaN"),
        (scales(np.inf, 1), True, "infinite"),
        (scales(-np.inf, 1), True, "infinite"),
        (scales(1, 2.0**33), True, "beyond"),
        (scales(1, -1.0), False, "negative"),
        (scales(1, -0.0), False, "negative"),
        (b"\x01\x00\xa0\x7f" + b"\x00" * 64 + scales(1), True, "NaN"),  # a signalling one
        (scales(1) + b"\x00\x00\x80\x3f" + b"\x80" * 64, False, "-128"),
    ],
)
def test_scales_and_steps_that_no_client_sends_are_refused(data, is_number, words):
    with pytest.raises(MalformedError, match=words) as found:
        Int8Blocks().unpack(data, 128)
    assert found.value.is_number == is_number


def sparse(places: list[int], *, size: int = 100, share: float = 0.02) -> bytes:
    """Return a piece of two numbers whose places are these."""
    return np.array(places, "<u2").tobytes() + np.ones(2, "<f4").tobytes()


@pytest.mark.parametrize(
    ("places", "words"),
    [([3, 3], "rise"), ([4, 3], "rise"), ([0, 100], "place is 100"), ([5, 65535], "65535"), ([65535, 0], "rise")],
)
def test_places_that_do_not_rise_or_lie_outside_are_refused(places, words):
    with pytest.raises(MalformedError, match=words):
        Largest(0.02).unpack(sparse(places), 100)
    assert np.flatnonzero(Largest(0.02).unpack(sparse([0, 99]), 100)).tolist() == [0, 99]


@pytest.mark.parametrize(
    ("bits", "words"),
    [(0b111, "3 bits"), (0b1, "1 bits"), (0, "0 bits"), (1 << 12 | 1, "behind"), (1 << 15, "behind")],
)
def test_bits_beyond_the_end_or_of_another_number_are_refused(bits, words):
    tail = np.ones(2, "<f4").tobytes()
    with pytest.raises(MalformedError, match=words):
        Largest(0.15).unpack(bits.to_bytes(2, "little") + tail, 12)
    assert np.flatnonzero(Largest(0.15).unpack((1 << 11 | 1).to_bytes(2, "little") + tail, 12)).tolist() == [0, 11]


def test_an_encoding_that_safetensors_has_a_type_for_is_not_packed():
    assert packing_of("f16", None) is packing_of("bf16", None) is None
