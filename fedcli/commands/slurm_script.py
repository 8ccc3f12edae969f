"""fedcli slurm script."""

import shlex

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import print_result


def script(workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Write the open round's batch scripts for SLURM, and send nothing."""
    scripts = found_federation(workspace).slurm.write_scripts()
    quoted = {kind: shlex.quote(str(path)) for kind, path in scripts.items()}
    after = f"--dependency=afterany:$(sbatch --parsable {quoted['clients']}) " if "clients" in quoted else ""
    print_result(
        json_output,
        {"scripts": scripts},
        map(str, scripts.values()) if scripts else "nothing to write: the federation has finished",
        hint=f"next: fedcli slurm submit, which is\n  sbatch {after}{quoted['server']}" if scripts else "",
    )
