"""fedcli privacy."""

from typing import TYPE_CHECKING, Annotated

from typer import Option

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import print_result

if TYPE_CHECKING:
    from fedcli.operations.privacy import ClientPrivacy, PrivacyReport


def privacy(
    client: Annotated[int | None, Option("--id", metavar="N", help="This client alone.")] = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show what the rounds so far have spent of each client's privacy, what is assumed, and what is left.

    It is read from the chain of manifests, which nobody can change unseen.
    """
    report = found_federation(workspace).privacy(client)
    lines = _lines(report)
    if client is not None and not report.clients:
        lines.insert(1, f"client {client}: none of its updates was counted")
    print_result(json_output, report, lines)


def _lines(report: "PrivacyReport") -> list[str]:
    from fedcli.workspace.privacy_ledger import describe_budget

    lines = [f"{report.sentence}"]
    if report.secure_aggregation is not None:
        lines.append(f"secure aggregation: {report.secure_aggregation}: the server sees the updates' sum alone")
    lines += [_line(each) for each in report.clients]
    if report.budget is not None:
        lines.append(f"budget: {describe_budget(report.budget)}")
    if report.assumptions:
        lines.append("assumed:")
    return lines + [f"  {text}" for text in report.assumptions]


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
