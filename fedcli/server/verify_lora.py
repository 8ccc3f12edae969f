"""Merges of products computed again: another processor's LAPACK gives other last digits, and they are compared so."""

import math
from collections.abc import Mapping

import numpy as np

from fedcli.algos import Array, Arrays, products
from fedcli.algos.lora import pairs
from fedcli.server.merge_lora import lapack
from fedcli.server.verification import Verification
from fedcli.workspace.history import Round, prunable
from fedcli.workspace.layout import ADAPTER_NAME, BASE_DELTA_NAME
from fedcli.workspace.lora_records import LoraErrors, LoraMerge
from fedcli.workspace.records import TensorEntry, file_entry
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.tensors import decode

CLOSE = 1e-5
"""Of a product's norm, and of its factors'."""


def check_products(current: Round, again: LoraMerge, files: Mapping[str, bytes], result: Verification) -> None:
    """The round's adapters have the products that were computed again, to CLOSE; all other files are the same."""
    result.num_recomputed += 1
    manifest = current.manifest
    recorded = None if manifest.aggregation is None else manifest.aggregation.lora
    stored = prunable(manifest)
    for name in sorted(stored.keys() | files.keys()):
        problem = None
        if name in files and name in stored and stored[name] == file_entry(files[name]):
            continue
        if name in (ADAPTER_NAME, BASE_DELTA_NAME) and name in files and name in stored:
            tensors = manifest.tensors if name == ADAPTER_NAME else manifest.delta_tensors
            problem = _difference(current.arrays(name, tensors), files[name], tensors)
            if problem is None:
                continue
        made_with = "" if recorded is None or recorded.lapack in (None, lapack()) else f"; made with {recorded.lapack}"
        told = f" ({problem}{made_with})" if problem else ""
        result.report(current.folder / name, f"is not what the counted updates give{told}")
    if recorded is not None and not _are_close(recorded.errors, again.errors):
        result.report(current.folder, "records other errors of its products than the counted updates give")


def _difference(stored: Arrays, contents: bytes, tensors: Mapping[str, TensorEntry]) -> str | None:
    """Return in what two adapters differ; None where that is rounding."""
    try:
        again = decode(contents, tensors)
    except Refusal as refusal:
        return refusal.reason
    modules = pairs(tensors)
    for module, (first, second) in modules.items():
        (a, b), (found_a, found_b) = (
            (each[first].astype(float), each[second].astype(float)) for each in (again, stored)
        )
        if (apart := _apart(b, a, found_b, found_a)) > CLOSE:
            return f"{module}: products or factors differ by {apart:.2g} of their norm"
        unused = ~b.any(axis=0)
        if not np.array_equal(a[unused], found_a[unused]):
            return f"{module}: rows of A that no column of B uses differ"
    paired = {name for names in modules.values() for name in names}
    return next(
        (f"{name} differs" for name in tensors if name not in paired and (again[name] != stored[name]).any()), None
    )


def _apart(b: Array, a: Array, found_b: Array, found_a: Array) -> float:
    """Return how far two products are apart, and their factors but for a rotation, as a share of their norms."""
    of_factors = (
        _share(float(np.linalg.norm(_spectrum(one) - _spectrum(other))), float((one**2).sum()))
        for one, other in ((b, found_b), (a.T, found_a.T))
    )
    return max(_share(products.distance(b, a, found_b, found_a), products.norm(b, a)), *of_factors)


def _spectrum(factor: Array) -> Array:
    """Return the eigenvalues of a factor's Gram matrix: no rotation of its columns changes them."""
    found: Array = np.linalg.eigvalsh(factor.T @ factor)
    return found


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.inf if part > 0 else 0.0


def _are_close(recorded: LoraErrors | None, again: LoraErrors | None) -> bool:
    if recorded is None or again is None:
        return recorded is again
    return all(
        one.keys() == other.keys()
        and all(math.isclose(one[name], other[name], rel_tol=1e-3, abs_tol=1e-5) for name in one)
        for one, other in ((recorded.factors, again.factors), (recorded.merged, again.merged))
    )
