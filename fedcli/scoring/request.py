"""What a user asks of an evaluation, made ready: every name is checked before a model is loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import get_args

from fedcli.client.runtimes import Runtimes
from fedcli.config import TemplateChoice, TemplateName
from fedcli.errors import ConfigError, UsageError, did_you_mean, require_packages
from fedcli.eval.benchmark import Benchmark, Options
from fedcli.eval.endpoint import OPENAI_URL, find_endpoint
from fedcli.eval.judge import Estimate, Judge
from fedcli.eval.registry import BENCHMARKS, find_benchmarks, needed_packages
from fedcli.eval.remembered import Engine
from fedcli.model.base import fingerprint
from fedcli.scoring.engines import Models, load_local
from fedcli.scoring.evaluate import Evaluation
from fedcli.scoring.targets import Target, Targets, find_targets
from fedcli.workspace.federation_state import FederationState
from fedcli.workspace.layout import Workspace
from fedcli.workspace.scores import read_scores, scored_name
from fedcli.workspace.target_name import TargetName

LM_EVAL = "lm-eval"
"""In place of a benchmark's name: the names behind it are lm-eval's tasks."""


@dataclass(frozen=True)
class Scoring:
    """What a user asks for; see `fedcli eval --help`."""

    names: Sequence[str]
    targets: Targets = field(default_factory=Targets)
    options: Options = field(default_factory=Options)
    data: Path | None = None
    include: Path | None = None
    judge_model: str | None = None
    judge_url: str | None = None
    allow_code_execution: bool = False
    batch_size: int | None = None
    threads: int | None = None
    confirm: Callable[[Estimate], None] | None = None
    """Called with the estimated cost of a judge before its first question; it raises to stop. None: no confirmation."""


def prepare(federation: FederationState, asked: Scoring, runtimes: Runtimes) -> Evaluation:
    """Return the evaluation that a user asks for; `runtimes` are models that may be loaded already.

    Raises UsageError for a name that is not known, NotReadyError for a round that is not there, RequirementError where
    a key, an endpoint or the sandbox is missing.
    """
    benchmarks = _benchmarks(asked)
    require_packages(name for benchmark in benchmarks for name in needed_packages(benchmark))
    _check_options(benchmarks, asked)
    _check_privacy(federation, benchmarks)
    _check_baseline(federation.workspace, benchmarks, asked.options)
    endpoints = {name: find_endpoint(name, asked.targets.api_url) for name in asked.targets.apis}
    urls = {endpoint.url for endpoint in endpoints.values()} - {OPENAI_URL}
    targets = find_targets(federation, replace(asked.targets, api_url=next(iter(urls), None)))
    _check_own_adapters(federation, targets)
    for endpoint in endpoints.values():
        endpoint.reach()
    train = federation.head.manifest.train
    template = _template(asked.options.template) or train.template
    models = Models(
        federation.head, endpoints.__getitem__, runtimes, template, train.date, asked.threads, asked.batch_size
    )
    run_code = None
    if asked.allow_code_execution:
        from fedcli.eval.programs import require_programs
        from fedcli.eval.sandbox import Sandbox

        for benchmark in benchmarks:
            require_programs(benchmark.name, benchmark.programs)
        run_code = Sandbox()
    judge = _judge(asked) if asked.judge_model is not None else None
    return Evaluation(
        federation.workspace,
        benchmarks,
        targets,
        models,
        asked.options,
        asked.data,
        judge,
        run_code,
        _notes(benchmarks, asked.options),
    )


def _benchmarks(asked: Scoring) -> list[Benchmark]:
    if asked.names[0] != LM_EVAL:
        if asked.include is not None:
            raise UsageError("--include is for `fedcli eval lm-eval TASK`", hint="Leave it out.")
        return find_benchmarks(asked.names)
    if len(asked.names) == 1:
        raise UsageError("lm-eval: no task is named", hint="Name one: `fedcli eval lm-eval hellaswag`.")
    from fedcli.eval.benchmarks.lm_eval_by_name import lm_eval_benchmark

    return [lm_eval_benchmark(asked.names[1:], asked.include)]


def _check_options(benchmarks: Sequence[Benchmark], asked: Scoring) -> None:
    """Raise UsageError for an option that would change nothing of any benchmark."""
    for url, name, given in (
        ("--api-url", "--api", asked.targets.api_url is not None and not asked.targets.apis),
        ("--judge-url", "--judge-model", asked.judge_url is not None and asked.judge_model is None),
    ):
        if given:
            raise UsageError(f"{url} is given, and no {name}", hint=f"Name the model with {name}.")
    for name in asked.options.given():
        if any(benchmark.obeys(name) for benchmark in benchmarks):
            continue
        first = benchmarks[0]
        raise UsageError(
            f"{', '.join(_shown(benchmarks))} takes no {_written(name)}",
            hint=f"{first.name} takes {', '.join(sorted(map(_written, {'limit', *first.takes})))}.",
        )


def _check_privacy(federation: FederationState, benchmarks: Sequence[Benchmark]) -> None:
    """Raise ConfigError where scores of somebody's own rows would be published, and parties are promised privacy."""
    own = [benchmark.name for benchmark in benchmarks if "own" in benchmark.groups]
    if own and federation.head.manifest.withholds and not federation.identity.simulation:
        raise ConfigError(
            f"{own[0]} scores rows of your own, and eval/ would tell everybody of them exactly: the federation asks "
            "for privacy",
            hint="`fedcli export` the round, and score it in a workspace of your own.",
        )


