"""fedcli status."""

import gc
from collections.abc import Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated

from typer import Option

from fedcli.commands.options import JsonOption, WorkspaceOption, found_federation
from fedcli.commands.output import at, print_hint, print_json, tell
from fedcli.errors import UsageError
from fedcli.quantities import describe_bytes, describe_enough, describe_seconds, name_clients, plural

if TYPE_CHECKING:
    from fedcli.operations.slurm_state import JobStates
    from fedcli.operations.status import Status
    from fedcli.workspace.privacy_records import PrivacyRecord
    from fedcli.workspace.relay_records import RelayRecord


def status(
    watch: Annotated[
        bool, Option("--watch", help="Show how it goes on, until it has finished or you press Ctrl-C.")
    ] = False,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show the round, the algorithm, who has answered, the last losses, and what to run next."""
    if watch and json_output:
        raise UsageError("--json prints one document, and --watch never ends", hint="Leave one of them out.")
    federation = found_federation(workspace)
    if watch:
        from fedcli.commands.status_watch import watch as show

        show(federation)
        return
    gc.disable()  # what is imported and read stays to the end: collections on the way find nothing
    try:
        result = federation.status()
    finally:
        gc.enable()
    if json_output:
        print_json(result)
        return
    _print(result)
    names_it = result.next_command.startswith("fedcli relay") and " -w " in result.next_command
    print_hint(f"next: {result.next_command}{'' if names_it else at(workspace)}")


_FIGURES = {"norm": "norms", "cosine": "cosines", "change": "changes"}
"""Of an update: |y - x|, its cosine to the mean, and what leaving it out changes the mean by, in the mean's norm."""


def _print(result: "Status") -> None:
    for lines in (_round, _parties, _last_round, _earlier_rounds, _cost):
        for line in lines(result):
            tell(line)


def _round(result: "Status") -> Iterator[str]:
    """The open round: what it is, who has answered it, and what it waits for."""
    from fedcli.operations.status import describe_algorithm

    yield f"workspace  {result.workspace}{', a simulation' if result.simulation else ''}"
    yield f"round      {result.round} of {result.rounds}, {result.state}"
    now, then = describe_algorithm(result.algorithm), describe_algorithm(result.next_algorithm)
    yield f"algorithm  {now}, task {result.task}, learning rate {result.learning_rate:.3g}"
    if result.next_algorithm != result.algorithm and result.state == "open":
        yield f"next       {then}, from round {result.round + 1} on, as fedcli.yaml has it"
    if result.cohort:
        which = "" if result.num_counted == len(result.cohort) else f", of which the first {result.num_counted} count"
        yield f"cohort     {name_clients(result.cohort)}; {result.needed} must answer{which}"
        yield f"answered   {name_clients(result.answered)}"
        yield f"missing    {name_clients(result.missing)}"
    if result.staleness:
        sent = "; ".join(f"{name_clients(clients)} from round {number}" for number, clients in result.late.items())
        yield f"late       {sent or 'no update'} of the last {plural(result.staleness, 'round')} may count now"
    if result.relay is not None:
        yield f"region     {_describe_relay(result.relay, result.state)}"
    if result.privacy is not None:
        yield f"privacy    {_describe_privacy(result.privacy)}"
    if result.budget is not None:
        from fedcli.workspace.privacy_ledger import describe_budget

        is_spent = "" if result.budget.is_enough else "used up: "
        yield f"budget     {is_spent}{describe_budget(result.budget)}"
    if result.arriving:
        yield f"arriving   {name_clients(result.arriving)}: not all files are there yet; they are waited for"
        for client, missing in list(result.not_there.items())[:20]:
            yield f"           client {client}: {missing}"
    if result.round_lacks:
        yield f"arriving   round {result.round}: {result.round_lacks}"
    if result.secure is not None:
        yield f"masked     {result.secure.mode}: {result.secure.waits}"
    if result.seconds_left is not None:
        left = describe_seconds(abs(result.seconds_left))
        enough = describe_enough(None if result.secure is None else result.secure.fewest)
        yield f"deadline   {f'in {left}: then' if result.seconds_left > 0 else f'{left} ago:'} {enough}"
    if result.clock is not None:
        yield f"clock      {result.clock}"
    if result.hidden:
        yield f"hidden     {name_clients(result.hidden)}: only they and the server see whether they have answered"


def _parties(result: "Status") -> Iterator[str]:
    """Jobs, and who takes part."""
    if result.slurm is not None:
        yield f"slurm      {_describe_jobs(result.slurm)}"
    if result.joined:
        yield f"joined     {name_clients(result.joined)}: parties that keep their rows"
    for client, region in result.regions.items():
        yield f"relayed    client {client} is the region {region}: its parties' sum"
    for client, told in result.unenrolled.items():
        yield f"not in     client {client} has joined and is not enrolled: {told}"
    for client, action in result.gone.items():
        yield f"gone       client {client} {'has left' if action == 'leave' else 'was revoked'}"
    if result.leaving:
        yield f"leaving    {name_clients(result.leaving)}: out when the server next merges"
    if result.distrust is not None:
        yield f"distrust   {result.distrust}; `fedcli verify` tells more"


def _last_round(result: "Status") -> Iterator[str]:
    """The updates of the round before, and what became of them."""
    from fedcli.operations.status import describe_rule
    from fedcli.operations.update_figures import describe_unusual

    for name in ("norm", "cosine", "change"):
        known = {update.client: getattr(update, name) for update in result.last_updates}
        if any(value is not None for value in known.values()):
            values = (f"{client}: {value:.3g}" for client, value in known.items() if value is not None)
            yield f"{_FIGURES[name]:<10} {', '.join(values)} (by client, round {result.round - 1})"
    if result.last_losses and not result.is_withheld:
        losses = (f"{client}: {'-' if loss is None else f'{loss:.3f}'}" for client, loss in result.last_losses.items())
        yield f"losses     {', '.join(losses)} (by client, round {result.round - 1})"
    if result.clusters is not None:
        named = "; ".join(f"{name}: {name_clients(members)}" for name, members in result.clusters.items())
        yield f"clusters   {named}"
    if any(update.steps is not None for update in result.last_updates):
        steps = ", ".join(f"{update.client}: {update.steps}" for update in result.last_updates)
        yield f"steps      {steps} (by client, round {result.round - 1})"
    if any(update.base is not None for update in result.last_updates):
        made = (
            f"{update.client} from round {update.base}" for update in result.last_updates if update.base is not None
        )
        yield f"came late  updates of clients {', '.join(made)} counted in round {result.round - 1}"
    if result.last_rule is not None:
        weights = ", ".join(f"{update.client}: {update.weight or 0.0:.3f}" for update in result.last_updates)
        yield f"rule       {describe_rule(result.last_rule)}; weights {weights} (by client, round {result.round - 1})"
    for update in result.last_updates:
        if update.unusual:
            yield f"unusual    client {update.client} in round {result.round - 1}: {describe_unusual(update)}"
    for client, code in result.last_refused.items():
        yield f"refused    client {client} in round {result.round - 1}: {code}"
    for clients, why in ((result.last_surplus, "were not needed"), (result.last_late, "came too late")):
        if clients:
            yield f"left out   updates of {name_clients(clients)} in round {result.round - 1}: they {why}"


def _earlier_rounds(result: "Status") -> Iterator[str]:
    """What merged them, and which of them have no score."""
    from fedcli.operations.status import describe_algorithm

    for run, following in zip_longest(result.history, result.history[1:]):
        last = following.round - 1 if following else result.round - 1
        rounds = f"round {last}" if last == run.round else f"rounds {run.round} to {last}"
        yield f"merged     {rounds} with {describe_algorithm(run.algorithm)}"
    for note in result.unscored:
        if note.failure is None:
            yield f"to score   round {note.round} on {note.name}: `fedcli server score`, if nothing does it now"
        else:
            yield f"no score   round {note.round} on {note.name}: {note.failure.message}"
            yield f"           {note.failure.hint} To try again: `{note.failure.again}`"


def _cost(result: "Status") -> Iterator[str]:
    if result.cost is not None:
        cost = result.cost
        in_base = "?" if cost.base_parameters is None else f"{cost.base_parameters:,}"
        yield (
            f"cost       {in_base} parameters in the base, {cost.trainable_parameters:,} trainable, "
            f"{cost.communicated_parameters:,} sent by a client in a round"
        )
        down, up = describe_bytes(cost.client_bytes_down), describe_bytes(cost.client_bytes_up)
        so_far = f"{describe_bytes(cost.total_bytes_down)} down and {describe_bytes(cost.total_bytes_up)} up so far"
        yield f"transfer   {down} down and {up} up a client and round; {so_far}"


def _describe_relay(relay: "RelayRecord", state: str) -> str:
    """Return which client of which parent a region is, and how far it is from its next sum."""
    if relay.parent is None:
        return "waits for a parent: nobody trains before `fedcli relay`"
    who = f"client {relay.parent.client} of workspace {relay.parent.workspace}, begun from its round"
    left = f"{plural(relay.left, 'round')} to merge before its sum goes up"
    if relay.left == 0:
        left = "its sum can go up" if state == "open" else "that has the result"
    return f"{who} {relay.parent.round}; {left}"


def _describe_privacy(privacy: "PrivacyRecord") -> str:
    """Return what a round guarantees, as far as its manifest tells."""
    parts = [] if privacy.unit is None else [f"unit {privacy.unit}"]
    if privacy.noise is not None:
        parts.append(f"noise {privacy.noise:.4g} x clip {privacy.clip:.4g}")
    elif privacy.target is not None:
        parts.append(
            f"clip {privacy.clip:.4g}, noise for epsilon {privacy.target.epsilon:g} at {privacy.target.delta:g}"
        )
    parts += [] if privacy.expected is None else [f"over {privacy.expected}, whoever answers"]
    parts += [] if privacy.secure_aggregation is None else [f"secure aggregation {privacy.secure_aggregation}"]
    return ", ".join(parts)


def _describe_jobs(slurm: "JobStates") -> str:
    if slurm.error is not None:
        ids = ", ".join(str(job.id) for job in slurm.jobs)
        return f"jobs {ids}, and how they stand is not known: {slurm.error}"
    queued, failed = _by_value(slurm.queued), _by_value(slurm.failed)
    parts = [
        *(f"queued {name_clients(clients)} ({reason})" for reason, clients in queued.items()),
        *([f"running {name_clients(slurm.running)}"] if slurm.running else []),
        *(f"failed {name_clients(clients)} ({state})" for state, clients in failed.items()),
        *(f"merging is job {job}: {state}" for job, state in slurm.servers.items()),
    ]
    return "; ".join(parts) or "no job in the queue"


def _by_value(values: dict[int, str]) -> dict[str, list[int]]:
    return {each: [key for key, value in values.items() if value == each] for each in dict.fromkeys(values.values())}
