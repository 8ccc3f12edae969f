"""How much faster a batched evaluation is than one item at a time: 2,000 short items, one process, the same scores.

The demo's base model answers instructions of the demo's form greedily, and gives the likelihood of an answer, in
batches of 64, and asked one after another. Prints `eval_batches: ratio R (limit L)`, R the smaller of both ratios;
exits with 1 where it is below the limit or an answer differs, and writes results/eval_batches.json.
"""

import json
import os
import platform
import random
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from fedcli.data.encoding import Encoder
from fedcli.eval.local_model import LocalModel
from fedcli.eval.requests import Generation, Likelihood
from fedcli.model.base import find_base
from fedcli.model.library_logging import quiet_libraries
from fedcli.model.loading import load_base
from fedcli.tasks.conversation import Turn

NUM_ITEMS = 2000
LIMIT = 5.0
RESULTS = Path(__file__).parent / "results"
WORDS = "which alert level fits this headline the steel maker rallies coast floods striker wins clinic heals"


def prompts() -> list[tuple[Turn, ...]]:
    """Return short instructions, of 5 to 20 words."""
    draws = random.Random(0)
    return [(Turn("user", " ".join(draws.choices(WORDS.split(), k=draws.randint(5, 20)))),) for _ in range(NUM_ITEMS)]


def measure(model: LocalModel, at_once: int) -> tuple[list[str], list[float], float, float]:
    """Ask for so many items at once; return answers and likelihoods of all, and the seconds that each kind took."""
    texts: list[str] = []
    log_probs: list[float] = []
    asked = prompts()
    groups = [asked[start : start + at_once] for start in range(0, NUM_ITEMS, at_once)]
    start = time.perf_counter()
    for group in groups:
        found = [""] * len(group)
        model.generate([Generation(prompt, 8) for prompt in group], found.__setitem__)
        texts += found
    middle = time.perf_counter()
    for group in groups:
        values = [0.0] * len(group)
        requests = [Likelihood(prompt, "green") for prompt in group]
        model.log_likelihoods(requests, lambda index, answer, to=values: to.__setitem__(index, answer.log_prob))
        log_probs += values
    return texts, log_probs, middle - start, time.perf_counter() - middle


def main() -> int:
    """Print the ratio and keep the figures."""
    torch.set_num_threads(1)
    with quiet_libraries():
        model, tokenizer = load_base(find_base("builtin:tiny", revision=None, root=Path()), trust_remote_code=False)
    encoder = Encoder(tokenizer, "alpaca")
    together = measure(LocalModel(model, tokenizer, encoder), NUM_ITEMS)
    alone = measure(LocalModel(model, tokenizer, encoder), 1)
    same_texts = sum(one == other for one, other in zip(together[0], alone[0], strict=True))
    largest = max(abs(one - other) for one, other in zip(together[1], alone[1], strict=True))
    ratios = {"generation": alone[2] / together[2], "likelihood": alone[3] / together[3]}
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "items": NUM_ITEMS,
        "seconds_batched": {"generation": together[2], "likelihood": together[3]},
        "seconds_one_at_a_time": {"generation": alone[2], "likelihood": alone[3]},
        "ratios": ratios,
        "same_answers": same_texts,
        "largest_difference_of_log_probs": largest,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "eval_batches.json").write_text(json.dumps(record, indent=1) + "\n")
    for kind, seconds in record["seconds_batched"].items():
        print(f"{kind}: {record['seconds_one_at_a_time'][kind]:.1f} s one at a time, {seconds:.1f} s in batches of 64")
    print(f"{same_texts} of {NUM_ITEMS} answers are the same; log-probabilities differ by at most {largest:.1e}")
    print(f"eval_batches: ratio {min(ratios.values()):.2f} (limit {LIMIT:.1f})")
    return 0 if min(ratios.values()) >= LIMIT and same_texts == NUM_ITEMS and largest < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
