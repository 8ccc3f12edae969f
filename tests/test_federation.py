"""Whole federations of real processes: the demo's commands, real rows, concurrency, and the warm path."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.federation import adapter_hashes
from support.processes import ENVIRONMENT, command, fedcli, run_ok, settings

ADAPTER = "adapter/adapter_model.safetensors"
TEST_DATA = Path(os.environ.get("FEDCLI_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.mark.slow
def test_a_newcomers_commands_run_the_first_round(tmp_path: Path) -> None:
    assert run_ok("init", cwd=tmp_path)["cohort"] == [0, 1, 2, 3, 4]
    first = run_ok("client", "train", "--id", 3, cwd=tmp_path)
    assert (first["status"], first["steps"], first["num_samples"]) == ("submitted", 10, 240)
    assert run_ok("client", "train", "--id", 3, cwd=tmp_path)["status"] == "already_submitted"
    early = fedcli("server", "aggregate", cwd=tmp_path)
    assert early.returncode == 6
    assert "0, 1, 2, 4" in early.stderr
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda client: run_ok("client", "train", "--id", client, cwd=tmp_path), [0, 1, 2, 4]))
    merged = run_ok("server", "aggregate", cwd=tmp_path)
    assert [entry["client"] for entry in merged["aggregation"]["counted"]] == [0, 1, 2, 3, 4]
    status = run_ok("status", cwd=tmp_path)
    assert (status["round"], status["missing"]) == (1, [0, 1, 2, 3, 4])
    assert status["last_losses"]["3"] == pytest.approx(first["train_loss"])
    assert run_ok("verify", cwd=tmp_path)["violations"] == []


@pytest.mark.slow
def test_the_warm_run_equals_separate_processes_bit_for_bit(small: Path, tmp_path: Path) -> None:
    """Two workspaces of one configuration, and so of different ids: every adapter of every round is the same."""
    separate = tmp_path / "separate"
    separate.mkdir()
    (separate / "fedcli.yaml").write_bytes((small / "fedcli.yaml").read_bytes())
    run_ok("init", cwd=separate)
    for _ in range(2):
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda client: run_ok("client", "train", "--id", client, cwd=separate), range(3)))
        run_ok("server", "aggregate", cwd=separate)
    nothing = {"left_out": {}, "notes": {}, "first_cases": {}, "unused": {}}
    assert run_ok("run", cwd=small) == {**nothing, "num_merged": 2, "round": 2, "state": "finished"}
    assert adapter_hashes(small) == adapter_hashes(separate)
    assert len(set(adapter_hashes(small))) == 3


@pytest.mark.slow
def test_run_goes_on_after_sigint_and_sigkill_and_ends_where_an_undisturbed_run_does(
    small: Path, tmp_path: Path
) -> None:
    config = small / "fedcli.yaml"  # long enough that it cannot finish before the signal is sent
    config.write_text(config.read_text().replace("rounds: 2", "rounds: 15"))
    undisturbed = tmp_path / "undisturbed"
    subprocess.run(["cp", "-r", small, undisturbed], check=True)
    run_ok("run", cwd=undisturbed)
    interrupted = subprocess.Popen(
        command("run"),
        cwd=small,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        # Background jobs of a shell ignore SIGINT, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: (small / "inbox/0/round-00000").exists())
    interrupted.send_signal(signal.SIGINT)
    assert interrupted.wait(60) == 130
    assert "Traceback" not in interrupted.stderr.read()
    interrupted.stderr.close()
    killed = subprocess.Popen(command("run"), cwd=small, env=ENVIRONMENT)
    wait_until(lambda: (small / "rounds/00001").exists())
    killed.kill()
    killed.wait(60)
    run_ok("run", cwd=small)
    assert adapter_hashes(small) == adapter_hashes(undisturbed)
    assert run_ok("verify", cwd=small)["violations"] == []


def wait_until(condition, seconds: float = 300) -> None:
    """Wait for something to happen on disk."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def start_many(number: int, *arguments: object, cwd: Path) -> list[subprocess.Popen[str]]:
    """Start the same command several times at once."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command(*arguments), cwd=cwd, env=ENVIRONMENT, **pipes) for _ in range(number)]


def outcomes(processes: list[subprocess.Popen[str]], *, allowed: set[int]) -> list[str]:
    """Return the statuses of the processes that succeeded; the others may only have been busy or too early."""
    results = [(*process.communicate(timeout=200), process.returncode) for process in processes]
    assert {code for _, _, code in results} <= allowed, results
    return [json.loads(out)["status"] for out, _, code in results if code == 0]


@pytest.mark.slow
def test_twelve_trainers_of_one_client_and_four_servers_make_one_update_and_one_round(small: Path) -> None:
    for client in (0, 2):
        run_ok("client", "train", "--id", client, cwd=small)
    trainers = start_many(12, "client", "train", "--id", 1, "--json", cwd=small)
    wait_until(lambda: (small / "inbox/1/round-00000").exists())
    servers = start_many(4, "server", "aggregate", "--json", cwd=small)
    assert outcomes(trainers, allowed={0, 5}).count("submitted") == 1
    assert outcomes(servers, allowed={0, 5, 6}).count("published") == 1
    assert sorted(path.name for path in (small / "rounds").iterdir()) == ["00000", "00001"]
    assert os.listdir(small / "inbox/1") == ["round-00000"]
    assert run_ok("verify", cwd=small)["violations"] == []


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local Llama folder: config, byte-level BPE tokenizer trained on the rows, random weights."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rows = json.loads((TEST_DATA / "alpaca/alpaca_1805.json").read_text())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((row["instruction"] + " " + row["output"] for row in rows), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not TEST_DATA.is_dir(), reason="no folder of public rows ($FEDCLI_TEST_DATA)")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_real_rows_train_for_three_rounds_as_separate_processes(llama: Path, tmp_path: Path) -> None:
    overrides = (
        f"data.source={TEST_DATA / 'alpaca/alpaca_1805.json'}", "data.partition=iid", f"model.base={llama}",
        "federation.clients=3", "federation.per_round=2", "federation.rounds=3", "train.learning_rate=1e-2",
        "train.learning_rate_min=1e-3", "train.batch_size=8", "train.steps=6", "train.max_length=256",
        "adapter.target_modules=[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]",
    )  # fmt: skip
    run_ok("init", *settings(*overrides), cwd=tmp_path)
    shares = [len((tmp_path / f"data/client-{client}.jsonl").read_text().splitlines()) for client in range(3)]
    assert sorted(shares) == [600, 600, 601]  # 4 of 1805 have no response
    assert json.loads((tmp_path / "data/card.json").read_text())["left_out"] == {"empty response": 4}
    losses = []
    for number in range(3):
        cohort = run_ok("status", cwd=tmp_path)["cohort"]
        assert len(cohort) == 2
        with ThreadPoolExecutor(2) as pool:
            done = list(pool.map(lambda client: run_ok("client", "train", "--id", client, cwd=tmp_path), cohort))
        losses.append(math.fsum(result["train_loss"] for result in done) / 2)
        assert {result["status"] for result in done} == {"submitted"}
        assert all(result["num_samples"] + result["num_unusable"] == shares[result["client"]] for result in done)
        assert any(result["num_truncated"] for result in done)
        assert run_ok("server", "aggregate", cwd=tmp_path)["round"] == number + 1
    assert losses[2] < losses[0] - 0.2, losses
    assert run_ok("status", cwd=tmp_path)["state"] == "finished"

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(llama)
    tuned = PeftModel.from_pretrained(base, tmp_path / "rounds/00003/adapter")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), tuned.disable_adapter():
        plain = tuned(ids).logits
    with torch.no_grad():
        assert not torch.equal(tuned(ids).logits, plain)


@pytest.mark.slow
def test_rows_of_ones_own_and_a_config_of_ones_own_need_no_preset(tmp_path: Path) -> None:
    (tmp_path / "fedcli.yaml").write_text(
        "model: {base: 'builtin:tiny'}\nfederation: {clients: 2, rounds: 1}\ntrain: {steps: 1, batch_size: 2}\n"
    )
    (tmp_path / "data").mkdir()
    for client in range(2):
        row = {"instruction": f"Say {client}", "input": "", "output": "no"}
        (tmp_path / f"data/client-{client}.jsonl").write_text(json.dumps(row) + "\n")
    run_ok("init", cwd=tmp_path)
    assert run_ok("run", cwd=tmp_path)["state"] == "finished"


@pytest.mark.slow
def test_train_alone_goes_on_where_it_was_killed(small: Path, tmp_path: Path) -> None:
    """The baseline's adapter is that of an undisturbed run, and a federation of that client alone."""
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", small, other], check=True)
    run_ok("train-alone", "--id", 1, cwd=other)
    process = subprocess.Popen(command("train-alone", "--id", 1), cwd=small, env=ENVIRONMENT)
    wait_until(lambda: (small / "private/1/baseline.safetensors").exists())
    process.kill()
    process.wait(60)
    run_ok("train-alone", "--id", 1, cwd=small)
    relative = f"baselines/alone-1/{ADAPTER}"
    assert (small / relative).read_bytes() == (other / relative).read_bytes()
    assert not (small / "private/1/baseline.safetensors").exists()
    again = run_ok("train-alone", "--id", 1, cwd=small)
    assert (again["status"], again["name"]) == ("exists", "alone-1")
    # A baseline of other settings is no baseline of this federation: it is trained anew.
    config = small / "fedcli.yaml"
    config.write_text(config.read_text().replace("rounds: 2", "rounds: 1"))
    assert run_ok("train-alone", "--id", 1, cwd=small)["status"] == "trained"
    assert (small / relative).read_bytes() != (other / relative).read_bytes()