def _check_own_adapters(federation: FederationState, targets: Sequence[Target]) -> None:
    """Raise ConfigError where scores of what a client trained for itself would be published, without noise."""
    own = [target.name for target in targets if TargetName.parse(target.name).kind == "own"]
    if own and federation.head.manifest.withholds and not federation.identity.simulation:
        raise ConfigError(
            f"{own[0]} has no noise, and eval/ would tell everybody what it answers: the federation asks for privacy",
            hint="`fedcli export --client N`, and score it in a workspace of your own.",
        )


def _notes(benchmarks: Sequence[Benchmark], options: Options) -> list[str]:
    """Return which options hold for some of the benchmarks only."""
    found = {name: [each for each in benchmarks if not each.obeys(name)] for name in options.given()}
    return [
        f"{_written(name)} changes nothing of {', '.join(_shown(others))}: it holds for the other benchmarks"
        for name, others in found.items()
        if others
    ]


def _shown(benchmarks: Sequence[Benchmark]) -> list[str]:
    return [*(each.name for each in benchmarks[:5]), *([f"{len(benchmarks) - 5} more"] if len(benchmarks) > 5 else [])]


def _written(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _check_baseline(workspace: Workspace, benchmarks: Sequence[Benchmark], options: Options) -> None:
    """Raise UsageError where a comparison has nobody to compare with."""
    compared = [benchmark.answers_of for benchmark in benchmarks if benchmark.answers_of is not None]
    if not compared:
        return
    name = scored_name(compared[0], replace(options, baseline=None).of(BENCHMARKS[compared[0]]).variant)
    known = [record.target for record in read_scores(workspace) if record.name == name]
    if options.baseline not in known:
        problem = "needs a --baseline" if options.baseline is None else f"has no answers of {options.baseline!r}"
        hint = f"Run {compared[0]} on the other one first, with the same settings, then name it"
        raise UsageError(f"{benchmarks[0].name} {problem}", hint=f"{hint}; known: {', '.join(known) or 'none'}.")


def _template(name: str | None) -> TemplateChoice | None:
    known: tuple[TemplateName, ...] = get_args(TemplateName)
    found = next((template for template in known if template == name), None)
    if name is not None and found is None:
        raise UsageError(f"unknown template {name!r}", hint=did_you_mean(name, known))
    return found


_load_judge = cache(load_local)
"""A judge of this machine is loaded once a process, whatever it judges."""


def _judge(asked: Scoring) -> Callable[..., Judge]:
    """Return what makes the judge, a model folder's or an endpoint's; raise as `find_endpoint` does."""
    name = str(asked.judge_model)
    load: Callable[[], Engine]
    if asked.judge_url is None and name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise UsageError(f"--judge-model {name}: no such folder", hint="Name a model's folder, or an endpoint's model.")
    if asked.judge_url is None and Path(name).is_dir():
        load = partial(_load_judge, Path(name).resolve())
        name = f"{Path(name).absolute().name}-{fingerprint(Path(name))[:8]}"
    else:
        load = cache(find_endpoint(name, asked.judge_url).reach)
    return partial(Judge, name, load, confirm=asked.confirm)
