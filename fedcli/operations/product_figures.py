"""What a merge lacks of the mean of the clients' products, for reports."""

from fedcli.report.series import ProductRow
from fedcli.workspace.records import Manifest


def product_rows(manifest: Manifest) -> list[ProductRow]:
    """Return each module's errors of the merge that made a round; none where its manifest does not tell them."""
    merge = None if manifest.aggregation is None else manifest.aggregation.lora
    if merge is None or merge.errors is None:
        return []
    merged = merge.errors.merged
    return [ProductRow(module, error, merged.get(module)) for module, error in sorted(merge.errors.factors.items())]


def describe_products(manifest: Manifest) -> str:
    """Return in a line how products were merged, and what that lacks; empty where the factors' means are all."""
    merge = None if manifest.aggregation is None else manifest.aggregation.lora
    parts = (
        [] if merge is None else [f"lora: {merge.lora}{', weighed by norms' if merge.lora_weights == 'norm' else ''}"]
    )
    if manifest.lora is not None and manifest.lora.ranks is not None:
        parts.append(f"ranks of clients: {', '.join(f'{client}: {r}' for client, r in manifest.lora.ranks.items())}")
    if manifest.lora is not None and manifest.lora.base_delta is not None:
        parts.append(f"base_delta/ has rank {manifest.lora.base_delta}")
    if rows := product_rows(manifest):
        worst = max(rows, key=lambda row: row.of_means)
        parts.append(f"the means of A and B lack up to {worst.of_means:.3g} of the mean product ({worst.module})")
        if published := [row.of_merge for row in rows if row.of_merge is not None]:
            parts.append(f"what was published up to {max(published):.3g}")
    return "; ".join(parts)
