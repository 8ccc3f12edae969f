"""`fedcli chat`: what it prints is what transformers and PEFT alone generate from the same adapters and prompts."""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.handmade import drop, merge
from support.models import TINY, load_plain
from support.processes import ENVIRONMENT, SMALL, Run, command, fedcli, run_ok, runner, settings

from fedcli import Federation
from fedcli.data.templates import alpaca
from fedcli.errors import ConfigError
from fedcli.eval.streaming import Pieces
from fedcli.model.library_logging import quiet_libraries
from fedcli.workspace.layout import ADAPTER_CONFIG_NAME, Workspace

PROMPT = "Give the alert level, green to red. The barley wilts."
TOKENS = 24


@pytest.fixture(scope="module")
def federation(small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation whose round 1 and whose client 2's update of it hold random numbers: nothing was trained."""
    folder = Path(shutil.copytree(small_template, tmp_path_factory.mktemp("chat") / "W"))
    merge(Workspace(folder), {0: 1.0, 1: 1.0})
    drop(Workspace(folder), 2)
    return folder


@pytest.fixture(scope="module")
def with_baselines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The like with two clients that were trained alone, and all rows pooled, at a rate that changes answers."""
    folder = tmp_path_factory.mktemp("baselines")
    run_ok("init", *settings(*SMALL, "train.learning_rate=0.1"), cwd=folder)
    for arguments in (("train-alone", "--id", 1), ("train-alone", "--id", 2), ("train-pooled",)):
        run_ok(*arguments, cwd=folder)
    merge(Workspace(folder), {0: 1.0, 1: 1.0})
    drop(Workspace(folder), 2)
    return folder


def generated(adapter: Path | None, text: str, *, has_start: bool = True) -> tuple[str, int, int]:
    """Return what transformers alone generates greedily behind a text, without white space, and numbers of tokens."""
    model, tokenizer = load_plain(TINY)
    model = model.float()
    with quiet_libraries(), torch.inference_mode():
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter)).eval()
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=has_start)["input_ids"]
        out = model.generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(out, skip_special_tokens=True).strip(), ids.shape[1], len(out)


def in_layout(workspace: Path, weights: Path, folder: Path) -> Path:
    """Put an adapter's weights into PEFT's layout."""
    folder.mkdir()
    shutil.copy(weights, folder / "adapter_model.safetensors")
    shutil.copy(workspace / "rounds/00000" / ADAPTER_CONFIG_NAME, folder / "adapter_config.json")
    return folder


def test_an_answer_is_what_transformers_alone_generates_with_the_round(federation: Path) -> None:
    text, num_prompt, num_tokens = generated(federation / "rounds/00001/adapter", alpaca(PROMPT))
    assert run_ok("chat", PROMPT, "--max-new-tokens", TOKENS, cwd=federation) == {
        "prompt": PROMPT,
        "answers": [
            {
                "target": "round-00001",
                "text": text,
                "num_prompt_tokens": num_prompt,
                "num_tokens": num_tokens,
                "is_cut": True,
                "prompt_is_cut": False,
            }
        ],
        "settings": {"system": None, "max_new_tokens": TOKENS, "temperature": 0.0, "seed": 0},
        "notes": [],
    }


@pytest.mark.slow
def test_a_prompt_of_several_lines_comes_by_stdin(federation: Path) -> None:
    several = f"{PROMPT}\nThink of two lines."
    text, _, _ = generated(None, alpaca(several))
    done = fedcli("chat", "--base", cwd=federation, input=f"{several}\n", timeout=300)
    assert (done.returncode, done.stdout) == (0, f"{text}\n"), done.stderr


@pytest.mark.slow
def test_base_alone_and_federated_are_compared_with_one_loaded_base(with_baselines: Path, tmp_path: Path) -> None:
    rounds, baselines = with_baselines / "rounds", with_baselines / "baselines"
    alone = in_layout(with_baselines, next((baselines / "alone-1").rglob("*.safetensors")), tmp_path / "alone")
    pooled = in_layout(with_baselines, next((baselines / "pooled").rglob("*.safetensors")), tmp_path / "pooled")
    update = next((with_baselines / "inbox/2/round-00001").glob("*.safetensors"))
    client = in_layout(with_baselines, update, tmp_path / "client")
    adapters = {"base": None, "alone-1": alone, "pooled": pooled, "client-2-round-00001": client}
    adapters |= {"round-00000": rounds / "00000/adapter", "round-00001": rounds / "00001/adapter"}
    wanted = {name: generated(adapter, alpaca(PROMPT))[0] for name, adapter in adapters.items()}

    def asked(*arguments: object) -> tuple[dict[str, str], list[str]]:
        found = run_ok("chat", PROMPT, "--max-new-tokens", TOKENS, *arguments, cwd=with_baselines)
        return {answer["target"]: answer["text"] for answer in found["answers"]}, found["notes"]

    names = ("base", "alone-1", "round-00001")
    notes = ["client 1 answers, of 2 that were trained alone; --alone N: another"]
    assert asked("--compare") == ({name: wanted[name] for name in names}, notes)
    named = ("--pooled", "--client", 2, "--alone", 1, "--round", 0)
    names = ("base", "alone-1", "pooled", "client-2-round-00001", "round-00000")
    untrained = "round 0's adapter is not trained yet: it answers as the base does"
    assert asked("--compare", *named) == ({name: wanted[name] for name in names}, [untrained])
    assert wanted["round-00000"] == wanted["base"]
    assert asked("--alone", 1) == ({"alone-1": wanted["alone-1"]}, [])
    done = fedcli("chat", PROMPT, "--compare", "--max-new-tokens", TOKENS, cwd=with_baselines)
    assert f"round-00001: the answer is cut at {TOKENS} tokens (--max-new-tokens)\n" in done.stderr
    assert len(set(wanted.values())) >= 4, "models that answer alike would prove nothing"
    parts = [f"--- {name} ---\n{wanted[name]}\n" for name in ("base", "alone-1", "round-00001")]
    assert done.stdout == "\n".join(parts)


@pytest.mark.slow
def test_sampled_answers_depend_on_the_seed_alone(federation: Path) -> None:
    def sampled(*arguments: object) -> str:
        found = run_ok("chat", PROMPT, "--temperature", 1.5, "--max-new-tokens", TOKENS, *arguments, cwd=federation)
        return str(found["answers"][0]["text"])

    assert sampled() == sampled("--seed", 0)
    assert sampled() != sampled("--seed", 1)


@pytest.mark.slow
def test_a_system_turn_takes_the_place_of_the_templates_own(federation: Path) -> None:
    text = alpaca(PROMPT)
    own = "Answer with one colour."
    wanted, _, _ = generated(None, own + text[text.index("\n\n") :])
    found = run_ok("chat", PROMPT, "--base", "--system", own, "--max-new-tokens", TOKENS, cwd=federation)
    assert found["answers"][0]["text"] == wanted


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--round", 7, "hi"], 6, "there is no round 7 yet: the latest is 1"),
        (["--client", 3, "hi"], 2, "there is no client 3"),
        (["--alone", 0, "hi"], 2, "there is no baseline alone-0"),
        (["--base", "--round", 0, "hi"], 2, "2 models are named: base, round-00000"),
        (["--seed", 1, "hi"], 2, "--seed changes nothing of greedy answers"),
        (["  "], 2, "the prompt is empty"),
    ],
)
def test_a_mistake_is_told_before_a_model_is_loaded(
    federation: Path, run: Run, arguments: list[object], code: int, message: str
) -> None:
    found, out, err = run("chat", "-w", federation, *arguments)
    assert (found, out) == (code, "")
    assert err.startswith(f"fedcli: error: {message}\n  ")


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Run:
    return runner(capsys)


@pytest.mark.slow
def test_a_round_whose_adapter_gc_has_removed_is_named(federation: Path, tmp_path: Path) -> None:
    workspace = Path(shutil.copytree(federation, tmp_path / "W"))
    merge(Workspace(workspace), {0: 1.0})
    with (workspace / "fedcli.yaml").open("a") as file:
        file.write("retention: {keep_last: 1}\n")
    assert fedcli("gc", cwd=workspace).returncode == 0
    done = fedcli("chat", "hi", "--round", 1, cwd=workspace)
    assert done.returncode == 4
    assert "round 1's adapter/adapter_model.safetensors was removed by `fedcli gc`" in done.stderr


@pytest.mark.slow
def test_a_template_that_cannot_write_it_is_refused(tmp_path: Path) -> None:
    """The base's chat template refuses a system turn and a second prompt; one prompt at a time is fine."""
    base = Path(shutil.copytree(TINY, tmp_path / "base"))
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\nA:{% else %} {{ m['content'] }}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    )
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    run_ok("init", "W", *settings(*SMALL, f"model.base={base}", "data.template=chat"), cwd=tmp_path)
    workspace = tmp_path / "W"
    found = run_ok("chat", "hi", "--base", "--max-new-tokens", TOKENS, cwd=workspace)
    assert found["answers"][0]["text"] == generated(None, "Q: hi\nA:", has_start=False)[0]
    done = fedcli("chat", "hi", "--base", "--system", "Be kind.", cwd=workspace)
    assert done.returncode == 3
    assert "does not write a system turn" in done.stderr
    with pytest.raises(ConfigError, match=r"does not write a second prompt.*one question only") as raised:
        Federation.open(workspace).chat()
    assert "fedcli chat PROMPT" in raised.value.hint


