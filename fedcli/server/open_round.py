"""Opening rounds: round 0 from its start, round n + 1 from an aggregation."""

import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from fedcli import __version__
from fedcli.algos import Algorithm
from fedcli.algos.share import private_tensors, sent_tensors
from fedcli.config import Config
from fedcli.config.adapter_config import parse_adapter_config
from fedcli.errors import ConfigError, NotReadyError
from fedcli.randomness import draw_cohort
from fedcli.secure_aggregation.terms import FEWEST
from fedcli.server.cluster_terms import first_clusters, next_clusters, start_files
from fedcli.server.communication_cost import cost_of, history_of
from fedcli.server.encoded_step import encoding_record
from fedcli.server.region import Place, begin_place, next_place
from fedcli.workspace.federation_state import Experiment, FederationState, train_record
from fedcli.workspace.history import Round, publish_round
from fedcli.workspace.layout import ADAPTER_CONFIG_NAME, ADAPTER_FILE, ADAPTER_NAME, BASE_DELTA_CONFIG_NAME
from fedcli.workspace.lora_records import LoraTerms
from fedcli.workspace.merge_records import Aggregation
from fedcli.workspace.privacy_records import next_clip, privacy_record
from fedcli.workspace.records import Identity, Manifest, ModelRecord, Selection, TensorEntry, file_entry

if TYPE_CHECKING:
    from fedcli.server.enrol import ServerTrust


@dataclass(frozen=True)
class Start:
    """A round before it is published: its base model, its files and the tensors of its adapter."""

    model: ModelRecord
    files: dict[str, bytes]
    tensors: dict[str, TensorEntry]
    date: str | None = None
    """The day that the base's chat template writes in every round; None where it writes none."""


def open_first_round(
    experiment: Experiment, identity: Identity, start: Start, trust: "ServerTrust | None" = None
) -> FederationState:
    """Publish rounds/00000, unless another server was first, and return the federation as it stands then."""
    config = experiment.config
    start = replace(start, files=start_files(start.files, first_clusters(config)))
    manifest = _manifest(config, identity.id, start, trust=trust, place=next_place(config, None))
    is_first = publish_round(experiment.workspace, manifest, start.files, None if trust is None else trust.sign_round)
    federation = FederationState.open(experiment.workspace)
    if trust is not None and is_first:
        trust.note_round(federation.start)
    return federation


def open_next_round(
    federation: FederationState,
    files: dict[str, bytes],
    aggregation: Aggregation,
    trust: "ServerTrust | None" = None,
) -> bool:
    """Publish the round behind the latest with its merged files; return False where another server was first."""
    previous, before = federation.head, federation.head.manifest
    contents = {**files, ADAPTER_CONFIG_NAME: previous.read(ADAPTER_CONFIG_NAME)}
    start = Start(before.model, contents, before.tensors, before.train.date)
    place = next_place(federation.config, previous)
    manifest = _manifest(federation.config, before.workspace, start, previous, aggregation, trust, place)
    return publish_round(federation.workspace, manifest, start.files, None if trust is None else trust.sign_round)


def open_from_parent(
    federation: FederationState, parent: Round, client: int, trust: "ServerTrust | None" = None
) -> bool:
    """Publish a region's round that begins from its parent's latest; return False where another server was first.

    What is there of the region's open round is not merged: it would come too late. Whoever calls this holds the
    server's lock.
    """
    previous, before = federation.head, federation.head.manifest
    place = begin_place(federation, parent, client)
    answered = [each for each in before.cohort if previous.has_update(each)]
    aggregation = Aggregation(
        algorithm=before.algorithm,
        counted=[],
        refused=[],
        missing=[each for each in before.cohort if each not in answered],
        surplus=answered,
    )
    contents = {ADAPTER_NAME: parent.read(ADAPTER_NAME), ADAPTER_CONFIG_NAME: previous.read(ADAPTER_CONFIG_NAME)}
    start = Start(before.model, contents, before.tensors, before.train.date)
    manifest = _manifest(federation.config, before.workspace, start, previous, aggregation, trust, place)
    return publish_round(federation.workspace, manifest, start.files, None if trust is None else trust.sign_round)


