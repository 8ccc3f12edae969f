"""What a round's manifest does not tell where privacy has a unit: figures that are exact, and no noise hides."""

from fedcli.workspace.history import Round
from fedcli.workspace.merge_records import Aggregation, CountedUpdate

WITHHELD = "withheld: it may tell of the client's rows (manifest.privacy)"


def without_figures(base: Round, aggregation: Aggregation) -> Aggregation:
    """Return the record of a round's merge as it is published: without losses, norms, rows and reasons.

    Bytes are those of the files in float32, without update.json, whose length tells its digits.
    """
    privacy, cost = base.manifest.privacy, base.manifest.cost
    if privacy is None or not base.manifest.withholds:
        return aggregation
    hidden = dict.fromkeys(("num_samples", "train_loss", "delta_norm", "cosine", "change"))
    hidden |= {"bytes": None if cost is None else cost.client_bytes_up}
    hidden |= {} if privacy.row_cap is None else {"weight": None}
    hidden |= {} if privacy.is_at_party else {"privacy": None}
    counted: list[CountedUpdate] = [entry.model_copy(update=hidden) for entry in aggregation.counted]
    refused = [entry.model_copy(update={"reason": WITHHELD}) for entry in aggregation.refused]
    return aggregation.model_copy(update={"counted": counted, "refused": refused})
