"""torch in a process that was forked from one which had used it: the race of its thread pool, and what is said."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ENVIRONMENT

from fedcli.errors import RequirementError
from fedcli.model.loading import loading

FORKS = """
import os, sys, threading
import torch

torch.set_num_threads(1)
torch.ones(2**18).exp()
told = 0
for _ in range(int(sys.argv[1])):
    reader, writer = os.pipe()
    if os.fork() == 0:
        from fedcli.errors import RequirementError
        from fedcli.model.loading import loading
        errors, barrier = [], threading.Barrier(8)

        def load():
            barrier.wait()
            try:
                with loading("base"):
                    torch.ones(2**18).exp()
            except RequirementError as error:
                errors.append(error.message)

        threads = [threading.Thread(target=load) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        os.write(writer, "\\n".join(errors[:1]).encode())
        os._exit(0)
    os.close(writer)
    os.wait()
    with os.fdopen(reader) as said:
        message = said.read()
    if message:
        told += 1
        assert "Invalid thread pool" in message and "whose files are not at fault" in message, message
print(told)
"""


@pytest.mark.parametrize(
    "problem",
    [
        'pool INTERNAL ASSERT FAILED at "ParallelOpenMP.cpp":64, please report a bug to PyTorch. Invalid thread pool!',
        "CUDA error: device-side assert triggered",
        "Cannot re-initialize CUDA in forked subprocess. Use 'spawn'",
        "can't start new thread",
        "No CUDA GPUs are available",
    ],
)
def test_what_torch_itself_fails_at_is_not_blamed_on_the_models_folder(problem: str) -> None:
    with pytest.raises(RequirementError, match="whose files are not at fault") as error, loading("base"):
        raise RuntimeError(problem)
    assert "Check that the folder is whole" not in error.value.hint


@pytest.mark.parametrize("problem", ["Error(s) in loading state_dict", "unexpected EOF, the file might be corrupted"])
def test_what_the_model_is_at_fault_of_is_still_blamed_on_it(problem: str) -> None:
    with pytest.raises(RequirementError, match="the base model base cannot be loaded"), loading("base"):
        raise RuntimeError(problem)


@pytest.mark.slow
def test_the_race_of_torchs_threads_in_forked_processes_is_never_told_as_a_fault_of_the_model() -> None:
    """Of 300 children of a parent with a thread pool about 18 met it here; not one need meet it for this test."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS, "15"], env=ENVIRONMENT, cwd=Path(__file__).parent, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