@pytest.mark.slow
def test_a_damaged_baseline_is_a_violation_and_is_not_scored(small: Path) -> None:
    run_ok("train-alone", "--id", 2, cwd=small)
    assert run_ok("verify", cwd=small)["num_baselines"] == 1
    damaged = small / f"baselines/alone-2/{ADAPTER}"
    contents = bytearray(damaged.read_bytes())
    contents[-1] ^= 1
    damaged.write_bytes(contents)
    assert fedcli("verify", cwd=small).returncode == 7
    assert fedcli("eval", "demo", "--alone", 2, cwd=small).returncode == 7


@pytest.mark.slow
def test_run_takes_over_the_client_of_a_trainer_that_dies(small: Path) -> None:
    """Another process holds client 1; it is killed while `run` has nothing else to do."""
    holder = (
        "import sys, time; from pathlib import Path; from fedcli.workspace.locks import hold\n"
        "with hold(Path(sys.argv[1]), 'client 1'): print('held', flush=True); time.sleep(600)"
    )
    lock = small / "private/1/lock"
    other = subprocess.Popen([sys.executable, "-c", holder, lock], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    running = subprocess.Popen(
        command("run", "--rounds", 1, "--json"), cwd=small, env=ENVIRONMENT, stdout=-1, text=True
    )
    wait_until(lambda: (small / "inbox/2/round-00000").exists())
    time.sleep(1)
    assert running.poll() is None
    other.kill()
    other.communicate()
    assert json.loads(running.communicate(timeout=60)[0]) == {
        **{name: {} for name in ("left_out", "notes", "first_cases", "unused")},
        "num_merged": 1,
        "round": 1,
        "state": "open",
    }


@pytest.mark.slow
def test_run_and_a_server_beside_it_finish_together(small: Path) -> None:
    server = subprocess.Popen(command("server", "run"), cwd=small, env=ENVIRONMENT, stdout=-1, stderr=-1, text=True)
    assert run_ok("run", cwd=small)["state"] == "finished"
    assert server.communicate(timeout=60)[0] == "the federation has finished at round 2\n"
    assert run_ok("verify", cwd=small)["violations"] == []


@pytest.mark.slow
def test_progress_goes_to_a_terminal_only(small: Path) -> None:
    """In a pseudo-terminal `run` shows round, client, loss, tokens/s and ETA on stderr; stdout stays clean."""
    import pty

    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command("run", "--rounds", 1), cwd=small, env=ENVIRONMENT | {"COLUMNS": "140", "TERM": "xterm"},
        stdout=subprocess.PIPE, stderr=follower, text=True,
    )  # fmt: skip
    os.close(follower)
    shown = b""
    while True:
        try:
            shown += os.read(leader, 65536)
        except OSError:  # the process closed its side
            break
    os.close(leader)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert out.startswith("merged 1 round; round 1 is open")
    for word in (b"round 0/2 client 2", b"loss ", b"tokens/s", b"ETA", b"mean loss"):
        assert word in shown


def test_a_closed_or_full_stdout_is_no_bug(small: Path) -> None:
    for target, code in (("| head -c 0", 141), ("> /dev/full", 4)):
        line = f"set -o pipefail; {' '.join(command('status', '-w', small))} {target}"
        done = subprocess.run(["bash", "-c", line], env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == code
        assert "Traceback" not in done.stderr
        assert "This is a bug" not in done.stderr


@pytest.mark.slow
def test_an_inbox_that_a_umask_would_hide_is_readable_by_its_group(small: Path) -> None:
    done = fedcli("client", "train", "--id", 1, cwd=small, umask=0o077)
    assert done.returncode == 0, done.stderr
    update = "inbox/1/round-00000"
    paths = ("inbox/1", update, f"{update}/update.json", f"{update}/adapter_model.safetensors", "private/1")
    assert [(small / path).stat().st_mode & 0o777 for path in paths] == [0o750, 0o755, 0o644, 0o644, 0o700]
