"""The adapter of its own that a client trains beside the shared one, as train.personal asks; it is never sent.

It makes as many steps again as the shared one made, on the rows that were drawn for that, and costs as much again.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fedcli.algos import Array, Arrays
from fedcli.algos.client_rule import Proximal
from fedcli.algos.lora import is_first_factor
from fedcli.parties.party import Party
from fedcli.randomness import stream
from fedcli.training.reports import StepReport
from fedcli.workspace.client_state import GLOBAL, PERSONAL
from fedcli.workspace.history import Round
from fedcli.workspace.train_records import PersonalRecord

if TYPE_CHECKING:
    from fedcli.client.runtime import Runtime
    from fedcli.client.selection import Selection


def train_own(
    runtime: "Runtime",
    party: Party,
    head: Round,
    adapter: Arrays,
    kept: Mapping[str, Arrays],
    *,
    steps: int,
    first_draw: int,
    selection: "Selection | None",
    on_step: Callable[[StepReport], None],
) -> "dict[str, dict[str, Array]]":
    """Train a client's own adapter for a round; return what it keeps if its update counts, by folder.

    `adapter` is the round's global one, x. Ditto's v begins with x, FedDPA's local adapter as LoRA does: A drawn, B
    zero. `steps` and `selection` are the shared adapter's; the steps are told behind those. Nothing happens where the
    round asks for none.
    """
    train = head.manifest.train.model_copy(update={"steps": steps})
    if (personal := train.personal) is None:
        return {}
    own = kept.get(PERSONAL) or begin(personal, adapter, train.seed, party.client)
    is_ditto = personal.name == "ditto"
    values, _ = runtime.train(
        own,
        train.model_copy(update={"steps": steps, "minutes": None}),
        party=party,
        round_number=head.number,
        first_draw=first_draw,
        rule=Proximal(adapter, personal.pull or 0.0) if is_ditto else None,
        on_step=lambda report: on_step(replace(report, step=steps + report.step)),
        beside=head.beside() | ({} if is_ditto else {GLOBAL: adapter}),
        weight=personal.weight or 1.0,
        selection=selection,
    )
    return {PERSONAL: values}


def begin(personal: PersonalRecord, adapter: Arrays, seed: int, client: int) -> Arrays:
    """Return what a client's own adapter starts from: x, or for FedDPA a drawn A and B zero."""
    if personal.name == "ditto":
        return adapter
    found = {}
    for name, array in adapter.items():
        if is_first_factor(name):
            bound = 1 / math.sqrt(array.shape[1])
            draw = stream(seed, "personal", client=client, part=name)
            found[name] = draw.uniform(-bound, bound, array.shape).astype(np.float32)
        else:
            found[name] = np.zeros(array.shape, np.float32)
    return found
