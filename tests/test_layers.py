"""The shape of the package, read from its source: layers, light imports, documentation, names, sizes."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from support.processes import ENVIRONMENT, command_names

from fedcli.cli import COMMANDS, app, function_of

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fedcli"
MODULES = sorted(PACKAGE.rglob("*.py"))

HEAVY = {"torch", "trl", "transformers", "datasets", "lm_eval", "peft", "accelerate", "bitsandbytes", "numpy"}


def imports(module: Path) -> Iterator[str]:
    """Yield the full name of every import, those inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_algorithms_import_the_standard_library_and_numpy_only() -> None:
    for module in (PACKAGE / "algos").glob("*.py"):
        tops = {name.split(".")[0] for name in imports(module)}
        # A hyperparameter's range is written with annotated_types: names without behaviour, which pydantic reads.
        ranges = {"annotated_types"} if module.name == "hyperparameters.py" else set()
        assert tops - sys.stdlib_module_names <= {"fedcli", "numpy"} | ranges


@pytest.mark.parametrize("arguments", [[], ["--help"], ["client", "train", "--help"]])
def test_the_command_line_starts_without_anything_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, fedcli.cli\n"
        "code = fedcli.cli.main(sys.argv[1:]) if sys.argv[1:] else 0\n"
        f"print(*sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr)\n"
        "sys.exit(code)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr.split() == []


def test_every_command_is_documented() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = " ".join(" ".join(page.read_text(encoding="utf-8").split()) for page in pages)
    names = sorted(command_names(typer.main.get_command(app), "fedcli"))
    assert len(names) >= 12
    assert [name for name in names if name not in text] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_list_of_commands_shows_the_first_line_of_each_ones_help(name: str) -> None:
    assert (function_of(name)().__doc__ or "").splitlines()[0] == COMMANDS[name]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_everything_public_has_a_docstring(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    assert module.name == "__init__.py" or module.name == "__main__.py" or ast.get_docstring(tree)
    assert list(undocumented(tree)) == []


def undocumented(parent: ast.Module | ast.ClassDef) -> Iterator[str]:
    """Yield the public functions, classes and methods of a module that have no docstring."""
    for node in parent.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None:
                yield node.name
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node)


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert {path.stem for path in PACKAGE.rglob("*")} & drawers == set()


def test_no_test_module_imports_another() -> None:
    modules = sorted(Path(__file__).parent.rglob("*.py"))
    imported = {module.stem: {name.split(".")[0] for name in imports(module)} for module in modules}
    tests = {name for name in imported if name.startswith("test_")} | {"conftest"}
    assert {name: found & tests for name, found in imported.items() if found & tests} == {}


def test_no_file_in_git_is_over_five_megabytes() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert [path for path in files if path.is_file() and path.stat().st_size > 5_000_000] == []
