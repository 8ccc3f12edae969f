"""What operators are told before the first round: the calibrated noise, and whether anything is left to learn."""

from pathlib import Path

import pytest
from support.federation import configure, restart
from support.processes import SMALL, Run, runner, settings

from fedcli import Federation
from fedcli.operations.doctor import _privacy
from fedcli.privacy.accounting import gaussian_noise
from fedcli.server.privacy_notes import noise_to_signal
from fedcli.workspace.layout import Workspace


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Run:
    return runner(capsys)


def test_init_prints_the_noise_of_a_target_and_warns_of_noise_that_drowns_everything(tmp_path: Path, run: Run) -> None:
    target = "privacy={unit: client, clip: 1.0, target: {epsilon: 8, delta: 1.0e-5}}"
    code, out, err = run("init", tmp_path / "W", *settings(*SMALL, target))
    assert code == 0, err
    noise = gaussian_noise(8, 1e-5, 2)
    assert f"epsilon 8 at delta 1e-05 for a client of all 2 rounds takes noise {noise:.6g}" in out
    assert "times as long as the mean of the updates can be" in out
    assert "privacy.unit: row or group is for few clients with many rows each" in out
    assert "unit is client, and clip is null" in run("init", tmp_path / "X", *settings("privacy={unit: client}"))[2]


@pytest.mark.parametrize(("noise", "state"), [(1.0, "warning"), (0.01, "ok")])
def test_doctor_compares_the_noise_with_what_it_hides(small: Path, noise: float, state: str) -> None:
    configure(small, f"privacy={{unit: client, clip: 1.0, noise: {noise}}}")
    restart(small, "fedavg")
    (found,) = _privacy(Workspace(small))
    assert (found.name, found.state) == ("privacy", state)
    assert "sqrt(2,048 numbers) / 3 clients" in found.detail
    assert noise_to_signal(Federation.open(small).round().manifest) == pytest.approx(noise * 2048**0.5 / 3)
