"""fedcli slurm script."""

import shlex

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import print_hint, print_json


def script(workspace: WorkspaceOption = None, json_output: JsonOption = False) -> None:
    """Write the open round's batch scripts for SLURM, and send nothing."""
    scripts = found_federation(workspace).slurm.write_scripts()
    if json_output:
        print_json({"scripts": scripts})
        return
    if not scripts:
        print("nothing to write: the federation has finished")
        return
    for path in scripts.values():
        print(path)
    server = shlex.quote(str(scripts["server"]))
    if "clients" in scripts:
        clients = shlex.quote(str(scripts["clients"]))
        print_hint(
            f"next: fedcli slurm submit, which is\n"
            f"  sbatch --dependency=afterany:$(sbatch --parsable {clients}) {server}"
        )
    else:
        print_hint(f"next: fedcli slurm submit, which is\n  sbatch {server}")
