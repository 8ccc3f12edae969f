"""fedcli export."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import print_result


def export(
    output: Annotated[Path, Argument(metavar="OUTPUT_DIR", help="A folder that does not exist, or is empty.")],
    round_: Annotated[str, Option("--round", metavar="N|latest", help="The round.")] = "latest",
    best: Annotated[
        str | None, Option(metavar="METRIC", help="The round that is best in BENCHMARK or BENCHMARK.METRIC.")
    ] = None,
    client: Annotated[
        int | None,
        Option(metavar="N", help="Client N's own adapter, as it stands with the latest round; or its cluster's."),
    ] = None,
    merge: Annotated[bool, Option("--merge", help="Write the base model with the adapter merged into it.")] = False,
    dtype: Annotated[
        str | None,
        Option(metavar="TYPE", help="Of a merged model: float32, bfloat16 or float16. Default: the base's own."),
    ] = None,
    max_shard_size: Annotated[
        str | None, Option(metavar="SIZE", help="Of a merged model's files, such as 500MB. Default: 5GB.")
    ] = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Hand a round over: its adapter with a model card, or merged into the base model.

    Nothing that stands there is written over, and the folder appears whole or not at all. A folder that holds this very
    export is left as it is.
    """
    result = found_federation(workspace).export(
        output, round=round_, best=best, client=client, merge=merge, dtype=dtype, max_shard_size=max_shard_size
    )
    what = f"base and adapter merged, {result.merged_dtype}" if result.merged_dtype else "adapter"
    whose = "" if client is None else f", for client {client}"
    exported = f"round {result.round}{whose} ({what}, {result.num_bytes:,} bytes)"
    done = f"exported {exported} to {result.output}"
    if not result.is_new:
        done = f"{result.output} holds this very export already: {exported}; nothing was written"
    print_result(json_output, result, [done, *(f"  {name}" for name in result.files)])
