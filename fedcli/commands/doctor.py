"""fedcli doctor."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from fedcli.commands.options import JsonOption, WorkspaceOption
from fedcli.commands.output import StepDisplay, print_result
from fedcli.errors import RequirementError, WorkspaceError
from fedcli.workspace.address import find_workspace

if TYPE_CHECKING:
    from fedcli.operations.finding import Finding


def doctor(
    workspace: WorkspaceOption = None,
    model: Annotated[
        str | None,
        Option(metavar="BASE", help="Look at this base model alone: a folder, or a hub id that has been fetched."),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Check this machine, and whether the workspace's experiment can run on it; exit with 8 where it cannot.

    Outside a workspace it looks at the machine alone.
    """
    from fedcli.operations.doctor import examine, examine_model

    if model is not None:
        with StepDisplay(json_output) as observer:
            inspection, found_of_model = examine_model(model, root=Path.cwd(), observer=observer)
        print_result(json_output, {"model": inspection, "findings": found_of_model}, _lines(found_of_model))
        _require(found_of_model)
        return
    try:
        found = find_workspace(workspace)
    except WorkspaceError:
        if workspace is not None:
            raise
        found = None
    with StepDisplay(json_output) as observer:
        findings = examine(found, observer=observer)
    lines = _lines(findings)
    lines += ["no workspace here: its file system and its model were not looked at"] if found is None else []
    print_result(json_output, {"findings": findings}, lines)
    _require(findings)


def _lines(findings: "list[Finding]") -> list[str]:
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:8} {finding.name:17} {finding.detail}")
        lines += [f"{'':26} {finding.cure}"] if finding.cure else []
    return lines


def _require(findings: "list[Finding]") -> None:
    """Raise RequirementError where something failed."""
    if failed := [finding.name for finding in findings if finding.state == "failed"]:
        raise RequirementError(
            f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}",
            hint="Do what is said beside them.",
            is_reported=True,
        )
