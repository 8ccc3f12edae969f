"""What a client needs to train a task whose model answers prompts: the reward function, and leave to run code."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fedcli.errors import ConfigError, RequirementError, did_you_mean, require_packages
from fedcli.parties.party import Party, allows_code
from fedcli.tasks import REWARDS, TASKS
from fedcli.tasks.rewards import Answer, CodeCheck, Reward
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.train_records import TrainRecord

if TYPE_CHECKING:
    from fedcli.data.encoded import EncodedRows

SECONDS = 10.0
"""Of an answer's program, and again of its tests."""


def check_able(federation: FederationState, party: Party | None, train: TrainRecord) -> Reward | None:
    """Return the reward function of a round, None where its task has none; cheap, before a model is loaded.

    Raises RequirementError where a package or the function is not installed here, ConfigError where it runs code and
    the party does not allow that.
    """
    task = TASKS[federation.head.manifest.task]
    require_packages(task.packages)
    if train.reward is None:
        return None
    if train.reward not in REWARDS:
        raise RequirementError(
            f"round {federation.head.number} marks answers by the reward function {train.reward!r}, which is not "
            f"installed here. {did_you_mean(train.reward, REWARDS)}",
            hint="Ask the server's operator which package brings it (an entry point of the group fedcli.rewards), and "
            "install that where you train.",
        )
    reward = REWARDS[train.reward]
    if reward.runs_code and not allows_code(federation, party):
        is_joined = party is not None and party.num_rows is not None
        own = f"fedcli client join --id {party.client if party else 'N'} --data SOURCE --allow-code-execution"
        raise ConfigError(
            f"train.reward {reward.name} runs code that the model wrote, and that is not allowed here",
            hint="It would run in a sandbox, without network or files. To allow it, "
            + (f"run `{own}`." if is_joined else "set eval.allow_code_execution in fedcli.yaml."),
        )
    return reward


def check_rows(rows: "EncodedRows", reward: Reward, who: str, *, positions: int | None, max_new_tokens: int) -> None:
    """Raise ConfigError where a row gives nothing that the reward function can check, or its answer has no room."""
    checks = rows.checks
    if len(checks) < len(rows):
        raise ConfigError(f"{who}: rows have nothing to check answers against", hint="Give them a column answer.")
    different = list(dict.fromkeys(checks))
    faults = dict(zip(different, reward.faults(different), strict=True))
    if bad := [check for check in checks if faults[check] is not None]:
        raise ConfigError(
            f"{who}: {len(bad)} of {len(checks)} rows have an answer that train.reward {reward.name} cannot check; "
            f"first, {bad[0][:80]!r}: {faults[bad[0]]}",
            hint="Mend or remove these rows, or set train.reward to what they are made for.",
        )
    longest = max(row.sides[0].prompt_length for row in rows)
    if positions is not None and longest + max_new_tokens > positions:
        raise ConfigError(
            f"{who}: a prompt of {longest} tokens and {max_new_tokens} of an answer are more than the base's "
            f"{positions} positions",
            hint="Lower train.max_new_tokens or train.max_length in fedcli.yaml; it takes effect with the next round.",
        )


def scorer(reward: Reward) -> Callable[[Sequence[Answer]], Sequence[float]]:
    """Return what marks answers; raise RequirementError where the function runs code and there is no sandbox."""
    score: Callable[[Sequence[Answer]], Sequence[float]] = reward.score
    if reward.runs_code:
        from fedcli.eval.sandbox import Checks, Program, Sandbox

        sandbox = Sandbox()

        def run_code(checks: Sequence[CodeCheck]) -> list[bool]:
            programs = [Program(each.program, SECONDS, Checks(each.tests, each.names)) for each in checks]
            return [run.passed for run in sandbox.run_all(programs)]

        def score(answers: Sequence[Answer]) -> Sequence[float]:
            return reward.score(answers, run_code)

    def checked(answers: Sequence[Answer]) -> list[float]:
        try:
            found = [float(each) for each in score(answers)]
        except (RequirementError, ConfigError):
            raise
        except Exception as error:  # whatever a stranger's function raises, its package is named
            raise _faulty(reward, f"raises {type(error).__name__}: {error}") from error
        if len(found) != len(answers) or not all(map(math.isfinite, found)):
            raise _faulty(reward, f"gives {len(found)} numbers for {len(answers)} answers, or one that is not finite")
        return found

    return checked


def _faulty(reward: Reward, problem: str) -> RequirementError:
    package = REWARDS.package_of(reward.name)
    return RequirementError(
        f"the reward function {reward.name!r} of the package {package} {problem}",
        hint=f"Mend that package, or ask its author: `pip show {package}`.",
    )
