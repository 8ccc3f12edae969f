"""Whether a federation can be a region of another, and what its merged adapter is as an update (docs/HIERARCHY.md)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedcli.config.adapter_config import parse_adapter_config
from fedcli.errors import ConfigError, IntegrityError, UsageError
from fedcli.server.region import ancestors, client_algorithm
from fedcli.tasks import TASKS
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.history import Round
from fedcli.workspace.layout import ADAPTER_CONFIG_NAME, ADAPTER_NAME
from fedcli.workspace.merge_records import Aggregation

_MEANS = ("fedavg", "fedprox")
"""Algorithms whose server makes the weighted mean and nothing else."""


@dataclass(frozen=True)
class Summed:
    """What the rounds of a region that began from one round of its parent come to."""

    num_samples: int
    """Of the updates that the last of them counted."""
    num_counted: int
    steps: int
    """That a client of it made which took part in all of them."""
    train_loss: float | None
    """The mean over the counted updates of the last, by rows; None where one of them does not tell it."""


def check_pair(parent: FederationState, child: FederationState) -> list[str]:
    """Check that a federation can be a region of another; return what must be known of it, and is no fault.

    Raises UsageError where one would be its own parent, ConfigError where they do not fit, or the parent asks of its
    clients what a region cannot give.
    """
    above, own = parent.head.manifest, child.head.manifest
    if parent.identity.id == child.identity.id:
        raise UsageError(
            f"{child.workspace.address} would be its own parent", hint="Name two workspaces: -w PARENT --from REGION."
        )
    if child.identity.id in ancestors(above):
        raise UsageError(
            f"{parent.workspace.address} is itself a region below {child.workspace.address}: each would wait for "
            "the other for ever",
            hint="Relay upwards alone: -w PARENT --from REGION.",
        )
    _check_same(parent, child)
    client_algorithm(above)
    if parent.config.aggregation.step_weighting != "none" and (
        own.relay is None or child.config.federation.relay_every != 1
    ):
        raise ConfigError(
            f"{parent.workspace.address} has aggregation.step_weighting: {parent.config.aggregation.step_weighting}, "
            "and a sum of several rounds has made more steps than a round of it asks for",
            hint="Let the region relay every round (federation.relay_every: 1), or the parent set it to none.",
        )
    if above.update_tensors is not None:
        raise ConfigError(
            f"{parent.workspace.address} has its clients send a part of the adapter alone",
            hint="A region sends whole adapters: let the parent use fedavg, fedprox or fedavgm, and aggregation.share: "
            "[A, B].",
        )
    _check_ways(parent)
    for name, privacy in (("the parent", above.privacy), ("the region", own.privacy)):
        unit = None if privacy is None else privacy.unit
        if unit in ("row", "group") or (unit == "client" and name == "the region"):
            why = "a region takes no private steps of its own" if name == "the parent" else "its rows are not told"
            raise ConfigError(
                f"{name} has privacy.unit: {unit}, and {why}: its rounds cannot be relayed",
                hint="privacy.unit: client in the parent protects a whole region; within regions use "
                "privacy.secure_aggregation.",
            )
    return [*_remarks(parent)]


def _check_ways(parent: FederationState) -> None:
    """Raise ConfigError where a parent merges, or has its clients train, as the sum of a region does not fit."""
    above, lora = parent.head.manifest, parent.config.aggregation.lora
    odd = {
        "clusters: a region sends one adapter's sum, and no party's cluster": above.clusters is not None,
        f"aggregation.lora: {lora}: a region sends the mean of its parties' factors": lora != "factors",
        "train.steps with epochs or minutes: a region tells the steps that its rounds ask for": above.train.is_uneven,
    }
    for what in (name for name, is_so in odd.items() if is_so):
        raise ConfigError(
            f"{parent.workspace.address} has {what}",
            hint="Set it otherwise in the parent's fedcli.yaml, and relay again once its next round is open; clusters "
            "are fixed by `fedcli init`.",
        )


def _check_same(parent: FederationState, child: FederationState) -> None:
    """Raise ConfigError where the two do not train the same adapter of the same model for the same task."""
    above, own = parent.head.manifest, child.head.manifest
    there, here = (
        parse_adapter_config(each.head.read(ADAPTER_CONFIG_NAME), each.head.folder) for each in (parent, child)
    )
    odd = {
        "task": above.task != own.task,
        "model": above.model.fingerprint != own.model.fingerprint,
        "model.quantization": above.model.quantization != own.model.quantization,
        "adapter.rank": there["r"] != here["r"],
        "adapter.alpha": there["lora_alpha"] != here["lora_alpha"],
        "adapter.dropout": there["lora_dropout"] != here["lora_dropout"],
        "adapter.target_modules": above.tensors.keys() != own.tensors.keys(),
    }
    found = [name for name, differs in odd.items() if differs]
    if above.lora is not None:
        what = "ranks of its clients' own" if above.lora.ranks is not None else "a second adapter, base_delta/"
        raise ConfigError(
            f"{parent.workspace.address} has {what}, and a region sends it the mean of its parties' factors",
            hint="Both stay as they are: make the parent anew, with one adapter.rank and aggregation.lora: factors "
            "from its first round on. A region that has joined leaves with `fedcli client leave`.",
        )
    if not found and above.tensors != own.tensors:
        found = ["the adapter's shapes"]
    if found:
        raise ConfigError(
            f"{child.workspace.address} differs from {parent.workspace.address} in {', '.join(found)}",
            hint="A region trains the very adapter of its parent: make it with the same model and adapter sections.",
        )
    if TASKS[above.task].uses_reference:
        starts = [each.start.manifest.files[ADAPTER_NAME].sha256 for each in (parent, child)]
        if starts[0] != starts[1]:
            raise ConfigError(
                f"{above.task} compares with the adapter of round 0, and {child.workspace.address} began with another "
                f"than {parent.workspace.address}",
                hint="Make the region with the parent's federation.seed, or with adapter.init: "
                f"{parent.workspace.adapter(0)}.",
            )


def _remarks(parent: FederationState) -> list[str]:
    """Return what of a parent makes its rounds other than the mean over all parties by rows."""
    above, rule = parent.head.manifest, parent.config.aggregation
    remarks, one = [], "this region counts as one client there, however many parties it has"
    name = str(above.algorithm.get("name"))
    if above.privacy is not None and above.privacy.unit == "client":
        remarks.append(f"the parent has privacy.unit: client: {one}, and is protected as a whole")
    elif name in ("fedadagrad", "fedyogi", "fedadam", "diloco"):
        remarks.append(f"the parent's {name} weighs its clients alike: {one}")
    if rule.rule != "mean" or rule.nearest_mixing:
        what = rule.rule if rule.rule != "mean" else "nearest_mixing"
        remarks.append(
            f"the parent's aggregation.{'rule: ' if what == rule.rule else ''}{what} looks at one update "
            f"a client: {one}"
        )
    elif rule.weight_cap is not None:
        remarks.append(
            f"the parent's aggregation.weight_cap: {rule.weight_cap:g} is of its clients: a region of many rows weighs "
            "no more than so many times the median"
        )
    return remarks


def sum_up(rounds: Sequence[Round], last: Round) -> Summed:
    """Return what merged rounds come to: `rounds` from the one that began to the last in which parties trained.

    Raises ConfigError where one of them was not merged as the mean of its updates by rows.
    """
    merged = [*rounds[1:], last]
    for current in merged:
        assert current.manifest.aggregation is not None
        if fault := _fault_of(current.manifest.aggregation):
            raise ConfigError(
                f"{current.folder} {fault}: its adapter is not the mean of its updates by rows, which a parent counts",
                hint="Let the region merge with fedavg, and no other rule: federation.relay_every sees to it.",
            )
    merge = last.manifest.aggregation
    assert merge is not None
    rows = [entry.num_samples or 0 for entry in merge.counted]
    num_samples = sum(rows) if merge.secure is None else round(merge.secure.weight)
    losses = [entry.train_loss for entry in merge.counted]
    told = [loss for loss in losses if loss is not None]
    weighted = math.fsum(loss * count for loss, count in zip(told, rows, strict=False))
    return Summed(
        num_samples=num_samples,
        num_counted=len(merge.counted),
        steps=sum(each.manifest.train.steps for each in rounds),
        train_loss=weighted / sum(rows) if rows and len(told) == len(losses) else None,
    )


def _fault_of(merge: Aggregation) -> str | None:
    """Return what keeps a merge from being the mean by rows; None where nothing does."""
    name = merge.algorithm.get("name")
    if name not in _MEANS:
        return f"was merged with {name}"
    if merge.privacy is not None:
        return "has noise in it"
    if merge.lora is not None and (merge.lora.lora != "factors" or merge.lora.lora_fair is not None):
        return f"was merged by aggregation.lora: {merge.lora.lora}"
    if merge.secure is not None:
        return None  # the weights of masked updates are their rows
    if merge.rule is not None and (merge.rule["rule"] != "mean" or merge.rule["nearest_mixing"]):
        return f"was merged by {merge.rule['rule']}{' with nearest_mixing' if merge.rule['nearest_mixing'] else ''}"
    if any(entry.num_samples is None or entry.weight is None for entry in merge.counted):
        return "does not tell its updates' rows"
    total = sum(entry.num_samples or 0 for entry in merge.counted)
    weights = [((entry.num_samples or 0) / total, entry.weight or 0.0) for entry in merge.counted]
    if not all(math.isclose(by_rows, weight, rel_tol=1e-9) for by_rows, weight in weights):
        return "weighs its updates otherwise than by their rows"
    return None


def check_began_there(parent: FederationState, first: Round) -> None:
    """Raise ConfigError where a federation that is no region did not begin with the adapter of the parent's round."""
    above = parent.head
    if first.manifest.files[ADAPTER_NAME].sha256 != above.manifest.files[ADAPTER_NAME].sha256:
        raise ConfigError(
            f"{first.folder} does not begin with the adapter of round {above.number} of {parent.workspace.address}",
            hint=f"Make it with adapter.init: {parent.workspace.adapter(above.number)}, or as a region: "
            "federation.relay_every.",
        )


