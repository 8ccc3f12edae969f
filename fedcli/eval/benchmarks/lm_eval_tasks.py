"""The closed-ended benchmarks: tasks of lm-eval, on the publishers' files where they are here, else from the hub."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

from fedcli.eval import releases
from fedcli.eval.benchmark import Benchmark, Metric
from fedcli.eval.benchmarks import local_rows
from fedcli.eval.benchmarks.lm_eval_names import BBH_TASKS, MEDICAL_SUBJECTS, MMLU_GROUPS
from fedcli.eval.data import DataSource
from fedcli.eval.lm_eval_bridge import TaskSet

ACCURACY = Metric("accuracy")
CHOSEN = {("acc", "none"): "accuracy"}
"""The choice of the highest likelihood is the right one."""
_TAKE_FIRST = {"function": "take_first"}
_choice = partial(Benchmark, metrics=(ACCURACY,), needs=("likelihood",), takes=("shots",), packages=("lm_eval",))
_generation = partial(
    Benchmark, needs=("gpu-advised",), takes=("max_new_tokens", "shots", "temperature"), packages=("lm_eval",)
)


def _details(names: Iterable[str]) -> tuple[Metric, ...]:
    return tuple(Metric(name, is_detail=True) for name in names)


def _unboxed(responses: Sequence[Sequence[str]], docs: object) -> list[list[str]]:
    """Put what the last box of an answer holds in its place: lm-eval's task looks for dollar signs only."""
    return [
        [answer if (inner := local_rows.boxed(answer)) is None else inner for answer in answers]
        for answers in responses
    ]


def _mmlu(files: tuple[str, ...], subjects: Mapping[str, tuple[str, ...]], **fields: Any) -> Benchmark:
    """Return a benchmark of some subjects, each with the metrics that its items count for besides the accuracy."""
    tasks = {f"mmlu_{subject}": counts for subject, counts in subjects.items()}
    read = partial(local_rows.mmlu, tuple(subjects))
    return _choice(
        metrics=(ACCURACY, *_details(dict.fromkeys(chain(*zip(*subjects.values(), strict=True))))),
        citation="Hendrycks et al. 2021, Measuring Massive Multitask Language Understanding, arXiv:2009.03300",
        data=DataSource(
            files,
            "https://github.com/hendrycks/test",
            ("mmlu", "mmlu/data", "data"),
            hub="cais/mmlu",
            subset="all",
            release=releases.MMLU,
        ),
        run=TaskSet(tuple(tasks), CHOSEN, "mmlu/default", local_rows=read, shots=5, details=tasks).run,
        **fields,
    )


MMLU = _mmlu(
    ("test/*_test.csv",),
    {subject: (group, subject) for group, subjects in MMLU_GROUPS.items() for subject in subjects},
    name="mmlu",
    title="MMLU: 57 subjects, 4 choices, 5-shot",
    groups=("general", "paper-table-2", "paper-table-6"),
    size=14_042,
    needs=("likelihood", "gpu-advised"),
)
_SIZES = {"stem": 3_153, "social_sciences": 3_077, "humanities": 4_705}
MMLU_PARTS = tuple(
    _mmlu(
        tuple(f"test/{subject}_test.csv" for subject in MMLU_GROUPS[group]),
        {subject: (subject,) for subject in MMLU_GROUPS[group]},
        name=f"mmlu-{group.replace('_', '-')}",
        title=f"MMLU's {len(MMLU_GROUPS[group])} subjects of {of}, 5-shot",
        groups=("flowertune-general",),
        size=_SIZES[group],
        needs=("likelihood", "gpu-advised"),
    )
    for group, of in {"stem": "STEM", "social_sciences": "social sciences", "humanities": "humanities"}.items()
)
"""What FlowerTune's board of general language has."""
MMLU_MEDICAL = _mmlu(
    tuple(f"test/{subject}_test.csv" for subject in MEDICAL_SUBJECTS),
    {subject: (subject,) for subject in MEDICAL_SUBJECTS},
    name="mmlu-medical",
    title="MMLU's six medical subjects, 5-shot",
    groups=("medical",),
    size=1_089,
)


def _bbh(folder: str, filter_: str, overrides: Mapping[str, object], **fields: Any) -> Benchmark:
    details = {f"bbh_{folder}_{task}": (task,) for task in BBH_TASKS}
    read = partial(local_rows.bbh, details)
    marks = {("exact_match", filter_): "accuracy"}
    task_set = TaskSet(tuple(details), marks, f"bbh/{folder}", local_rows=read, details=details, overrides=overrides)
    return _generation(
        metrics=(ACCURACY, *_details(BBH_TASKS)),
        size=6_511,
        citation="Suzgun et al. 2022, Challenging BIG-Bench Tasks and Whether Chain-of-Thought Can Solve Them, "
        "2210.09261",
        data=DataSource(
            tuple(f"{task}.json" for task in BBH_TASKS),
            "https://github.com/suzgunmirac/BIG-Bench-Hard",
            ("bbh", "bbh/bbh", "BIG-Bench-Hard/bbh"),
            hub="SaylorTwift/bbh",
            release=releases.BBH,
        ),
        run=task_set.run,
        **fields,
    )


