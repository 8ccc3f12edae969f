"""A client's adapter as differences in fewer bytes; what a sparse update does not send waits for the next."""

from collections.abc import Mapping, Sequence

import numpy as np

from fedcli.algos import Array, Arrays
from fedcli.workspace.client_state import RESIDUAL
from fedcli.workspace.encoded_differences import client_draw, decode_differences, encode_differences
from fedcli.workspace.history import Round


def encode_adapter(
    head: Round, past: Sequence[Round], client: int, trained: Arrays, kept: Mapping[str, Arrays]
) -> "tuple[bytes, dict[str, dict[str, Array]]]":
    """Return the adapter's file of an update, and what the client keeps of it if the update counts, by folder.

    The same training gives the same bytes. Only sparse updates keep something: e+ = d + e - what is sent. An e that
    rounds have passed over is stale, and counts (1 + how many)^-1/2 of itself, as late updates do.
    """
    manifest, adapter = head.manifest, head.adapter()
    encoding = manifest.encoding
    assert encoding is not None
    differences = {name: trained[name] - adapter[name] for name in manifest.sent_tensors}
    if encoding.top_k is None:
        return encode_differences(differences, encoding, client_draw(manifest, client)), {}
    before, weight = kept.get(RESIDUAL, {}), np.float32((1 + missed_rounds(past, client)) ** -0.5)
    for name in differences.keys() & before.keys():
        differences[name] = differences[name] + weight * before[name]
    contents = encode_differences(differences, encoding, client_draw(manifest, client))
    sent = decode_differences(contents, manifest.sent_tensors, encoding)
    unsent: dict[str, Array] = {name: difference - sent[name] for name, difference in differences.items()}
    return contents, {RESIDUAL: {**before, **unsent}}


def missed_rounds(past: Sequence[Round], client: int) -> int:
    """Return how many rounds have closed without a counted update of the client since its last one; all, if none."""
    missed = 0
    for closing in reversed(past):
        if closing.manifest.aggregation is None or any(
            entry.client == client for entry in closing.manifest.aggregation.counted
        ):
            break
        missed += 1
    return missed