def test_pieces_are_whole_characters_and_make_the_text_that_is_decoded_at_the_end() -> None:
    def decode(tokens: list[int]) -> str:
        """Bytes, cleaned up as some tokenizers do."""
        return bytes(tokens).decode(errors="replace").replace(" n't", "n't").replace(" .", ".")

    told: list[str] = []
    text = "I do n't know über 日本語, 🙂 . And\n  more "
    pieces = Pieces(decode, told.append)
    pieces.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for byte in text.encode():
        pieces.put(torch.tensor([byte]))
    pieces.end()
    assert "".join(told) == decode(list(text.encode()))
    assert "".join(told).startswith("I don't know")
    assert len(told) > 9
    assert not any("\ufffd" in piece for piece in told)


# On a terminal


class Terminal:
    """A session of `fedcli chat` on a terminal of its own."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.process, self._terminal = pty.fork()
        if self.process == 0:
            os.chdir(folder)
            size = {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
            os.execve(sys.executable, command("chat", *arguments), ENVIRONMENT | size)
        self._shown = b""

    def type(self, text: str) -> None:
        os.write(self._terminal, f"{text}\n".encode())

    def until(self, text: str) -> str:
        """Return what is shown up to a text, without what steers the terminal; else fail with what there was."""
        while True:
            plain = re.sub(r"\x1b[\[?][0-9;?]*[A-Za-z]", "", self._shown.decode(errors="replace")).replace("\r", "")
            if text and text in plain:
                self._shown = b""
                return plain
            if not select.select([self._terminal], [], [], 300)[0]:
                raise AssertionError(f"{text!r} is not shown, but: {plain}")
            try:
                self._shown += os.read(self._terminal, 4096)
            except OSError:  # how a terminal ends whose process has left
                assert not text, plain
                return plain

    def code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.mark.slow
def test_a_session_of_two_turns_remembers_the_first_until_it_is_cleared(federation: Path) -> None:
    first, _, _ = generated(None, alpaca(PROMPT))
    turn = "### Instruction:\nAnd now?\n\n### Response:"
    second, _, _ = generated(None, f"{alpaca(PROMPT)} {first}</s>{turn}")
    alone, _, _ = generated(None, alpaca("And now?"))
    session = Terminal(federation, "--base")
    session.until(">>> ")
    session.type(PROMPT)
    assert first in session.until(">>> ")
    session.type("And now?")
    assert f"\n{second}\n" in session.until(">>> ")
    session.type("/clear")
    session.until(">>> ")
    session.type("And now?")
    assert f"\n{alone}\n" in session.until(">>> ")
    session.type("a </s> b" * 400)  # too long for the model
    assert "its beginning was left out" in session.until(">>> ")
    session.type("/exit")
    assert "Traceback" not in session.until("")
    assert session.code() == 0


@pytest.mark.slow
def test_answers_stand_in_columns_where_the_terminal_is_wide_enough(with_baselines: Path) -> None:
    session = Terminal(with_baselines, PROMPT, "--compare", "--alone", 2, "--max-new-tokens", 3)
    shown = session.until("")
    assert session.code() == 0
    assert re.search(r"base +alone-2 +round-00001", shown) is not None, shown
    assert "---" not in shown


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_an_answer_ends_it_with_130_and_without_a_traceback(federation: Path) -> None:
    """The answer is longer than the pipe holds: it cannot be finished while nobody reads."""
    process = subprocess.Popen(
        command("chat", PROMPT, "--round", 1, "--round", 0, "--compare"),
        cwd=federation,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 130
    assert b"Traceback" not in told
    assert told.decode().endswith("stopped\n")
