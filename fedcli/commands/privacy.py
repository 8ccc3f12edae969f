"""fedcli privacy."""

from typing import TYPE_CHECKING, Annotated

from typer import Option

from fedcli.commands.options import HomeOption, JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import print_result
from fedcli.errors import UsageError

if TYPE_CHECKING:
    from fedcli.operations.privacy import ClientPrivacy, OwnPrivacy, PrivacyReport


def privacy(
    client: Annotated[int | None, Option("--id", metavar="N", help="This client alone.")] = None,
    home: HomeOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show what the rounds so far have spent of each client's privacy, what is assumed, and what is left.

    It is read from the chain of manifests, which nobody can change unseen. With --id, a party that runs it itself is
    also shown the exact figures of the ledger in its home, which nobody else sees.
    """
    if home is not None and client is None:
        raise UsageError("--home is of one client", hint="Name the client, too: --id N.")
    report = found_federation(workspace).privacy(client, home=home)
    lines = _lines(report)
    if client is not None and report.unit is not None and not report.clients:
        lines.insert(1, f"client {client}: none of its updates was counted")
    print_result(json_output, report, lines)


def _lines(report: "PrivacyReport") -> list[str]:
    from fedcli.workspace.privacy_ledger import describe_budget

    lines = [f"{report.sentence}"]
    if report.secure_aggregation is not None:
        lines.append(f"secure aggregation: {report.secure_aggregation}: the server sees the updates' sum alone")
    lines += [_line(each) for each in report.clients]
    if report.own is not None:
        lines += _own_lines(report.own)
    if report.budget is not None:
        lines.append(f"budget: {describe_budget(report.budget)}")
    if report.assumptions:
        lines.append("assumed:")
    return lines + [f"  {text}" for text in report.assumptions]


def _own_lines(own: "OwnPrivacy") -> list[str]:
    """Return what the party's own ledger says, told apart from what the chain claims."""
    from fedcli.quantities import plural

    spent = "no finite epsilon" if own.epsilon is None else f"epsilon {own.epsilon:.6g}"
    again = own.trainings - own.rounds
    trained = f"{plural(own.steps, 'step')} in {plural(own.rounds, 'round')}"
    trained += f", {plural(own.trainings, 'training')}" + (f" ({again} of them again)" if again else "")
    if own.budget is None or own.left is None:
        left = "no budget is set"
    else:
        left = f"{own.left:.6g} of its budget {own.budget:g} is left"
    return [
        f"client {own.client}'s own ledger, exact and for its eyes alone ({own.ledger}):",
        f"  spent {spent} at delta {own.delta:g}, unit {own.unit}, by {trained}; {left}",
    ]


def _line(found: "ClientPrivacy") -> str:
    from fedcli.workspace.privacy_ledger import describe_rounds, describe_unprotected

    who = f"client {found.client}: "
    if found.unprotected:
        where = describe_unprotected(found.unprotected)
        return f"{who}{where if not found.is_claim else where.replace('merged without noise', 'sent without a claim')}"
    claimed = "claims " if found.is_claim else ""
    return (
        f"{who}{claimed}epsilon {found.epsilon or 0.0:.4g} at delta {found.delta or 0.0:g}, unit {found.unit}, "
        f"of {describe_rounds(found.rounds)}"
    )
