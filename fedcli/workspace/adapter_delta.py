"""A round's adapter of a workspace elsewhere, computed from this machine's copy of an earlier one."""

from typing import TYPE_CHECKING

import numpy as np

from fedcli.errors import FedError
from fedcli.workspace.encoded_differences import decode_differences
from fedcli.workspace.layout import ADAPTER_NAME, DELTA_NAME
from fedcli.workspace.parsing import sha256
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.tensors import decode, encode

if TYPE_CHECKING:
    from fedcli.workspace.history import Round

MOST_STEPS = 3
"""Of int8, which together are smaller than the adapter."""


def adapter_of_delta(found: "Round", steps: int = MOST_STEPS) -> bytes | None:
    """Return the adapter's file, which has the manifest's hash; None where it has to be fetched whole.

    That is where no copy of this round's adapter is here, nor of those of the rounds before that so many steps lead
    from, or where the steps lead elsewhere.
    """
    store, entry = found.workspace.store, found.manifest.files[ADAPTER_NAME]
    if (kept := store.kept(entry.sha256)) is not None:
        return kept
    if steps == 0 or DELTA_NAME not in found.manifest.files:
        return None
    try:
        before = found.previous()
        if before is None or (asked := before.manifest.encoding) is None or (encoding := asked.of_step) is None:
            return None
        if (origin := adapter_of_delta(before, steps - 1)) is None:
            return None
        arrays = decode(origin, before.manifest.tensors)
        step = decode_differences(found.read(DELTA_NAME), before.manifest.sent_tensors, encoding)
    except (FedError, Refusal):  # whoever reads the whole file is told what is wrong
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # the hash tells
        arrays |= {name: arrays[name] + difference for name, difference in step.items()}
    contents = encode(arrays)
    if sha256(contents) != entry.sha256:
        return None
    store.keep(entry.sha256, contents)
    return contents
