"""Secure aggregation as arithmetic: published vectors, and the sum of every set that may be summed is the plain one."""

import math
import secrets
from itertools import combinations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedcli.secure_aggregation.agreement import Unsealable, commitment, derive, label, seal, unseal
from fedcli.secure_aggregation.fixed_point import (
    LARGEST,
    MOST_CLIENTS,
    OutOfRange,
    from_ring,
    from_ring_in_place,
    to_ring,
)
from fedcli.secure_aggregation.masks import BLOCK, Keystream, add_masks
from fedcli.secure_aggregation.party import (
    SELF,
    make_secrets,
    mask,
    reveal_seeds,
    reveal_shares,
    share,
    unlocking_keys,
    what_is,
)
from fedcli.secure_aggregation.shamir import PRIME, BadShares, evaluate, interpolate_at_zero, join, split
from fedcli.secure_aggregation.summation import disagreements, recover, unmask
from fedcli.secure_aggregation.terms import Terms, fewest_of

slow = pytest.mark.slow
KEYS = [X25519PrivateKey.from_private_bytes(bytes([number + 1]) * 32) for number in range(12)]
PUBLIC = [key.public_key().public_bytes_raw() for key in KEYS]
CHANGES = np.array([[0.5, -0.25], [-1, 0.125], [0.25, 2]])
ROWS = [10, 30, 60]


def terms(mode: str, size: int) -> Terms:
    return Terms(mode=mode, workspace="ws", round=0, attempt=0, size=size, keys=dict(enumerate(PUBLIC[:size])))


def vector_seed(client: int, other: int) -> bytes:
    """Return a pair's key as the published vectors have it, without an attempt."""
    low, high = sorted((client, other))
    info = label("pair", "ws", 0, low, high).encode() + PUBLIC[low] + PUBLIC[high]
    return derive(KEYS[client], PUBLIC[other], info)


def masked(client: int) -> np.ndarray:
    numbers = to_ring(CHANGES[client], ROWS[client])
    others = [other for other in range(3) if other != client]
    add_masks(
        numbers,
        [vector_seed(client, other) for other in others if other > client],
        [vector_seed(client, other) for other in others if other < client],
    )
    return numbers


def test_the_published_vectors_of_keys_masks_and_sums_hold_digit_for_digit() -> None:
    assert [key.hex() for key in PUBLIC[:3]] == [
        "a4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a209",
        "ce8d3ad1ccb633ec7b70c17814a5c76ecd029685050d344745ba05870e587d59",
        "5dfedd3b6bd47f6fa28ee15d969d5bb0ea53774d488bdaf9df1c6e0124b3ef22",
    ]
    seed = vector_seed(0, 1)
    assert seed.hex() == "6d764e4935fdc0d88a38da4e29a245a61eaf5bc1b8cd30069596e51e1075410c"
    assert seed == vector_seed(1, 0)
    assert [*Keystream(seed).take(2)] == [0x8DADC73AC3C9E8E2, 0x3717476A64F11A2C]
    assert [*masked(0)] == [0xAFD9DEEB4A6D9CF0, 0x8F445A1FCEA80D3F]
    assert (from_ring(masked(0) + masked(1) + masked(2)) / 100).tolist() == [-0.1, 1.2125]
    total = masked(0) + masked(1)
    assert (from_ring(total) / 40).round(2).tolist() == [-2405182.75, -22383169.66]
    unmask(total, {(client, 2): vector_seed(client, 2) for client in (0, 1)}, {})
    assert (from_ring(total) / 40).tolist() == [-0.625, 0.03125]


def test_the_published_vector_of_shares_holds() -> None:
    secret = b"\1" * 32
    coefficients = [int.from_bytes(secret, "little"), int.from_bytes(bytes(range(2, 34)), "little")]
    points = {point: evaluate(coefficients, point) for point in (1, 2, 3)}
    shares = [value.to_bytes(32, "little").hex() for value in points.values()]
    ends = [("0304", "2122"), ("05070"[:4], "4143"), ("070a0d10"[:4], "6164")]
    assert [(text[:4], text[-4:]) for text in shares] == ends
    assert (3 * points[1] - points[3]) * pow(2, -1, PRIME) % PRIME == coefficients[0]
    assert interpolate_at_zero({1: points[1], 3: points[3]}).to_bytes(32, "little") == secret


