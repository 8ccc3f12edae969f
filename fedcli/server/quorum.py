"""When a round may be merged: the quorum of those that count, and the deadline by the server's clock."""

import time

from fedcli.workspace.federation_state import FederationState


def needed_answers(federation: FederationState) -> int:
    """Return how many clients must have answered the open round: one is enough past its deadline.

    Where all of its cohort have left or were revoked nobody can, and the round is over.
    """
    left, awaited = seconds_left(federation), federation.head.awaited_clients()
    if not awaited:
        return 0
    num_counted = min(federation.head.num_counted, len(awaited))
    return federation.config.federation.needed_answers(num_counted) if left is None or left > 0 else 1


def seconds_left(federation: FederationState) -> float | None:
    """Return the seconds to the open round's deadline by this machine's clock, negative past it; None: it has none.

    Manifests hold the server's clock, so only on its machine is this exact.
    """
    deadline = deadline_of(federation)
    return None if deadline is None else deadline - time.time()


def deadline_of(federation: FederationState) -> float | None:
    """Return the open round's deadline in seconds since 1970, by the server's clock; None where it has none."""
    opened, deadline = federation.head.manifest.opened, federation.config.federation.deadline
    return None if opened is None or deadline is None else opened + deadline