def _manifest(
    config: Config,
    workspace_id: str,
    start: Start,
    previous: Round | None = None,
    aggregation: Aggregation | None = None,
    trust: "ServerTrust | None" = None,
    place: Place | None = None,
) -> Manifest:
    """Shape a round's manifest from fedcli.yaml as it stands now; of a region's round `place` says the rest."""
    federation, before = config.federation, None if previous is None else previous.manifest
    number = 0 if previous is None else previous.number + 1
    rounds = max(federation.rounds, number) if place is None else place.rounds
    algorithm = config.algorithm if place is None else place.algorithm
    train = None if place is None else place.train
    is_open = number < rounds
    draws = is_open and (place is None or place.relay.left > 0)
    gone = {} if trust is None else trust.enrolment.gone
    everybody = [client for client in range(federation.clients) if client not in gone]
    if (secure := config.privacy.secure_aggregation) != "off" and draws:
        everybody = _maskable(everybody, number, secure, trust)
    if draws and not everybody:
        raise NotReadyError(
            "nobody is left to draw for the next round: all clients have left or were revoked",
            hint=f"Enrol a party with `fedcli server enrol`, or end here: set federation.rounds to {number}.",
        )
    size = min(federation.cohort_size, len(everybody))
    drawn = draw_cohort(federation.seed, number, everybody, size) if draws else []
    is_selection = len(drawn) > federation.num_counted
    manifest = Manifest(
        workspace=workspace_id,
        round=number,
        rounds=rounds,
        state="open" if is_open else "finished",
        parent=None if previous is None else previous.sha256,
        task=config.task,
        algorithm=asdict(algorithm),
        cohort=sorted(drawn),
        update_files=[ADAPTER_FILE, *algorithm.update_files],
        update_tensors=_update_tensors(config, algorithm, number, start),
        private=_private(config, start),
        share=config.aggregation.shared_factor,
        encoding=encoding_record(config.aggregation) if is_open else None,
        model=start.model,
        train=train or train_record(config, number, rounds, date=start.date),
        files={name: file_entry(contents) for name, contents in start.files.items()},
        tensors=start.tensors,
        aggregation=aggregation,
        selection=Selection(order=drawn, count=federation.num_counted) if is_selection else None,
        opened=max(0.0, time.time()) if draws and federation.deadline is not None else None,
        enrolment=None if trust is None else trust.enrolment.head,
        fedcli=None if trust is None else __version__,
        privacy=privacy_record(
            config.privacy,
            num_counted=federation.num_counted,
            rounds=federation.rounds,
            clip=_clip(previous, aggregation),
        ),
        relay=None if place is None else place.relay,
        clusters=first_clusters(config) if before is None else next_clusters(config, before, aggregation),
        lora=_lora_terms(config, start),
        staleness=(config.aggregation.staleness or None) if draws else None,
    )
    return manifest.model_copy(update={"cost": cost_of(manifest, before), "history": history_of(manifest, before)})


def _lora_terms(config: Config, start: Start) -> LoraTerms | None:
    """Return what clients must know of ranks and of base_delta/; None where there is nothing."""
    ranks = config.adapter.smaller_ranks(config.federation.clients)
    contents = start.files.get(BASE_DELTA_CONFIG_NAME)
    delta = None if contents is None else parse_adapter_config(contents, BASE_DELTA_CONFIG_NAME)["r"]
    return None if ranks is None and delta is None else LoraTerms(ranks=ranks, base_delta=delta)


def _update_tensors(config: Config, algorithm: Algorithm, number: int, start: Start) -> list[str] | None:
    """Return which tensors updates carry; raise ConfigError where the algorithm and `share` leave none."""
    aggregation = config.aggregation
    private = _private(config, start) or ()
    found = sent_tensors(algorithm, aggregation.shared_factor, number, start.tensors, private)
    if found == []:
        raise ConfigError(
            f"algorithm.name: {algorithm.name}, aggregation.share: {aggregation.share} and aggregation.private: "
            f"[{', '.join(aggregation.private)}] leave updates no tensor",
            hint="Name fewer tensors in aggregation.private."
            if aggregation.shared_factor is None
            else "Set aggregation.share to [A, B], or name fewer tensors in aggregation.private.",
        )
    return found


def _private(config: Config, start: Start) -> list[str] | None:
    """Return the tensors that each client keeps to itself; raise ConfigError for a name of none."""
    for pattern in config.aggregation.private:
        if not private_tensors([pattern], start.tensors):
            raise ConfigError(
                f"aggregation.private: no tensor has {pattern} in its name, such as {min(start.tensors)}",
                hint="Name parts between dots, as in v_proj, layers.3 or layers.28-31.",
            )
    return private_tensors(config.aggregation.private, start.tensors) or None


def _clip(previous: Round | None, aggregation: Aggregation | None) -> float | None:
    """Return the clip that adaptive clipping has reached; None where it has not begun."""
    privacy = None if previous is None else previous.manifest.privacy
    return None if privacy is None or aggregation is None else next_clip(privacy, aggregation.privacy)


def _maskable(everybody: list[int], number: int, mode: str, trust: "ServerTrust | None") -> list[int]:
    """Return the clients that a round of secure aggregation is drawn from: those enrolled, but for the first round.

    That one is opened before anybody can be; who of it takes part is fixed once they are. Raises ConfigError where
    there are no keys, NotReadyError where too few are enrolled.
    """
    if trust is None:
        raise ConfigError(
            f"privacy.secure_aggregation: {mode} is for parties that join: the clients of a simulation have no keys",
            hint="Set it to off, or data.source to null.",
        )
    if number == 0:
        return everybody
    enrolled = [client for client in everybody if client in trust.enrolment.members]
    if len(enrolled) < FEWEST:
        raise NotReadyError(
            f"round {number} cannot be opened: {len(enrolled)} clients are enrolled, and privacy.secure_aggregation: "
            f"{mode} needs {FEWEST}: the sum of fewer tells each one's update",
            hint="Enrol more with `fedcli server enrol`; or set privacy.secure_aggregation to off, which tells the "
            "server each update from the next round on.",
        )
    return enrolled