def test_fixed_point_is_exact_to_half_a_unit_and_refuses_what_would_not_fit() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    assert abs(from_ring(to_ring(values, 3.0)) - 3.0 * values).max() <= 2.0**-33
    ring = to_ring(np.arange(-70000.0, 70000.0))
    assert np.array_equal(from_ring_in_place(ring), np.arange(-70000.0, 70000.0))
    assert [*to_ring(np.array([-(2.0**-32), 2.0**-34, 1.0]))] == [2**64 - 1, 0, 2**32]
    assert MOST_CLIENTS * LARGEST * 2.0**32 < 2.0**63
    assert from_ring(to_ring(np.array([LARGEST, -LARGEST]))).tolist() == [LARGEST, -LARGEST]
    for odd in (LARGEST * 1.0001, -LARGEST * 1.0001, np.nan, np.inf, -np.inf):
        with pytest.raises(OutOfRange):
            to_ring(np.array([0.0, odd]))


def test_masks_go_on_from_block_to_block_and_cancel() -> None:
    numbers = np.arange(2 * BLOCK + 3, dtype=np.uint64)
    whole = numbers.copy()
    add_masks(whole, [b"k" * 32])
    stream = Keystream(b"k" * 32)
    parts = [stream.take(min(BLOCK, numbers.size - begin)).copy() for begin in range(0, numbers.size, BLOCK)]
    assert np.array_equal(whole - numbers, np.concatenate(parts))
    add_masks(whole, [], [b"k" * 32])
    assert np.array_equal(whole, numbers)


def test_any_enough_shares_give_a_secret_and_one_less_gives_none() -> None:
    for secret in (bytes(32), b"\xff" * 32, secrets.token_bytes(32)):
        shares = split(secret, 3, [1, 2, 5, 9])
        for chosen in combinations(shares, 3):
            assert join({point: shares[point] for point in chosen}) == secret
        for chosen in combinations(shares, 2):
            with pytest.raises(BadShares):  # but with a chance of 2^-127
                join({point: shares[point] for point in chosen})


def test_a_wrong_share_is_left_out_and_too_many_give_nothing() -> None:
    secret = secrets.token_bytes(32)
    shares = {point - 1: part for point, part in split(secret, 3, [1, 2, 3, 4, 5]).items()}
    shares[1] = bytes(64)
    assert recover(shares, 3, commitment(secret)) == secret
    shares |= {2: bytes(64), 3: secrets.token_bytes(64)}
    assert recover(shares, 3, commitment(secret)) is None


@pytest.mark.parametrize("wrong", [0, 10, 19])
def test_one_wrong_share_of_twenty_stops_nobody(wrong: int) -> None:
    secret = secrets.token_bytes(32)
    shares = {point - 1: part for point, part in split(secret, 14, range(1, 21)).items()}
    shares[wrong] = secrets.token_bytes(64)
    assert recover(shares, 14, commitment(secret)) == secret


def test_what_is_sealed_opens_for_its_receiver_alone_and_as_what_it_is() -> None:
    agreed = terms("double", 4)
    secret = make_secrets(agreed, KEYS[0], 0)
    packets = share(agreed, KEYS[0], 0, secret)
    key = unlocking_keys(agreed, KEYS[2], 2)[0]
    assert len(unseal(key, packets[SELF][2], what_is(SELF))) == 64
    with pytest.raises(Unsealable):
        unseal(key, packets[SELF][2], what_is("1"))
    with pytest.raises(Unsealable):
        unseal(key, packets[SELF][1], what_is(SELF))
    for other in (unlocking_keys(agreed, KEYS[1], 1)[0], unlocking_keys(agreed, KEYS[2], 2)[1]):
        with pytest.raises(Unsealable):
            unseal(other, packets[SELF][2], what_is(SELF))
    assert seal(key, b"x", "y") != seal(key, b"x", "y")


def test_two_who_do_not_share_a_mask_are_named() -> None:
    agreed = terms("pairwise", 3)
    said = {client: make_secrets(agreed, KEYS[client], client).commitments() for client in range(3)}
    assert disagreements(said) == []
    said[2] = make_secrets(agreed, KEYS[5], 2).commitments()
    assert disagreements(said) == [(0, 2), (1, 2)]


FEWEST = {"pairwise": [3, 3, 3, 4, 4, 5, 5, 6], "double": [3, 3, 4, 5, 5, 6, 7, 7]}


