"""Commands as processes that start at once: one that has imported torch and the rest forks a process for each.

Each has the user, host name, umask, environment and folder that it is given, and nothing of another's state. Cold it
would import for five seconds.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock

SECONDS = 120
"""A process that takes longer is killed."""


class Warm:
    """Starts the process that forks, with a command line in front of it; a context that ends it."""

    def __init__(self, python: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._one_at_a_time = Lock()
        self._process = subprocess.Popen(
            [*python, "-m", "support.warm"],
            cwd=Path(__file__).parents[1],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Warm":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def __call__(
        self,
        *arguments: object,
        cwd: Path,
        user: int | None = None,
        host: str | None = None,
        umask: int = 0o022,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run `fedcli` with these arguments, or Python's `-c CODE`; `user` is user and group id, without others."""
        request = {
            "arguments": list(map(str, arguments)),
            "cwd": str(cwd),
            "user": user,
            "host": host,
            "umask": umask,
            "environment": self._environment | dict(environment or {}),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._one_at_a_time:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            code, out, err = json.loads(self._process.stdout.readline())
        return subprocess.CompletedProcess(request["arguments"], code, out, err)


class Place:
    """A folder with a workspace `W` in it; commands run in the folder."""

    def __init__(self, folder: Path, warm: Warm) -> None:
        self.folder, self.warm = folder, warm
        self.workspace = folder / "W"

    def __call__(self, *arguments: object, code: int = 0, **options) -> subprocess.CompletedProcess[str]:
        """Run a command, which must end with `code`."""
        environment = {"FEDCLI_WORKSPACE": str(self.workspace), "XDG_DATA_HOME": str(self.folder / "xdg")}
        options.setdefault("cwd", self.folder)
        done = self.warm(*arguments, environment=environment | options.pop("environment", {}), **options)
        assert done.returncode == code, f"{done.returncode}: {done.stdout}{done.stderr}"
        assert (code != 0) == ("fedcli: error: " in done.stderr or "Usage" in done.stderr), done.stderr
        assert "Traceback" not in done.stderr
        return done

    def rows(self, name: str, count: int, word: str = "say", start: int = 0) -> Path:
        """Write rows that are told apart by their numbers."""
        texts = [{"instruction": f"{word} {n}", "output": f"{n} is {word}"} for n in range(start, start + count)]
        return write_rows(self.folder / name, texts)

    def join(self, client: int, data: object, *more: object, code: int = 0, **options):
        home = [] if "--home" in more or options.pop("at_default", False) else ["--home", f"H{client}"]
        return self("client", "join", "--id", client, "--data", data, *home, *more, code=code, **options)

    def train(self, client: int, *more: object, code: int = 0, **options):
        return self("client", "train", "--id", client, *(more or ["--home", f"H{client}"]), code=code, **options)

    def registration(self, client: int) -> dict:
        return json.loads((self.workspace / f"clients/{client}.json").read_bytes())

    def identity(self) -> str:
        return json.loads((self.workspace / "workspace.json").read_bytes())["id"]

    def names(self) -> set[str]:
        """Return all names in the workspace."""
        return {str(path.relative_to(self.workspace)) for path in self.workspace.rglob("*")}


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _import_all() -> None:
    from importlib import import_module

    from fedcli.model.bitsandbytes import without_bitsandbytes

    with without_bitsandbytes():
        for name in (
            "cli",
            "client.runtime",
            "data.encoding",
            "model.lora",
            "training.trainer",
            "eval.local_model",
        ):
            import_module(f"fedcli.{name}")
        for name in ("datasets", "transformers.models.llama.modeling_llama", "safetensors.torch", "rich.progress"):
            import_module(name)
        for name in ("lm_eval.evaluator", "lm_eval.tasks", "openai", "sacrebleu"):
            import_module(name)


def _become(request: dict) -> None:
    signal.alarm(SECONDS)
    if request["host"] is not None:
        socket.sethostname(request["host"])
    if request["user"] is not None:
        os.setgroups([])
        os.setresgid(*[request["user"]] * 3)
        os.setresuid(*[request["user"]] * 3)
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])


def _work(request: dict, out: int, err: int) -> int:
    """Be a process of its own; return its exit code."""
    for descriptor, number in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(descriptor, number)
    _become(request)
    arguments = request["arguments"]
    if arguments[0] == "-c":
        exec(arguments[1], {})
        return 0
    from fedcli.cli import main

    return main(arguments)


def _serve() -> None:
    _import_all()
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    code = _work(json.loads(line), out.fileno(), err.fileno())
                except BaseException:
                    import traceback

                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = [os.pread(file.fileno(), 2**24, 0).decode() for file in (out, err)]
            print(json.dumps([status, *texts]), flush=True)
    os._exit(0)  # torch takes a second to leave


if __name__ == "__main__":
    _serve()
