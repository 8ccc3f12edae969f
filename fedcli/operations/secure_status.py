"""What a round of secure aggregation waits for, by its files; nothing of them is checked here."""

from dataclasses import dataclass

from fedcli.quantities import name_clients
from fedcli.secure_aggregation.terms import fewest_of
from fedcli.workspace.history import Round


@dataclass(frozen=True)
class SecureStatus:
    """How far a round of secure aggregation is."""

    mode: str
    waits: str
    """What for, as text."""
    fewest: int
    """How many updates must be summed at least."""
    counted: list[int]
    """Whose sum may be revealed; empty before a repair."""
    silent: list[int]
    """Of these, those who have not answered the repair."""
    next_command: str | None
    """None where it is as in any other round."""


def secure_status(head: Round) -> SecureStatus | None:
    """Return how far the open round is; None where its federation has finished."""
    from fedcli.workspace.secure_files import has_answered, read_attempt, read_repair  # of no other: it loads numpy

    mode, cohort = head.manifest.secure_aggregation, head.manifest.cohort
    if mode is None or not cohort:
        return None
    fewest, counted, silent = fewest_of(mode, len(cohort)), [], []
    waits, command = f"waits for masked updates, {fewest} or more", None
    if read_attempt(head) is None:
        waits = "waits until its clients are enrolled: masks are made of their keys"
        command = "fedcli keys show"
    elif (repair := read_repair(head)) is not None:
        counted = repair.record.clients
        silent = [client for client in counted if not has_answered(head, client)]
        needed = fewest if mode == "double" else len(counted)
        num_answers = len(counted) - len(silent)
        if num_answers >= needed:
            waits, command = (
                f"{num_answers} have answered the repair, and the sum can be had",
                "fedcli server aggregate",
            )
        else:
            waits = f"waits for {needed - num_answers} more answers to the repair, of {name_clients(silent)}"
            command = f"fedcli client train --id {silent[0]}"
    return SecureStatus(mode, waits, fewest, counted, silent, command)