@pytest.mark.parametrize(("mode", "fewest"), FEWEST.items())
def test_how_few_may_be_summed(mode: str, fewest: list[int]) -> None:
    assert [fewest_of(mode, size) for size in range(3, 11)] == fewest
    for size in range(3, 40):
        share_of_all = fewest_of(mode, size) / size
        assert share_of_all > (1 / 2 if mode == "pairwise" else 2 / 3)
    assert terms(mode, 2).fault() == "2 of 2 clients take part, and 3 are needed"


def plain(size: int) -> np.ndarray:
    return np.random.default_rng(size).normal(size=(size, 5))


def check_every_set(mode: str, size: int) -> tuple[int, int]:
    """Sum every set with up to four missing; return how many were right, and how many may not be summed."""
    agreed, changes = terms(mode, size), plain(size)
    secret = {client: make_secrets(agreed, KEYS[client], client) for client in agreed.cohort}
    vectors = {client: to_ring(changes[client], client + 1.0) for client in agreed.cohort}
    for client, numbers in vectors.items():
        mask(numbers, client, secret[client])
    sharing = agreed.cohort if mode == "double" else []
    packets = {client: share(agreed, KEYS[client], client, secret[client]) for client in sharing}
    unlock = {client: unlocking_keys(agreed, KEYS[client], client) for client in packets}
    done = refused = 0
    for missing in (chosen for count in range(5) for chosen in combinations(agreed.cohort, count)):
        counted, dropped = [client for client in agreed.cohort if client not in missing], [*missing]
        if agreed.fault_of_sum(counted, dropped) is not None:
            assert len(counted) < fewest_of(mode, size)
            refused += 1
            continue
        total = sum(vectors[client] for client in counted)
        seeds, own = {}, {}
        if mode == "pairwise":
            for client in counted:
                for other, seed in reveal_seeds(secret[client], dropped).seeds.items():
                    seeds[client, other] = seed
        else:
            holders = counted[: agreed.fewest]
            opened = {
                holder: reveal_shares(
                    unlock[holder],
                    dropped,
                    {sender: {name: parts[holder] for name, parts in packets[sender].items()} for sender in counted},
                ).shares
                for holder in holders
            }
            for client in counted:
                said = secret[client].commitments()
                for name in (SELF, *map(str, dropped)):
                    shares = {holder: opened[holder][client][name] for holder in holders}
                    found = recover(shares, agreed.fewest, said[name])
                    assert found is not None
                    if name == SELF:
                        own[client] = found
                    else:
                        seeds[client, int(name)] = found
        unmask(total, seeds, own)
        expected = sum((client + 1.0) * changes[client] for client in counted)
        assert abs(from_ring(total) - expected).max() <= len(counted) * 2.0**-33
        done += 1
    return done, refused


@pytest.mark.parametrize("mode", ["pairwise", "double"])
def test_every_sum_of_few_clients_is_the_plain_one(mode: str) -> None:
    assert check_every_set(mode, 5) == {"pairwise": (16, 15), "double": (6, 25)}[mode]


@slow
def test_every_sum_of_up_to_twelve_clients_with_up_to_four_missing_is_the_plain_one() -> None:
    found = {(mode, size): check_every_set(mode, size) for mode in ("pairwise", "double") for size in range(3, 13)}
    assert sum(done + refused for done, refused in found.values()) == 2 * 2372
    may = {
        (mode, size): sum(math.comb(size, count) for count in range(min(4, size - least) + 1))
        for mode, part in (("pairwise", 1 / 2), ("double", 2 / 3))
        for size in range(3, 13)
        for least in [max(3, math.floor(part * size + 1e-9) + 1)]
    }
    assert {key: done for key, (done, _) in found.items()} == may
    assert sum(may.values()) == 2199 + 838


def test_answers_reveal_no_share_of_both_kinds_of_one_client() -> None:
    agreed = terms("double", 4)
    secret = {client: make_secrets(agreed, KEYS[client], client) for client in agreed.cohort}
    packets = {client: share(agreed, KEYS[client], client, secret[client]) for client in agreed.cohort}
    given = {sender: {name: parts[1] for name, parts in packets[sender].items()} for sender in (0, 1, 2)}
    revealed = reveal_shares(unlocking_keys(agreed, KEYS[1], 1), [3], given)
    assert {sender: sorted(parts) for sender, parts in revealed.shares.items()} == {
        sender: ["3", SELF] for sender in (0, 1, 2)
    }
    for odd in ([0, 1, 2, 3], [2], []):
        assert agreed.fault_of_sum([0, 1, 2], odd) is not None
    assert agreed.fault_of_sum([0, 1], [2, 3]) == "it sums 2 of 4 clients, and 3 are needed"
