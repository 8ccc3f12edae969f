"""When a round may be merged: the quorum of those that count, and the deadline by the server's clock."""

import time

from fedcli.config import Config
from fedcli.workspace.history import Round


def needed_answers(head: Round, config: Config) -> int:
    """Return how many clients must have answered the open round: one is enough past its deadline."""
    left = seconds_left(head, config)
    return config.federation.needed_answers(head.num_counted) if left is None or left > 0 else 1


def seconds_left(head: Round, config: Config) -> float | None:
    """Return the seconds to the open round's deadline by this machine's clock, negative past it; None: it has none.

    Manifests hold the server's clock, so only on its machine is this exact.
    """
    deadline = deadline_of(head, config)
    return None if deadline is None else deadline - time.time()


def deadline_of(head: Round, config: Config) -> float | None:
    """Return the open round's deadline in seconds since 1970, by the server's clock; None where it has none."""
    opened, deadline = head.manifest.opened, config.federation.deadline
    return None if opened is None or deadline is None else opened + deadline
