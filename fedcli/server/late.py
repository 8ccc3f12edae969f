"""Which updates of earlier rounds a merge may count, and whether they are enough with its own; no numpy."""

from collections.abc import Sequence

from fedcli.config import Config
from fedcli.errors import NotReadyError
from fedcli.quantities import name_clients, plural
from fedcli.workspace.arriving import arriving
from fedcli.workspace.enrolment import read_enrolment
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.history import Round
from fedcli.workspace.window import Sent, earlier_bases, late_updates, times_counted, window_of


def late_of(federation: FederationState) -> tuple[list[Sent], dict[int, int] | None]:
    """Return the whole updates of earlier rounds that may count now, and how many of each client still may."""
    head, config = federation.head, federation.config
    rounds = [*window_of(head), head]
    sent = late_updates(earlier_bases(head, rounds), rounds)
    late = [(base, client) for base, client in sent if not arriving(base, [client], is_quick=True)]
    return _of_members(federation, late), allowance(config, head, rounds)


def _of_members(federation: FederationState, sent: Sequence[Sent]) -> list[Sent]:
    """Return those of some updates whose clients are enrolled: of nobody else one counts."""
    if federation.identity.signatures is None or not sent:
        return [*sent]
    members = read_enrolment(federation.workspace).members
    return [(base, client) for base, client in sent if client in members]


def allowance(config: Config, head: Round, rounds: Sequence[Round]) -> dict[int, int] | None:
    """Return how many updates of each client the open round's merge may count; None: as many as there are."""
    most = config.aggregation.most_counted
    if most is None or head.manifest.staleness is None:
        return None
    before = times_counted(head, rounds)
    return {client: max(0, most - before[client]) for client in range(config.federation.clients)}


def countable(sent: Sequence[Sent], most: dict[int, int] | None) -> list[Sent]:
    """Return those of some updates, in their order, that a limit for each client leaves."""
    if most is None:
        return [*sent]
    left, found = dict(most), []
    for base, client in sent:
        if left.get(client, 0) > 0:
            left[client] -= 1
            found.append((base, client))
    return found


def needed_beside_late(federation: FederationState, needed: int, answered: Sequence[int]) -> int:
    """Return how many of the open round's clients must have answered where late updates count, too.

    Raises NotReadyError where enough is there, and too much of it is of clients that have counted too often.
    """
    head = federation.head
    if head.manifest.staleness is None or not federation.config.aggregation.counts_late:
        return needed
    late, most = late_of(federation)
    own: list[Sent] = [(head, client) for client in head.draw_order if client in answered]
    found = countable([*late, *own], most)
    if len(late) + len(own) >= needed > len(found):
        kept_back = sorted({client for _, client in set_of(late, own) - set_of(found)})
        raise NotReadyError(
            f"round {head.number} waits for {plural(needed - len(found), 'more update')}: {name_clients(kept_back)} "
            f"counted {federation.config.aggregation.most_counted} times in {head.manifest.staleness + 1} rounds, as "
            "often as aggregation.most_counted allows",
            hint="Let others train; or raise aggregation.most_counted in fedcli.yaml, which takes effect at once.",
        )
    return max(0, needed - sum(base.number != head.number for base, _ in found))


def set_of(*lists: Sequence[Sent]) -> set[tuple[int, int]]:
    """Return updates by their rounds' numbers and their clients."""
    return {(base.number, client) for sent in lists for base, client in sent}