# Behind "A:" a model with a byte-level tokenizer writes " True", which lm-eval's own filter counts as wrong.
_STRIPPED = {"name": "stripped", "filter": [{"function": "remove_whitespace"}, _TAKE_FIRST]}
BBH = _bbh(
    "fewshot",
    "stripped",
    {"filter_list": [_STRIPPED]},
    name="bbh",
    title="BIG-Bench Hard: 27 tasks, 3-shot, answers without reasoning",
    groups=("general", "paper-table-2"),
)
BBH_COT = _bbh(
    "cot_fewshot",
    "get-answer",
    {},
    name="bbh-cot",
    title="BIG-Bench Hard: 27 tasks, 3-shot, with reasoning step by step",
    groups=("general",),
)

DROP = _generation(
    name="drop",
    title="DROP: reading with arithmetic, 3-shot",
    groups=("general", "paper-table-2"),
    metrics=(Metric("f1"), Metric("em")),
    size=9_536,
    citation="Dua et al. 2019, DROP: A Reading Comprehension Benchmark Requiring Discrete Reasoning, arXiv:1903.00161",
    data=DataSource(
        ("drop_dataset_dev.json", "validation.jsonl", "data/validation-*.parquet"),
        "https://allenai.org/data/drop",
        ("drop/drop_dataset", "drop_dataset"),
        hub="EleutherAI/drop",
        split="validation",
        release=releases.DROP,
    ),
    run=TaskSet(
        ("drop",),
        {("f1", "none"): "f1", ("em", "none"): "em"},
        "drop",
        local_rows=local_rows.drop,
        shots=3,
        cluster="passage",
        # lm-eval 0.4.13 joins the names of the answer's fields here, not the answer.
        overrides={"doc_to_target": "{{ answers[0]|join(',') }}"},
    ).run,
)

CRASS = _choice(
    name="crass",
    title="CRASS: counterfactual questions of BIG-bench, 4 choices, 0-shot",
    groups=("general", "paper-table-2"),
    size=44,
    citation="Frohberg and Binder 2022, CRASS: A Novel Data Set and Benchmark to Test Counterfactual Reasoning of "
    "Large Language Models, arXiv:2112.11941",
    data=DataSource(
        ("task.json", "crass_examples.json"),
        "https://github.com/google/BIG-bench/tree/main/bigbench/benchmark_tasks/crass_ai",
        ("crass_ai",),
        hub="hails/bigbench",
        subset="crass_ai_zero_shot",
        split="default",
        release=releases.CRASS,
    ),
    run=TaskSet(
        ("bigbench_crass_ai_multiple_choice",), CHOSEN, "bigbench/multiple_choice", local_rows=local_rows.crass
    ).run,
)

GSM8K = _generation(
    name="gsm8k",
    title="GSM8K: grade school mathematics, 8-shot with reasoning, exact number",
    groups=("math", "paper-table-5"),
    metrics=(ACCURACY, Metric("accuracy-strict")),
    size=1_319,
    citation="Cobbe et al. 2021, Training Verifiers to Solve Math Word Problems, arXiv:2110.14168",
    data=DataSource(
        ("test.jsonl", "main/test-*.parquet"),
        "https://github.com/openai/grade-school-math",
        ("grade-school-math/grade_school_math/data",),
        hub="openai/gsm8k",
        subset="main",
        release=releases.GSM8K,
    ),
    run=TaskSet(
        ("gsm8k_cot",),
        # The last number of an answer; strict: the number behind "The answer is", as in the examples.
        {("exact_match", "flexible-extract"): "accuracy", ("exact_match", "strict-match"): "accuracy-strict"},
        "gsm8k",
        local_rows=local_rows.gsm8k,
    ).run,
)

