"""The shape of the package, read from its source: layers, light imports, documentation, names, sizes."""

import ast
import shutil
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
    assert (function_of(name).__doc__ or "").splitlines()[0] == COMMANDS[name]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_everything_public_has_a_docstring_but_a_method_may_leave_it_to_the_one_that_it_overrides(
    module: Path, classes: dict[str, list[ast.ClassDef]]
) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    assert module.name == "__init__.py" or module.name == "__main__.py" or ast.get_docstring(tree)
    assert list(undocumented(tree, set(), classes)) == []


@pytest.fixture(scope="module")
def classes() -> dict[str, list[ast.ClassDef]]:
    """The package's classes by name."""
    found: dict[str, list[ast.ClassDef]] = {}
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return found


def undocumented(
    parent: ast.Module | ast.ClassDef, inherited: set[str], classes: dict[str, list[ast.ClassDef]]
) -> Iterator[str]:
    """Yield the public functions, classes and methods of a module that have no docstring, nor inherit one."""
    for node in parent.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None and node.name not in inherited:
                yield node.name
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node, methods_of_bases(node, classes), classes)


def methods_of_bases(node: ast.ClassDef, classes: dict[str, list[ast.ClassDef]]) -> set[str]:
    """Return the names of the methods that the package's classes above a class define."""
    names = (base.value if isinstance(base, ast.Subscript) else base for base in node.bases)
    bases = [found for name in names if isinstance(name, ast.Name) for found in classes.get(name.id, [])]
    own = {method.name for base in bases for method in base.body if isinstance(method, ast.FunctionDef)}
    return own.union(*(methods_of_bases(base, classes) for base in bases))


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert {path.stem for path in PACKAGE.rglob("*")} & drawers == set()


def test_no_test_module_imports_another() -> None:
    modules = sorted(Path(__file__).parent.rglob("*.py"))
    imported = {module.stem: {name.split(".")[0] for name in imports(module)} for module in modules}
    tests = {name for name in imported if name.startswith("test_")} | {"conftest"}
    assert {name: found & tests for name, found in imported.items() if found & tests} == {}


@pytest.mark.parametrize(
    ("module", "wrong", "broken"),
    [
        ("server/merge.py", "import torch", "After round 0 the server reaches no torch"),
        ("server/quorum.py", "from fedcli.client.due import client_status", "rooms side by side"),
        ("training/batches.py", "from fedcli.workspace.layout import Workspace", "know nothing of the workspace"),
        ("algos/fedavg.py", "import torch", "Algorithms are pure"),
        ("client/runtimes.py", "from fedcli.client.due import ClientResult", "No import circle"),
    ],
)
def test_a_wrong_import_breaks_a_contract(tmp_path: Path, module: str, wrong: str, broken: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "fedcli", ignore=shutil.ignore_patterns("__pycache__", "builtin"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "fedcli" / module).open("a") as file:
        file.write(f"\n\ndef _lazily() -> None:\n    {wrong}\n")
    linter = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.run(linter, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1, process.stdout + process.stderr
    said = " ".join(process.stdout.split())
    assert broken in said
    assert "BROKEN" in said


def test_nothing_takes_a_workspace_beside_what_holds_it() -> None:
    """An opened federation, an experiment and a round know their workspace."""
    holders = {"Experiment", "FederationState", "Round", "Config"}
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                taken = {ast.unparse(each.annotation).strip("'\"") for each in every if each.annotation is not None}
                assert not ("Workspace" in taken and taken & holders), f"{module}: {node.name}"


def test_no_file_in_git_is_over_five_megabytes() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert [path for path in files if path.is_file() and path.stat().st_size > 5_000_000] == []
