"""fedcli eval NAME."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from fedcli.commands.options import BenchmarkDataOption, JsonOption, ThreadsOption, WorkspaceOption, found_federation
from fedcli.commands.output import Display, print_hint, print_json

if TYPE_CHECKING:
    from fedcli.eval.judge import Estimate
    from fedcli.workspace.layout import Workspace
    from fedcli.workspace.scores import ScoreRecord


def run(
    names: Annotated[
        list[str],
        Argument(metavar="NAME...", help="Benchmarks or groups (`fedcli eval list` shows them); or lm-eval TASK..."),
    ],
    rounds: Annotated[list[str] | None, Option("--round", metavar="N|latest", help="A round's adapter.")] = None,
    base: Annotated[bool, Option("--base", help="The base model.")] = False,
    clients: Annotated[list[int] | None, Option("--client", metavar="N", help="Client N's last update.")] = None,
    alone: Annotated[list[int] | None, Option(metavar="N", help="Client N trained alone.")] = None,
    pooled: Annotated[bool, Option("--pooled", help="The baseline of all rows together.")] = False,
    adapters: Annotated[
        list[Path] | None, Option("--adapter", metavar="DIR", help="An adapter of this base, in PEFT's layout.")
    ] = None,
    models: Annotated[
        list[str] | None, Option("--model", metavar="DIR|ID", help="A full model: a folder or a hub id.")
    ] = None,
    apis: Annotated[
        list[str] | None, Option("--api", metavar="NAME", help="A model behind an OpenAI-compatible endpoint.")
    ] = None,
    api_url: Annotated[str | None, Option(metavar="URL", help="That endpoint. Default: OpenAI's.")] = None,
    data: BenchmarkDataOption = None,
    include: Annotated[Path | None, Option(metavar="DIR", help="lm-eval: a folder with tasks of yours.")] = None,
    limit: Annotated[int | None, Option(min=1, metavar="N", help="The first N items only.")] = None,
    shots: Annotated[int | None, Option(min=0, metavar="N", help="Worked examples in the prompt.")] = None,
    samples: Annotated[int | None, Option(min=1, metavar="N", help="Answers to each problem, for pass@k.")] = None,
    temperature: Annotated[float | None, Option(min=0, max=100, metavar="T", help="Sampling; 0 is greedy.")] = None,
    max_new_tokens: Annotated[int | None, Option(min=1, metavar="N", help="The longest answer.")] = None,
    template: Annotated[str | None, Option(metavar="NAME", help="Instead of the workspace's template.")] = None,
    baseline: Annotated[str | None, Option(metavar="TARGET", help="mt-bench-pairwise: whom to compare with.")] = None,
    judge_model: Annotated[
        str | None, Option(metavar="NAME|DIR", help="The judge: a model of --judge-url, or a folder.")
    ] = None,
    judge_url: Annotated[
        str | None, Option(metavar="URL", help="An OpenAI-compatible endpoint. Default: OpenAI's.")
    ] = None,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask whether the judge's cost is fine.")] = False,
    allow_code_execution: Annotated[
        bool, Option("--allow-code-execution", help="Run code that the model wrote, in a sandbox.")
    ] = False,
    batch_size: Annotated[int | None, Option(min=1, metavar="N", help="Items at once. Default: 64.")] = None,
    backend: Annotated[str | None, Option(hidden=True)] = None,
    split: Annotated[str, Option(hidden=True)] = "test",
    threads: ThreadsOption = None,
    workspace: WorkspaceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Score models on benchmarks, and keep scores and answers; with no model named, all that the workspace holds.

    Options that name models may be repeated. What was answered before is not asked again.
    """
    from fedcli.errors import UsageError, did_you_mean
    from fedcli.eval.benchmark import Options
    from fedcli.scoring.request import Scoring
    from fedcli.scoring.targets import Targets

    if backend is not None:
        raise UsageError(
            "there is no --backend any more: transformers answers, or a server behind --api",
            hint="Leave it out; for vLLM start `vllm serve BASE --enable-lora --lora-modules NAME=rounds/N/adapter`, "
            "and name it: --api NAME --api-url http://localhost:8000/v1.",
        )
    splits = {"test": "demo", "tuning": "demo-tuning"}
    if split not in splits:
        raise UsageError(f"unknown split {split!r}", hint=did_you_mean(split, splits))
    targets = Targets(
        rounds=tuple(rounds or ()),
        base=base,
        clients=tuple(clients or ()),
        alone=tuple(alone or ()),
        pooled=pooled,
        adapters=tuple(adapters or ()),
        models=tuple(models or ()),
        apis=tuple(apis or ()),
        api_url=api_url,
    )
    options = Options(limit, shots, samples, temperature, max_new_tokens, template, baseline)
    federation = found_federation(workspace)
    with _Display(json_output, "loading") as display:
        scoring = Scoring(
            names=[splits[split] if name == "demo" else name for name in names],
            targets=targets,
            options=options,
            data=data,
            include=include,
            judge_model=judge_model,
            judge_url=judge_url,
            allow_code_execution=allow_code_execution,
            batch_size=batch_size,
            threads=threads,
            confirm=None if yes else display.confirm,
        )
        records = federation.evaluate(request=scoring, observer=display)
    if json_output:
        print_json({"scores": records})
        return
    _print(federation.workspace, records)


class _Display(Display):
    """Shows how far an evaluation is, and asks whether a judge's cost is fine, once."""

    _is_confirmed = False

    def target_started(self, target: str, benchmark: str) -> None:
        self.show(description=f"{target}: {benchmark}", completed=0, total=None)

    def answered(self, num_done: int, num_asked: int) -> None:
        self.show(completed=num_done, total=num_asked)

    def confirm(self, estimate: "Estimate") -> None:
        """Ask a person; raise UsageError where none is there, or says no."""
        from fedcli.errors import UsageError

        if self._is_confirmed:
            return
        cost = (
            f"{estimate.num_calls} questions to the judge for this model, about {estimate.num_prompt_tokens:,} tokens, "
            f"and at most {estimate.max_reply_tokens:,} in its replies"
        )
        hint = "The answers are kept. Say --yes to let the judge score them."
        if not sys.stdin.isatty():
            raise UsageError(f"the judge's cost needs a yes: {cost}", hint=hint)
        self.stop()
        if not typer.confirm(f"{cost}, and as much for each further model. Go on?", err=True):
            raise UsageError("the judge was not asked", hint=hint)
        self.start()
        self._is_confirmed = True


def _print(workspace: "Workspace", records: "Sequence[ScoreRecord]") -> None:
    """Print what was scored as a table, and what to do next for what could not be."""
    from fedcli.commands.eval_table import print_table
    from fedcli.scoring.table import make_table

    if any(record.scores for record in records):
        print_table(make_table(workspace, records=records))
    for record in records:
        if record.awaits is not None:
            option = "--judge-model NAME" if record.awaits == "judge" else "--allow-code-execution"
            print_hint(
                f"{record.target}: {record.num_unscored} answers to {record.name} are kept, and wait for "
                f"{record.awaits}: the same command with {option} scores them"
            )
        elif record.num_unscored:
            print_hint(
                f"{record.target}, {record.name}: {record.num_unscored} of {record.num_items} items have no score"
            )
