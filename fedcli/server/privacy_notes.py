"""What an operator must know of privacy before the first round: how much noise there is, and whether anything is left.

The noise's norm over the clip is z sqrt(d) / m for d numbers and m clients: above 1 the noise is longer than the mean
of updates that all point the same way.
"""

import math

from fedcli.config.privacy import PrivacyConfig
from fedcli.workspace.records import Manifest

MOST_RATIO = 1.0


def noise_to_signal(manifest: Manifest) -> float | None:
    """Return the noise's norm over the clip, of unit client; None for a round of another unit."""
    privacy = manifest.privacy
    if privacy is None or privacy.noise is None or privacy.expected is None:
        return None
    return privacy.noise * math.sqrt(_num_numbers(manifest)) / privacy.expected


def is_too_noisy(manifest: Manifest) -> bool:
    """Return whether more noise than signal is published."""
    return (noise_to_signal(manifest) or 0.0) > MOST_RATIO


def describe_noise(manifest: Manifest) -> str:
    """Return how much noise a round of unit client has beside what is learnt."""
    privacy, ratio = manifest.privacy, noise_to_signal(manifest)
    if privacy is None or privacy.noise is None or ratio is None:
        return "no noise is made by the server"
    return (
        f"the noise is {ratio:.3g} times as long as the mean of the updates can be: noise {privacy.noise:.4g} x "
        f"sqrt({_num_numbers(manifest):,} numbers) / {privacy.expected} clients"
    )


def cure_of_noise(manifest: Manifest) -> str:
    """Return what would work where the noise is too much."""
    privacy = manifest.privacy
    enough = math.ceil((0.0 if privacy is None else privacy.noise or 0.0) * math.sqrt(_num_numbers(manifest)))
    return (
        "Little or nothing will be learnt. privacy.unit: row or group is for few clients with many rows each; this one "
        f"takes a smaller adapter.rank, fewer adapter.target_modules, or about {enough:,} clients a round."
    )


def privacy_notes(config: PrivacyConfig, manifest: Manifest, rounds: int) -> tuple[str, ...]:
    """Return what `init` tells of privacy."""
    notes = []
    if config.unit == "client" and config.target is not None and manifest.privacy is not None:
        notes.append(
            f"privacy.target: epsilon {config.target.epsilon:g} at delta {config.target.delta:g} for a client of all "
            f"{rounds} rounds takes noise {manifest.privacy.noise:.6g}"
        )
    if is_too_noisy(manifest):
        notes.append(f"privacy.unit: client: {describe_noise(manifest)}. {cure_of_noise(manifest)}")
    return tuple(notes)


def _num_numbers(manifest: Manifest) -> int:
    """Return how many numbers an update has."""
    return len(manifest.update_files) * sum(math.prod(entry.shape) for entry in manifest.sent_tensors.values())
