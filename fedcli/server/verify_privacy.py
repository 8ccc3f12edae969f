"""What `fedcli verify` checks of privacy: what a round records of its noise is what the round before asked for."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedcli.server.verification import Verification
from fedcli.workspace.history import Round
from fedcli.workspace.merge_records import Aggregation
from fedcli.workspace.privacy_records import MergeNoise, next_clip, noise_multiplier

if TYPE_CHECKING:
    from fedcli.workspace.noise_keys import NoiseKey, NoiseSource


def check_privacy(current: Round, aggregation: Aggregation, base: Round, result: Verification) -> None:
    """What the round before asked for was done: the noise, how many count, what is withheld, and where clip goes."""
    asked, noise, folder = base.manifest.privacy, aggregation.privacy, current.folder
    if base.manifest.withholds:
        shown = [
            f"{name} of client {entry.client}"
            for entry in aggregation.counted
            for name in ("num_samples", "train_loss", "delta_norm", "cosine", "change")
            if getattr(entry, name) is not None
        ]
        if shown:
            result.report(folder, f"tells {shown[0]}, which its privacy withholds")
    if asked is None or not asked.is_at_server:
        if noise is not None:
            result.report(folder, "records noise, for which the round before did not ask")
        return
    if not aggregation.counted:
        return
    if noise is None:
        result.report(folder, "records no noise, for which the round before asked (unit client): there is no guarantee")
        return
    if not math.isclose(noise.noise, noise_multiplier(asked), rel_tol=1e-9):
        result.report(folder, f"was merged with noise {noise.noise:g}, and {noise_multiplier(asked):g} was asked for")
    if asked.expected is not None and len(aggregation.counted) > asked.expected:
        result.report(folder, f"counts {len(aggregation.counted)} updates, and its privacy expects {asked.expected}")
    if (noise.below is None) != (asked.adaptive is None):
        result.report(folder, "tells how many updates were clipped where clipping is not adaptive, or does not tell it")
    _check_clip(current, base, noise, result)


def _check_clip(current: Round, base: Round, noise: MergeNoise, result: Verification) -> None:
    before, now = base.manifest.privacy, current.manifest.privacy
    if before is None or now is None or before.adaptive is None or now.adaptive is None or noise.below is None:
        return
    reached = next_clip(before, noise)
    if reached is None or now.clip is None or not math.isclose(now.clip, reached, rel_tol=1e-9):
        result.report(current.folder, f"clips at {now.clip}, and adaptive clipping has reached {reached}")


def noise_again(aggregation: Aggregation, keys: Mapping[str, bytes]) -> "NoiseSource | None":
    """Return what gives the key of a round's noise again; None where it is not among those that were given."""
    noise = aggregation.privacy
    key = None if noise is None else keys.get(noise.noise_sha256)
    if noise is None or key is None:
        return None
    from fedcli.workspace.noise_keys import NoiseKey

    def source(_: Aggregation) -> "NoiseKey | None":
        return NoiseKey(key, noise.releases or 1)

    return source


def is_same_noise(again: MergeNoise, recorded: MergeNoise | None) -> bool:
    """Return whether two records of a noise agree, but for a last digit."""
    if recorded is None or (again.below is None) != (recorded.below is None):
        return False
    close = math.isclose(again.noise, recorded.noise, rel_tol=1e-9)
    close = close and math.isclose(again.below or 0.0, recorded.below or 0.0, rel_tol=1e-9, abs_tol=1e-9)
    return close and (again.noise_sha256, again.releases) == (recorded.noise_sha256, recorded.releases)