MATH = _generation(
    name="math",
    title="MATH: competition mathematics, 0-shot, equal answers after normalisation",
    groups=("math",),
    metrics=(
        ACCURACY,
        Metric("accuracy-unboxed", is_detail=True),
        *_details([task.removeprefix("hendrycks_math_") for task in local_rows.MATH_TASKS.values()]),
    ),
    size=5_000,
    citation="Hendrycks et al. 2021, Measuring Mathematical Problem Solving With the MATH Dataset, arXiv:2103.03874",
    data=DataSource(
        ("test/*/*.json", "MATH/test/*/*.json", "test.jsonl"),
        "https://github.com/hendrycks/math",
        ("MATH",),
        hub="EleutherAI/hendrycks_math",
        subset="algebra",
        release=releases.MATH,
    ),
    run=TaskSet(
        tuple(local_rows.MATH_TASKS.values()),
        {("exact_match", "boxed"): "accuracy", ("exact_match", "none"): "accuracy-unboxed"},
        "hendrycks_math",
        local_rows=local_rows.math,
        details={task: (task.removeprefix("hendrycks_math_"),) for task in local_rows.MATH_TASKS.values()},
        overrides={
            "filter_list": [
                {"name": "boxed", "filter": [{"function": "custom", "filter_fn": _unboxed}, _TAKE_FIRST]},
                {"name": "none", "filter": [_TAKE_FIRST]},
            ],
            # lm-eval's own, with room for a solution
            "generation_kwargs": {
                "until": ["Problem:"],
                "do_sample": False,
                "temperature": 0,
                "max_gen_toks": 1024,
            },
        },
    ).run,
)

MEDQA = _choice(
    name="medqa",
    title="MedQA: questions of the US medical licence, 4 choices, 0-shot",
    groups=("medical", "flowertune-medical"),
    size=1_273,
    citation="Jin et al. 2020, What Disease does this Patient Have?, arXiv:2009.13081",
    data=DataSource(
        ("phrases_no_exclude_test.jsonl", "questions/US/4_options/phrases_no_exclude_test.jsonl", "test.jsonl"),
        "https://github.com/jind11/MedQA",
        ("medqa/data_clean", "data_clean"),
        hub="GBaker/MedQA-USMLE-4-options-hf",
    ),
    run=TaskSet(("medqa_4options",), CHOSEN, "medqa", local_rows=local_rows.medqa).run,
)

MEDMCQA = _choice(
    name="medmcqa",
    title="MedMCQA: Indian medical entrance exams, 4 choices, 0-shot, the development part",
    groups=("medical", "flowertune-medical"),
    size=4_183,
    citation="Pal et al. 2022, MedMCQA: A Large-scale Multi-Subject Multi-Choice Dataset, arXiv:2203.14371",
    data=DataSource(
        ("dev.json", "validation.jsonl", "data/validation-*.parquet"),
        "https://github.com/medmcqa/medmcqa",
        hub="openlifescienceai/medmcqa",
        split="validation",
        release=releases.MEDMCQA,
    ),
    run=TaskSet(("medmcqa",), CHOSEN, "medmcqa", local_rows=local_rows.medmcqa).run,
)

PUBMEDQA = _choice(
    name="pubmedqa",
    title="PubMedQA: yes, no or maybe to the question of an abstract, 0-shot",
    groups=("medical", "flowertune-medical"),
    size=500,
    citation="Jin et al. 2019, PubMedQA: A Dataset for Biomedical Research Question Answering, arXiv:1909.06146",
    data=DataSource(
        ("test_set.json", "ori_pqal.json", "pqa_labeled/train-*.parquet", "test.jsonl"),
        "https://github.com/pubmedqa/pubmedqa",
        ("pubmedqa/data",),
        hub="bigbio/pubmed_qa",
        subset="pubmed_qa_labeled_fold0_source",
    ),
    run=TaskSet(("pubmedqa",), CHOSEN, "pubmedqa", local_rows=local_rows.pubmedqa).run,
)

CAREQA = _choice(
    name="careqa",
    title="CareQA: Spanish exams of medicine and nursing in English, 4 choices, 0-shot",
    groups=("medical", "flowertune-medical"),
    size=5_621,
    citation="Arias-Duart et al. 2025, Automatic Evaluation of Healthcare LLMs Beyond Question-Answering, "
    "arXiv:2502.06666",
    data=DataSource(
        ("CareQA_en.json", "CareQA_en/test-*.parquet", "test.jsonl"),
        "https://huggingface.co/datasets/HPAI-BSC/CareQA",
        ("CareQA",),
        hub="HPAI-BSC/CareQA",
        subset="CareQA_en",
    ),
    run=TaskSet(("careqa_en",), CHOSEN, "careqa", local_rows=local_rows.careqa).run,
    takes=(),  # it has no part that examples could come from
)

BENCHMARKS = (
    *(MMLU, *MMLU_PARTS, MMLU_MEDICAL, BBH, BBH_COT, DROP, CRASS, GSM8K, MATH),
    *(MEDQA, MEDMCQA, PUBMEDQA, CAREQA),
)
