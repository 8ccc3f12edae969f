"""fedcli doctor."""

from fedcli.commands.options import JsonOption, WorkspaceOption
from fedcli.commands.output import StepDisplay, print_result
from fedcli.errors import RequirementError, WorkspaceError
from fedcli.workspace.layout import find_workspace


def doctor(workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Check this machine, and whether the workspace's experiment can run on it; exit with 8 where it cannot.

    Outside a workspace it looks at the machine alone.
    """
    from fedcli.operations.doctor import examine

    try:
        found = find_workspace(workspace)
    except WorkspaceError:
        if workspace is not None:
            raise
        found = None
    with StepDisplay(json_output) as observer:
        findings = examine(found, observer=observer)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:8} {finding.name:17} {finding.detail}")
        lines += [f"{'':26} {finding.cure}"] if finding.cure else []
    lines += ["no workspace here: its file system and its model were not looked at"] if found is None else []
    print_result(json_output, {"findings": findings}, lines)
    if failed := [finding.name for finding in findings if finding.state == "failed"]:
        raise RequirementError(
            f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}",
            hint="Do what is said beside them.",
            is_reported=True,
        )
