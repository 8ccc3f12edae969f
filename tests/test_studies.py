"""Studies: their file, their tables' numbers and forms, and the shipped ones, without training."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from support.processes import runner

from fedcli.algos import ALGORITHMS
from fedcli.errors import ConfigError, FedError, UsageError
from fedcli.eval.benchmark import Metric
from fedcli.eval.registry import BENCHMARKS
from fedcli.eval.statistics import NUM_RESAMPLES, Score, difference, difference_over_seeds
from fedcli.randomness import stream
from fedcli.server.create import presets
from fedcli.study.columns import Column
from fedcli.study.folder import create_study, shipped_studies
from fedcli.study.plan import cells_of, parse_study, read_study
from fedcli.study.render import render
from fedcli.study.results import Block, StudyScore, StudyTable

ROOT = Path(__file__).parents[1]
SMALLEST = {"presets": ["demo"], "algorithms": ["fedavg"], "eval": {"benchmarks": ["demo"]}}


# The file


def test_a_study_is_presets_x_algorithms_x_seeds_and_baselines_once_for_each_preset_and_seed(tmp_path: Path) -> None:
    document = SMALLEST | {
        "presets": ["demo", {"preset": "demo", "name": "skewed", "settings": {"train": {"steps": 7}}}],
        "algorithms": ["fedavg", {"name": "fedprox", "label": "FedProx-1", "mu": 1.0}],
        "settings": {"train.steps": 3, "train.batch_size": 2},
        "seeds": [4, 5],
    }
    cells = cells_of(parse_study(document, tmp_path / "study.yaml"))
    assert [cell.id for cell in cells[:6]] == [
        "demo/seed-4/baselines",
        "demo/seed-4/fedavg",
        "demo/seed-4/FedProx-1",
        "skewed/seed-4/baselines",
        "skewed/seed-4/fedavg",
        "skewed/seed-4/FedProx-1",
    ]
    assert len(cells) == 12
    last = cells[-1].config
    assert (last.federation.seed, last.train.steps, last.train.batch_size) == (5, 7, 2)
    assert last.algorithm == ALGORITHMS["fedprox"](mu=1.0)
    assert cells[0].config.train.steps == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"presets": ["dmo"]}, r"unknown preset 'dmo'"),
        ({"presets": ["demo", "demo"]}, r"presets: demo comes twice"),
        ({"seeds": [0, 0]}, r"seeds: 0 comes twice; leave one out"),
        ({"algorithms": "fedavg"}, r"algorithms: a list is wanted here \(found 'fedavg'\)"),
        ({"algorithms": ["fedavgg"]}, r"unknown algorithm 'fedavgg'\. Did you mean fedavg"),
        ({"algorithms": [{"name": "fedprox", "nu": 1}]}, r"the cell demo/seed-0/fedprox has 1 fault"),
        ({"settings": {"train.stepz": 1}}, r"train\.stepz: unknown key\. Did you mean steps"),
        ({"eval": {"benchmarks": ["mmlu", "dmo"]}}, r"eval\.benchmarks: unknown benchmark 'dmo'"),
        ({"eval": {}}, r"eval\.benchmarks: name what is to be scored"),
        ({"baselines": ["alone-5"]}, r"alone-5: demo has clients 0 to 4"),
        ({"baselines": ["best"]}, r"unknown baseline 'best'"),
        ({"settings": {"eval.data": "rows"}}, r"eval\.data .* the study's own section eval"),
        ({"settings": {"federation": {"seed": 1}}}, r"federation\.seed .* into the study's seeds"),
        ({"algorithms": [{"name": "fedavg", "settings": {"algorithm.name": "x"}}]}, r"into the study's algorithms"),
        ({"seedz": [1]}, r"seedz: unknown key\. Did you mean seeds"),
        ({"seeds": []}, r"seeds: "),
    ],
)
def test_a_fault_in_a_study_file_is_named_with_its_key(tmp_path: Path, change: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_study(SMALLEST | change, tmp_path / "study.yaml")


def test_paths_start_at_the_folder_of_the_file_that_init_was_given(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    (tmp_path / "mine/s.yaml").write_text(yaml.safe_dump(SMALLEST | {"settings": {"data.source": "rows.jsonl"}}))
    folder, is_new = create_study(str(tmp_path / "mine/s.yaml"), tmp_path / "made")
    assert is_new
    assert cells_of(folder.study)[0].settings["data.source"] == str(tmp_path / "mine/rows.jsonl")
    (tmp_path / "mine/rows.jsonl").unlink()  # missing or not, it is the same place, wherever the command is run
    assert cells_of(read_study(tmp_path / "made/study.yaml"))[0].settings["data.source"] == str(
        tmp_path / "mine/rows.jsonl"
    )
    again, is_new = create_study(str(tmp_path / "mine/s.yaml"), tmp_path / "made")
    assert not is_new
    assert again.study == folder.study
    with pytest.raises(FedError, match="already holds another study"):
        create_study("demo", tmp_path / "made")
    for what, form in (("demmo", None), ("paper-table-4", "tinny")):
        with pytest.raises(UsageError, match=r"no (study|form)|there is no form"):
            create_study(what, tmp_path / "other", preset_set=form)


# The paper


@pytest.mark.parametrize("name", shipped_studies())
def test_a_shipped_study_is_valid_and_its_columns_are_metrics(name: str) -> None:
    study = read_study(shipped_studies()[name])
    assert study.title
    for column in study.table.columns:
        assert column.metric in [metric.name for metric in BENCHMARKS[column.benchmark].metrics]
    figures = [study.paper.rows, *study.paper.presets.values()] if study.paper else []
    titles = {column.shown for column in study.table.columns}
    assert {title for rows in figures for row in rows.values() for title in row} <= titles


def test_the_papers_tables_have_its_metrics_and_the_released_codes_settings() -> None:
    columns = {
        number: [column.shown for column in read_study(shipped_studies()[f"paper-table-{number}"]).table.columns]
        for number in (2, 4, 5)
    }
    chat = ["Vicuna", "MT-1", "MT-2", "MT-Avg"]
    assert columns[2] == ["MMLU", "BBH", "DROP", "HumanEval", "CRASS", *chat]
    sets = ("FPB", "FiQA-SA", "TFNS", "NWGI", "Avg:3", "Avg:4")
    assert columns[4] == [f"{name} {metric}" for name in sets for metric in ("Acc", "F1")]
    assert columns[5] == ["MT-1", "GSM8K", "HumanEval", "FPB F1"]
    found = {entry.label: entry for entry in read_study(shipped_studies()["paper-table-4"]).algorithms}
    assert list(found) == ["FedAvg", "FedProx", "SCAFFOLD", "FedAvgM", "FedAdagrad", "FedYogi", "FedAdam"]
    for entry in found.values():  # they are fedcli's defaults, too
        assert ALGORITHMS[entry.name](**entry.hyperparameters) == ALGORITHMS[entry.name]()
    assert {benchmark.name for benchmark in BENCHMARKS.values() if "paper-table-5" in benchmark.groups} == {
        *("mt-bench", "gsm8k", "humaneval", "fpb")
    }


def test_the_published_average_ranks_of_table_5_follow_from_its_scores_by_the_note() -> None:
    paper = read_study(shipped_studies()["paper-table-5"]).paper
    assert paper is not None
    scores = np.array([list(row.values()) for row in paper.rows.values()])
    ranks = 1 + (scores[:, None] < scores).sum(axis=1)
    assert (ranks.sum(axis=1) / 5).tolist() == [2.4, 2.0, 2.6, 3.0, 1.4]
    assert "2.4, 2.0, 2.6, 3.0 and FedAvg's 1.4" in paper.note


def test_all_eight_data_sets_of_the_paper_have_a_preset_and_the_mixed_one_has_its_order() -> None:
    sources = {name: yaml.safe_load(path.read_text())["data"]["source"] for name, path in presets().items()}
    mixed = [entry["source"] for entry in sources["fedit-mixed"]]
    assert mixed == [
        "tatsu-lab/alpaca",
        "TIGER-Lab/MathInstruct",
        "lucasmccabe-lmi/CodeAlpaca-20k",
        "FinGPT/fingpt-sentiment-train",
    ]
    assert {"tatsu-lab/alpaca", *(source for source in sources.values() if isinstance(source, str))} >= {
        "tatsu-lab/alpaca",
        "vicgalle/alpaca-gpt4",
        "FinGPT/fingpt-sentiment-train",
        "medalpaca/medical_meadow_medical_flashcards",
        "lucasmccabe-lmi/CodeAlpaca-20k",
        "TIGER-Lab/MathInstruct",
        "openbmb/UltraFeedback",
        "Anthropic/hh-rlhf",
    }


def test_the_tiny_studies_rows_are_those_that_the_script_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "benchmarks/study_rows.py", tmp_path], check=True, cwd=ROOT)
    shipped = ROOT / "workspace_template/studies/rows"
    files = [path.relative_to(shipped) for path in shipped.rglob("*") if path.is_file()]
    assert len(files) == 8
    assert all((shipped / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


# Numbers


def test_with_one_seed_and_model_the_difference_over_seeds_is_the_paired_difference() -> None:
    draw = np.random.default_rng(0)
    ours, theirs = ({str(item): float(draw.integers(2)) for item in range(40)} for _ in range(2))
    clusters = {str(item): str(item // 3) for item in range(30)}
    metric = Metric("accuracy")
    expected = difference(metric, [ours], [theirs], [clusters])
    assert difference_over_seeds(metric, [[[ours]]], [[[theirs]]], [clusters]) == expected


def test_the_interval_resamples_seeds_and_items() -> None:
    """Three seeds of a mean over two models against one, with the draws written out."""
    draw = np.random.default_rng(1)
    items = [str(item) for item in range(9)]  # names of one digit: their order is the sorted one
    ours, theirs = draw.random((3, 2, 9)), draw.random((3, 1, 9))

    def marks(values: np.ndarray) -> list:
        return [[[dict(zip(items, model.tolist(), strict=True))] for model in seed] for seed in values]

    found = difference_over_seeds(Metric("x"), marks(ours), marks(theirs))
    lead = ours.mean(axis=1) - theirs.mean(axis=1)  # seeds x items
    of_items = stream(0, "bootstrap", client=0, part="9")
    drawn = np.array([of_items.integers(9, size=9) for _ in range(NUM_RESAMPLES)])
    of_seeds = stream(0, "bootstrap-seeds", part="3").integers(3, size=(NUM_RESAMPLES, 3))
    resampled = np.array([lead[np.ix_(s, i)].mean() for s, i in zip(of_seeds, drawn, strict=True)])
    assert found is not None
    assert found.value == pytest.approx(lead.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])))
    assert found.standard_error == pytest.approx(resampled.std(ddof=1))
    assert difference_over_seeds(Metric("x"), marks(ours), [[[{"other": 1.0}]]] * 3) is None


# Forms


def table() -> StudyTable:
    """A table with every kind of cell, and letters that mean something to LaTeX."""
    columns = (Column(benchmark="fpb", metric="accuracy", title="Acc_1 & 50%"), Column(benchmark="fpb", metric="f1"))
    first, second = (column.shown for column in columns)
    lead = Score(0.25, 0.05, -0.1, 0.4, 45)
    scores = {
        ("base", first): StudyScore({0: 0.5, 1: 0.25}, 2),
        ("Fed_Avg", first): StudyScore({0: 0.5, 1: 0.75}, 1, lead, 0.791),
        ("Fed_Avg", second): StudyScore({1: 12.5}, 1),
        ("GPT-4", first): StudyScore({}, published=0.731),
    }
    rows = {"base": "base", "Fed_Avg": "Fed_Avg", "GPT-4": "GPT-4"}
    block = Block("demo", "demo", rows, columns, scores, {"base": 2.0, "Fed_Avg": 1.0}, "base")
    return StudyTable("A #1 study {of} $5 ~ ^ \\", (block,), 2, "A paper", ("50 % of 2 seeds",))


def test_markdown_marks_the_best_and_has_the_published_figures_below_ours() -> None:
    text = render(table(), "markdown")
    assert "| base | <u>0.375 ± 0.177</u> |  | 2.00 |" in text
    assert "| Fed_Avg | **0.625 ± 0.177** | **12.50** | 1.00 |\n| Fed_Avg, published | 0.791 |  |  |" in text
    assert "| GPT-4, published | 0.731 |  |  |" in text
    assert "| Fed_Avg | +0.250 [-0.100, +0.400] |  |" in text


def test_csv_and_json_have_every_number() -> None:
    rows = list(csv.DictReader(io.StringIO(render(table(), "csv"))))
    assert [(row["row"], row["column"], row["mean"], row["published"]) for row in rows] == [
        ("base", "Acc_1 & 50%", "0.375", ""),
        ("Fed_Avg", "Acc_1 & 50%", "0.625", "0.791"),
        ("Fed_Avg", "fpb f1", "12.5", ""),
        ("GPT-4", "Acc_1 & 50%", "", "0.731"),
    ]
    document = json.loads(render(table(), "json"))
    assert document["scores"][1]["by_seed"] == {"0": 0.5, "1": 0.75}
    assert document["average_rank"] == {"demo": {"base": 2.0, "Fed_Avg": 1.0}}


def check_latex(text: str) -> None:
    """Assert that LaTeX can read a fragment: environments, braces, columns, and no letter with a meaning of its own."""
    assert text.isascii()
    body = re.sub(r"^%.*$", "", text, flags=re.M)
    assert re.findall(r"\\begin{(\w+)}", body) == re.findall(r"\\end{(\w+)}", body)[::-1] * (
        body.count(r"\begin{table}")
    )
    bare = re.sub(r"\\[\\{}&%$#_]|\$\\pm\$", "", body)
    depths = np.cumsum([(letter == "{") - (letter == "}") for letter in bare])
    assert depths.min() >= 0
    assert depths[-1] == 0
    assert not set("#$%~^_") & set(bare)
    known = {"begin", "end", "centering", "caption", "toprule", "midrule", "bottomrule", "multicolumn", "emph"}
    known |= {"textbf", "underline", "textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater"}
    assert set(re.findall(r"\\([a-zA-Z]+)", bare)) <= known
    tabulars = re.findall(r"\\begin{tabular}{(lr*)}(.*?)\\end{tabular}", body, re.S)
    assert len(tabulars) == body.count(r"\begin{tabular}") > 0
    for columns, lines in tabulars:
        for line in lines.strip().splitlines():
            if line.startswith(r"\multicolumn"):
                assert line.startswith(rf"\multicolumn{{{len(columns)}}}")
            elif line not in (r"\toprule", r"\midrule", r"\bottomrule"):
                assert line.endswith(r" \\")
                assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1


def test_latex_can_be_read(tmp_path: Path) -> None:
    text = render(table(), "latex")
    check_latex(text)
    assert r"Fed\_Avg & \textbf{0.625 $\pm$ 0.177} & \textbf{12.50} & 1.00 \\" in text
    compiler = next(filter(None, map(shutil.which, ("pdflatex", "tectonic"))), None)
    if compiler is None:
        return  # check_latex has looked at all that the compiler would
    head = "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n"
    (tmp_path / "t.tex").write_text(f"{head}{text}\\end{{document}}\n")
    options = ["-halt-on-error", "-interaction=nonstopmode"] if "pdflatex" in compiler else []
    subprocess.run([compiler, *options, "t.tex"], cwd=tmp_path, check=True, capture_output=True)


# Commands


def test_a_study_is_looked_at_before_it_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runner(capsys)
    code, out, err = run("study", "init", "demo", tmp_path / "s", "--set", "seeds=[3]")
    assert (code, "3 cells" in out, f"fedcli study run -s {tmp_path / 's'}" in err) == (0, True, True)
    code, out, _ = run("study", "status", "-s", tmp_path / "s")
    assert (code, out.count(": waiting"), "0 of 3 cells done" in out) == (0, 3, True)
    code, _, err = run("study", "table", "-s", tmp_path / "s")
    assert (code, "no cell of the study has scores yet" in err) == (6, True)
    code, _, err = run("study", "run", "-s", tmp_path / "s", "--cell", "demo/seed-3/fedavgg")
    assert (code, "Did you mean demo/seed-3/fedavg" in err) == (2, True)
    code, _, err = run("study", "run", "-s", tmp_path)
    assert (code, "holds no study.yaml" in err) == (4, True)
    code, _, err = run("study", "report", "-s", tmp_path / "s")
    assert (code, "no cell of the study has scores yet" in err) == (6, True)
    monkeypatch.chdir(tmp_path / "s")
    code, _, err = run("report")
    assert (code, "is a study's folder" in err, "`fedcli study report`" in err) == (4, True, True)
    code, out, _ = run("study", "init", "--list")
    assert (code, [line.partition(":")[0] for line in out.splitlines()]) == (0, list(shipped_studies()))
