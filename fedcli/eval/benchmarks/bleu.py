"""CoNaLa (Yin et al. 2018) and ConCode (Iyer et al. 2018): a line of code from a sentence, scored by BLEU."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from fedcli.errors import ConfigError
from fedcli.eval import releases
from fedcli.eval.benchmark import Benchmark, ItemScore, Metric, Session
from fedcli.eval.benchmarks.code import extract_code, text_of
from fedcli.eval.data import DataSource, Files
from fedcli.tasks.conversation import Turn

MAX_NEW_TOKENS = 256
ORDER = 4
"""The longest n-grams that BLEU counts."""


@dataclass(frozen=True)
class Snippet:
    """A question and the code that answers it."""

    item: str
    question: str
    reference: str
    cluster: str | None = None


def count_ngrams(answer: str, reference: str) -> list[float]:
    """Return what BLEU needs of one answer: n-grams that match, n-grams (n = 1 to 4), length, reference's length."""
    from sacrebleu.metrics.bleu import BLEU

    counted = BLEU().corpus_score([answer], [[reference]])
    return [*counted.counts, *counted.totals, counted.sys_len, counted.ref_len]


def bleu_of_sum(counts: Sequence[float]) -> float:
    """Return the corpus BLEU (0 to 100) of summed counts, as sacrebleu's `corpus_bleu` has it for the same answers."""
    from sacrebleu.metrics.bleu import BLEU

    *ngrams, answers, references = map(round, counts)
    scored = BLEU.compute_bleu(ngrams[:ORDER], ngrams[ORDER:], answers, references, smooth_method="exp")
    return float(scored.score)


def _run(read: Callable[[Files], Iterator[Snippet]], session: Session) -> list[ItemScore]:
    snippets = list(read(session.files))[: session.options.limit]
    answers = session.model.generate(
        [session.generation((Turn("user", row.question),), MAX_NEW_TOKENS) for row in snippets]
    )
    items = []
    for row, answer in zip(snippets, answers, strict=True):
        code = extract_code(answer).strip()
        record = {"prompt": row.question, "answer": answer, "code": code, "expected": row.reference}
        items.append(ItemScore(row.item, {"BLEU": count_ngrams(code, row.reference)}, record, row.cluster))
    return items


def _read_conala(files: Files) -> Iterator[Snippet]:
    for number, row in enumerate(files.rows()):
        intent = text_of(row, "rewritten_intent" if row.fields.get("rewritten_intent") else "intent").strip()
        question = f"Answer the following instructions in one line of Python code:\n{intent}"
        intent_of = row.fields.get("question_id")  # which several rows may put in other words
        cluster = None if intent_of is None else str(intent_of)
        yield Snippet(f"{intent_of}/{number}", question, text_of(row, "snippet"), cluster)


def _read_concode(files: Files) -> Iterator[Snippet]:
    for number, row in enumerate(files.rows()):
        # behind the first separator stand the class's other fields, of which the question makes no use
        intent = text_of(row, "nl").partition("concode_field_sep")[0].strip().removesuffix(".").strip()
        question = f"Answer the following instructions in a one line of Java code:\n{intent}"
        reference = text_of(row, "code")
        if not reference.strip():
            raise ConfigError(
                f"{row.where}: 'code' is empty, as in CodeXGLUE's test file", hint="Use its dev.json, which has code."
            )
        yield Snippet(str(number), question, reference)


_benchmark = partial(
    Benchmark, groups=("code",), metrics=(Metric("BLEU", unit="BLEU", of_sum=bleu_of_sum),), packages=("sacrebleu",)
)
BENCHMARKS = (
    _benchmark(
        name="conala",
        title="CoNaLa: a line of Python from a sentence",
        size=500,
        citation="Yin et al. 2018, Learning to Mine Aligned Code and Natural Language Pairs, arXiv 1805.08949",
        data=DataSource(
            files=("conala-test.json", "conala-corpus/conala-test.json"),
            url="https://conala-corpus.github.io",
            hub="neulab/conala",
            revision="refs/convert/parquet",
            release=releases.CONALA,
        ),
        run=partial(_run, _read_conala),
    ),
    _benchmark(
        name="concode",
        title="ConCode: a Java method from a sentence (CodeXGLUE's development part: its test part has no answers)",
        size=2000,
        citation="Iyer et al. 2018, Mapping Language to Code in Programmatic Context, arXiv 1808.09588",
        data=DataSource(
            files=("dev.json", "concode/dev.json"),
            url="https://github.com/microsoft/CodeXGLUE/tree/main/Text-Code/text-to-code/dataset/concode",
            hub="google/code_x_glue_tc_text_to_code",
            split="validation",
            release=releases.CONCODE,
        ),
        run=partial(_run, _read_concode),
    ),
)