def check_own_round(child: FederationState) -> None:
    """Raise IntegrityError where a region's latest round is damaged, or its server did not sign it as it must."""
    head = child.head
    head.check_unchanged()
    if child.identity.signatures is None:
        return
    from fedcli.trust.chain import read_chain, round_fault  # where nothing is signed nobody needs cryptography

    if fault := round_fault(head, read_chain(child.workspace, child.identity)):
        raise IntegrityError(
            f"{head.folder} {fault}",
            hint="Nothing was sent. Restore it from a backup: whoever can write there made it.",
        )


def check_not_taken_back(parent: FederationState, last: Round) -> None:
    """Raise IntegrityError where the parent's round that a region began from is not there any more, or another."""
    relay = last.manifest.relay
    if relay is None or relay.parent is None:
        return
    began, above = relay.parent, parent.head
    problem = None
    if began.workspace != above.manifest.workspace:
        problem = f"is a region of workspace {began.workspace}, not of {above.manifest.workspace}"
    elif began.round > above.number:
        problem = f"began from round {began.round}, and the parent's latest is {above.number}"
    elif began.round == above.number and began.sha256 != above.sha256:
        problem = f"began from another round {began.round} than the one that stands"
    if problem is not None:
        raise IntegrityError(
            f"{last.folder} {problem}",
            hint="Name the parent that it was relayed to before; where its past was rewritten ask its operator.",
        )
