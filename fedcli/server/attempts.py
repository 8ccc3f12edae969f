"""Who takes part in a round of secure aggregation, and under which keys."""

from typing import TYPE_CHECKING

from fedcli.secure_aggregation.terms import fewest_of
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.history import Round
from fedcli.workspace.layout import ATTEMPT
from fedcli.workspace.parsing import sealed
from fedcli.workspace.secure_files import publish_signed, read_attempt
from fedcli.workspace.secure_records import AttemptRecord

if TYPE_CHECKING:
    from fedcli.server.enrol import ServerTrust


def start_attempt(federation: FederationState, trust: "ServerTrust", *, goes_on: bool = False) -> bool:
    """Fix who takes part in the open round, once all of its cohort are enrolled; return whether that is fixed.

    With `goes_on` it is those who are enrolled, if they are enough. Whoever calls this holds the server's lock.
    """
    base = federation.head
    if base.manifest.secure_aggregation is None or not base.manifest.cohort:
        return False
    if read_attempt(base) is not None:
        return True
    members, gone = trust.enrolment.members, trust.enrolment.gone
    cohort = [client for client in base.manifest.cohort if client in members]
    absent = [client for client in base.manifest.cohort if client not in members and client not in gone]
    if len(cohort) < fewest_in(base) or (absent and not goes_on):
        return False
    assert trust.enrolment.head is not None
    record = AttemptRecord(
        workspace=base.manifest.workspace,
        round=base.number,
        attempt=ATTEMPT,
        base=base.sha256,
        mode=base.manifest.secure_aggregation,
        cohort=cohort,
        enrolment=trust.enrolment.head,
    )
    contents = sealed(record)
    publish_signed(base, base.workspace.attempt(base.number), contents, trust.sign("attempt", contents))
    return True


def fewest_in(base: Round) -> int:
    """Return how many of a round's clients must be summed at least."""
    assert base.manifest.secure_aggregation is not None
    return fewest_of(base.manifest.secure_aggregation, len(base.manifest.cohort))
