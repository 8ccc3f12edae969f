"""fedcli sync."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from fedcli.commands.options import JsonOption
from fedcli.commands.output import CarryDisplay, print_result
from fedcli.errors import IntegrityError
from fedcli.quantities import plural

if TYPE_CHECKING:
    from fedcli.operations.carry import Carried

_KINDS = {
    "rounds": "round",
    "updates": "update",
    "answers": "answer",
    "registrations": "registration",
    "enrolment": "enrolment",
    "acknowledgements": "countersignature",
    "leaving": "leaving",
    "attempts": "attempt",
    "repair": "repair",
    "shares": "shares file",
    "baselines": "baseline",
}


def sync(
    source: Annotated[str, Argument(metavar="FROM", help="The place that has it.", show_default=False)],
    target: Annotated[str, Argument(metavar="TO", help="The place that lacks it, or an empty one.")],
    client: Annotated[int | None, Option("--id", metavar="N", help="Only what party N needs and sends.")] = None,
    replace: Annotated[
        bool, Option("--replace", help="Where fedcli.yaml or a registration differs, take FROM's.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Carry what one place lacks of a workspace that another has: folders or URLs, one way or both at once.

    What is there is never changed or removed. A round or an update is carried once it is whole. It may be killed and
    run again. Exits with 7 where the two places hold different things that never change.
    """
    from fedcli.federation import Federation
    from fedcli.workspace.address import workspace_at

    with CarryDisplay(json_output, "sync", visible=False) as observer:
        result = Federation(workspace_at(source)).sync(target, client=client, replace=replace, observer=observer)
    print_result(json_output, result, describe(result))
    if result.differing:
        raise IntegrityError(
            f"{plural(len(result.differing), 'thing')} differ that never change: they are left as they are",
            hint="Run `fedcli verify` in both places: one of them is damaged, or another history.",
            is_reported=json_output,
        )


def describe(result: "Carried") -> Iterator[str]:
    """Yield what was carried and what was not."""
    kinds = sorted(result.carried.items())
    counts = [plural(count, _KINDS[kind]) if kind in _KINDS else kind for kind, count in kinds]
    yield f"carried to {result.target}: {', '.join(counts) or 'nothing, it has all'}" + (
        f" ({result.num_bytes:,} bytes)" if counts else ""
    )
    if result.is_first and result.carried:
        yield "it is a copy of the workspace now"
    for what, found in (
        ("arriving", result.arriving),
        ("differs", result.differing),
        ("changed in both", result.changed),
        ("left", result.left),
    ):
        yield from _example(what, found)
    if result.ignored:
        yield f"not fedcli's, and not carried: {plural(len(result.ignored), 'name')}, such as {result.ignored[0]}"


def _example(what: str, found: Mapping[str, str]) -> Iterator[str]:
    """Yield how many there are, and the first of them, by reason."""
    for reason in dict.fromkeys(found.values()):
        names = [name for name, given in found.items() if given == reason]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{what}: {names[0]}{more}: {reason}"
