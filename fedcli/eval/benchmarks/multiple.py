"""MultiPL-E (Cassano et al. 2022): HumanEval and MBPP, translated into other languages than Python.

A program is a prompt, an answer up to the first stop of the rows, and the row's tests, as the publisher runs it. It has
passed if it ends with status 0 and has got past its tests. The second is fedcli's own: an answer that ends the program
with status 0 before its tests passes with the publisher.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from fedcli.data.file_rows import Row
from fedcli.errors import ConfigError
from fedcli.eval.benchmark import Benchmark, ItemScore, Session
from fedcli.eval.benchmarks.code import Problem, code_benchmark, solve, text_of
from fedcli.eval.data import DataSource
from fedcli.eval.programs import require_programs
from fedcli.eval.sandbox import Program

SECONDS = 90.0
"""For compiler and program together; a compiler takes ten seconds on a machine under load."""
RUN_SECONDS = 15.0
"""For the program alone, as the publisher's harness gives it."""
_MARK = "@MARK@"
_DRIVER = """
import ctypes, secrets, subprocess
ctypes.CDLL(None).prctl(4, 0)  # what is run may not look into this process
mark = secrets.token_hex()
with open({file!r}, "w", encoding="utf-8", errors="replace") as file:
    file.write({code!r} + {before!r} + {statement!r}.replace({placeholder!r}, mark) + {after!r})
for command, seconds in {commands!r}:
    with open("output.txt", "wb") as output:
        try:
            status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{{command[0]}}: it had not ended after {{seconds:g}} seconds")
    with open("output.txt", encoding="utf-8", errors="replace") as output:
        said = output.read()
    print(said.replace(mark, "")[-2000:])
    if status.returncode:
        raise SystemExit(f"{{command[0]}}: status {{status.returncode}}")
if mark not in said:
    raise SystemExit("it ended before its tests did")
"""
"""Writes the program, which says a secret word behind its tests, and runs it in the sandbox."""


@dataclass(frozen=True)
class Language:
    """A language of MultiPL-E, and how a program in it is run."""

    name: str
    """Its suffix in the names of the data sets."""
    title: str
    programs: tuple[str, ...]
    commands: tuple[tuple[tuple[str, ...], float], ...]
    """Each with its seconds; the last one runs the program."""
    file: str
    statement: str
    """Says the mark behind the tests."""
    is_in_main: bool = False
    """Whether the tests end with the brace of their function, before which the statement stands."""

    def program(self, code: str, tests: str) -> Program:
        """Return the program that runs code and tests in the sandbox."""
        before, after = f"\n{tests}\n", ""
        if self.is_in_main:
            head, brace, tail = tests.rpartition("}")
            before, after = f"\n{head}", brace + tail
        return Program(
            _DRIVER.format(
                file=self.file,
                code=code,
                before=before,
                statement=self.statement,
                placeholder=_MARK,
                after=after,
                commands=self.commands,
            )
        )


LANGUAGES = (
    Language(
        "js",
        "JavaScript",
        ("node",),
        ((("node", "program.js"), RUN_SECONDS),),
        "program.js",
        f'require("node:fs").writeSync(1, "{_MARK}\\n");\n',
    ),
    Language(
        "cpp",
        "C++",
        ("g++",),
        ((("g++", "program.cpp", "-o", "program", "-std=c++17"), SECONDS), (("./program",), RUN_SECONDS)),
        "program.cpp",
        f'    std::puts("{_MARK}"); std::fflush(stdout);\n',
        is_in_main=True,
    ),
    Language(
        "sh",
        "Bash",
        ("bash",),
        ((("bash", "program.sh"), RUN_SECONDS),),
        "program.sh",
        f'status=$?; builtin printf "%s\\n" "{_MARK}"; builtin exit $status\n',
    ),
)
"""Those that the sandbox can run with what a distribution packages: Perl's and Java's tests need libraries more."""


def _run(language: Language, session: Session) -> list[ItemScore]:
    if session.run_code is not None:
        require_programs(session.files.benchmark, language.programs)
    rows = list(session.files.rows())
    stop = _stops(rows[0]) if rows else ()
    return solve(lambda _: _problems(language, rows), session, stop=stop, seconds=SECONDS)


def _problems(language: Language, rows: Sequence[Row]) -> Iterator[Problem]:
    """Yield the prompts without the blank around them, which no template writes."""
    for row in rows:
        name, of, prompt, tests = (text_of(row, column) for column in ("name", "language", "prompt", "tests"))
        if of != language.name or (language.is_in_main and "}" not in tests):
            raise ConfigError(
                f"{row.where} is not as published: its 'language' is {of!r}, and it should be {language.name!r}, with "
                "tests of that language",
                hint="Get the publisher's file again.",
            )
        yield Problem(name, prompt.strip(), partial(_program, language, prompt.strip(), tests))


def _program(language: Language, prompt: str, tests: str, answer: str) -> Program:
    return language.program(f"{prompt}{answer}", tests)


def _stops(row: Row) -> tuple[str, ...]:
    stops = row.fields.get("stop_tokens")
    if not isinstance(stops, list | tuple) or not stops or not all(isinstance(each, str) and each for each in stops):
        raise ConfigError(f"{row.where}: 'stop_tokens' is no list of texts", hint="Get the publisher's file again.")
    return tuple(stops)


def _benchmark(language: Language, source: str, size: int, groups: tuple[str, ...]) -> Benchmark:
    """Return the benchmark of one language; `source` is what was translated, humaneval or mbpp."""
    subset = f"{source}-{language.name}"
    return code_benchmark(
        name=f"multiple-{language.name}" if source == "humaneval" else f"multiple-{subset}",
        title=f"MultiPL-E: {'HumanEval' if source == 'humaneval' else 'MBPP'} in {language.title}",
        groups=groups,
        size=size,
        citation="Cassano et al. 2022, MultiPL-E: A Scalable and Extensible Approach to Benchmarking Neural Code "
        "Generation, arXiv 2208.08227",
        data=DataSource(
            files=(f"{subset}/test-*.parquet", f"{subset}.jsonl*", f"{subset}-reworded.json*"),
            url="https://huggingface.co/datasets/nuprl/MultiPL-E",
            folders=("multiple", "MultiPL-E", "MultiPL-E/prompts"),
            hub="nuprl/MultiPL-E",
            subset=subset,
        ),
        run=partial(_run, language),
        takes=("max_new_tokens", "samples", "temperature"),
        programs=language.programs,
    )


_JS, _CPP, _SH = LANGUAGES
BENCHMARKS = (
    _benchmark(_JS, "humaneval", 161, ("multiple", "flowertune-code")),
    _benchmark(_CPP, "humaneval", 161, ("multiple", "flowertune-code")),
    _benchmark(_SH, "humaneval", 158, ("multiple",)),
    _benchmark(_JS, "mbpp", 397, ("multiple",)),
    _benchmark(_CPP, "mbpp", 397, ("multiple",)),
    _benchmark(_SH, "mbpp", 382, ("multiple",)),
)
