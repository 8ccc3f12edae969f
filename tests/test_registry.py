"""The register of benchmarks: names, groups, metrics, and the walk of CONTRIBUTING.md."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.processes import ENVIRONMENT, fedcli
from support.scripted import Scripted, session

from fedcli.errors import UsageError
from fedcli.eval.registry import BENCHMARKS, find_benchmarks, find_group, known_groups, register

ROOT = Path(__file__).parents[1]

PAPER = {
    "mmlu": ["accuracy"],
    "bbh": ["accuracy"],
    "bbh-cot": ["accuracy"],
    "drop": ["em", "f1"],
    "humaneval": ["pass@1", "pass@10"],
    "crass": ["accuracy"],
    "vicuna": ["Vicuna"],
    "mt-bench": ["MT-1", "MT-2", "MT-Avg"],
    **{name: ["accuracy", "weighted_f1", "macro_f1"] for name in ("fpb", "fiqa", "tfns", "nwgi")},
    "finance": ["Avg:3 accuracy", "Avg:3 weighted_f1", "Avg:4 accuracy", "Avg:4 weighted_f1"],
    **{name: ["accuracy"] for name in ("medqa", "medmcqa", "pubmedqa", "mmlu-medical", "gsm8k", "math", "hhh")},
    **{name: ["pass@1"] for name in ("mbpp", "ds1000", "humanevalfix", "humanevalsynthesize")},
    "conala": ["BLEU"],
    "concode": ["BLEU"],
    "advbench": ["refusal_rate"],
}
"""Every metric that the paper's tables have."""


def test_the_list_holds_every_metric_of_the_paper(tmp_path: Path) -> None:
    done = fedcli("eval", "list", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    listed = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert listed.keys() == BENCHMARKS.keys()
    for name, metrics in PAPER.items():
        assert [metric for metric in metrics if metric not in listed[name]["metrics"]] == [], name
        assert listed[name]["group"] in known_groups()


def test_the_list_needs_nothing_heavy() -> None:
    code = (
        "import sys, fedcli.cli; fedcli.cli.main(['eval', 'list', '--json']); "
        "print(*{'torch', 'transformers', 'lm_eval', 'openai', 'datasets'} & sys.modules.keys(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.stderr.split() == []


def test_every_group_has_benchmarks_and_every_benchmark_says_whose_it_is() -> None:
    for group in known_groups():
        assert find_group(group), group
    for benchmark in BENCHMARKS.values():
        assert benchmark.groups
        assert benchmark.metrics
        assert benchmark.citation
        assert (benchmark.size > 0) == (benchmark.name != "rows")
        assert (benchmark.run is None) == bool(benchmark.parts)
        if benchmark.data is not None:
            assert benchmark.data.files
            assert benchmark.data.url
        assert [part for part in benchmark.parts if part not in BENCHMARKS] == []


def test_a_name_that_comes_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'hhh' is taken"):
        register([BENCHMARKS["hhh"], BENCHMARKS["fpb"], BENCHMARKS["hhh"]])


def test_an_unknown_name_gets_its_near_match() -> None:
    with pytest.raises(UsageError, match="unknown benchmark 'gsm8'") as caught:
        find_benchmarks(["gsm8"])
    assert "gsm8k" in caught.value.hint
    with pytest.raises(UsageError, match="unknown group 'finances'") as caught:
        find_group("finances")
    assert "finance" in caught.value.hint


def test_a_groups_name_stands_for_its_benchmarks_each_once() -> None:
    names = [benchmark.name for benchmark in find_benchmarks(["medqa", "medical"])]
    assert names[0] == "medqa"
    assert len(names) == len(set(names)) == len(find_group("medical"))


def test_the_walk_of_contributing_makes_a_benchmark_that_scores(tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text.partition("## Adding a benchmark")[2], re.DOTALL)[:1]
    module = ModuleType("capitals")
    exec("\n".join(line[3:] for line in code.splitlines()), module.__dict__)
    rows = [{"question": "France?", "capital": "Paris"}, {"question": "Peru?", "capital": "Lima"}]
    (tmp_path / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = Scripted(lambda request: " Paris")
    items = module.BENCHMARK.run(session(module.BENCHMARK, model, tmp_path))
    assert [item.marks["accuracy"] for item in items] == [1, 0]
