"""fedcli relay."""

from typing import TYPE_CHECKING, Annotated

from typer import Option

from fedcli.commands.options import HomeOption, JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import StepDisplay, at, print_result, use_one_blas_thread
from fedcli.quantities import plural

if TYPE_CHECKING:
    from fedcli.operations.relay import RelayResult


def relay(
    client: Annotated[int, Option("--id", metavar="N", help="Which client of the parent the region is.")],
    region: Annotated[
        str, Option("--from", metavar="DIR|URL", help="The workspace whose merged adapter goes up as an update.")
    ],
    server: Annotated[
        str | None,
        Option(
            metavar="FINGERPRINT",
            help="What the keys of the parent's server must be. Default: what they are now, or were before.",
        ),
    ] = None,
    home: HomeOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Take part in a parent federation as a region: its parties merge first, and only their sum travels.

    The first call joins the parent, which -w names. Each call does the next thing that is due, and exits: it opens the
    region's next round from the parent's, or sends up the adapter that the region's server has merged. Where nothing is
    due it says so and succeeds: run it as often as you like, as the user who has the region's server keys.
    """
    use_one_blas_thread()
    parent = found_federation(workspace)
    with StepDisplay(json_output, "relay") as observer:
        result = parent.relay(client, found_federation(region), home=home, server=server, observer=observer)
    document: dict[str, object] = {
        "status": result.status,
        "client": result.client,
        "parent_round": result.parent_round,
        "region_round": result.region_round,
    }
    if result.summed is not None:
        document |= {
            "num_samples": result.summed.num_samples,
            "num_counted": result.summed.num_counted,
            "steps": result.summed.steps,
            "train_loss": result.summed.train_loss,
        }
    lines, hint = [_describe(result)], _next(result, at(region))
    if result.joined is not None:
        joined = result.joined
        document |= {"registered_rows": joined.region.num_rows}
        verb, rows = "has joined" if joined.is_new else "is registered anew", plural(joined.region.num_rows, "row")
        lines.insert(0, f"client {client} {verb} with {rows}; its private state lies in {joined.region.home.folder}")
        if joined.fingerprint is not None:
            document |= {"fingerprint": joined.fingerprint, "server_fingerprint": joined.server_fingerprint}
        if joined.fingerprint is not None and joined.is_new:
            lines += [f"your keys:         {joined.fingerprint}", f"the server's keys: {joined.server_fingerprint}"]
            hint = (
                "compare both fingerprints with the parent's operator by telephone, who then runs:\n"
                f"  fedcli server enrol --id {client} --fingerprint {joined.fingerprint}\n{hint}"
            )
    lines += [f"note: {remark}" for remark in result.remarks]
    print_result(json_output, document | {"remarks": [*result.remarks]}, lines, hint)


def _describe(result: "RelayResult") -> str:
    above, own = f"round {result.parent_round} of the parent", f"round {result.region_round}"
    text = {
        "opened": f"opened {own} of the region from {above}",
        "ended": f"the parent has finished: {own} of the region, its last, has the parent's adapter",
        "answered": f"answered the repair of {above}",
        "waits_for_parties": f"nothing to do yet: {own} of the region is not merged",
        "waits_for_parent": f"nothing to do yet: {above} is not merged",
        "not_selected": f"nothing to do: the region is not in the cohort of {above}",
        "nothing_counted": f"nothing to send: {own} of the region was merged of no update; it goes on when the parent "
        "does",
        "gone": "nothing to do: the region has left the parent, or was revoked",
        "finished": f"nothing to do: the region has finished at its {own}",
    }
    if result.status == "sent" and result.summed is not None:
        summed = result.summed
        return (
            f"sent {own} of the region to {above}: {plural(summed.num_counted, 'update')}, "
            f"{plural(summed.num_samples, 'row')}"
        )
    return text[result.status]


def _next(result: "RelayResult", there: str) -> str:
    if result.status in ("opened", "waits_for_parties"):
        return f"next: fedcli status{there}; once its parties have answered, fedcli server aggregate{there}"
    return ""
