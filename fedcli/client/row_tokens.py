"""A party's rows as token ids: from its cache, or tokenised now and kept there."""

from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING

from fedcli.data.encoded import EncodedRows
from fedcli.data.formats import RowReader
from fedcli.data.row_report import RowReport
from fedcli.parties.party import Party
from fedcli.workspace.caches import read_tokens, save_tokens, token_key
from fedcli.workspace.train_records import TrainRecord

if TYPE_CHECKING:
    from fedcli.data.encoding import Encoder


def read_encoded(
    party: Party,
    encoder: "Encoder",
    task: str,
    train: TrainRecord,
    *,
    fingerprint: str,
    group_by: str | None = None,
    on_rows: Callable[[int], None],
) -> tuple[EncodedRows, int]:
    """Return a party's encoded rows, and how many of its rows its format could use.

    The cache holds for one content of the files, format, template and its date, length, column `group_by` and base
    model, whose `fingerprint` covers the tokenizer. Rows of the hub are tokenised anew every time. `on_rows` hears how
    many more rows were read. Raises ConfigError where there is no usable row, or one without a group.
    """
    from fedcli.data.encoding import encode_source

    digest = party.source.digest()
    key = token_key(
        versions=[version(package) for package in ("fedcli", "transformers", "tokenizers")],
        source=digest,
        split=party.source.split,
        format=party.format if isinstance(party.format, str) else party.format.model_dump(mode="json"),
        template=train.template if isinstance(train.template, str) else train.template.model_dump(mode="json"),
        task=task,
        date=encoder.date,
        layout=5,  # of the arrays and of what formats and templates teach: a cache of another layout is made anew
        max_length=train.max_length,
        seed=train.seed,
        base=fingerprint,
        **({} if group_by is None else {"group_by": group_by}),
    )
    kept = None if digest is None else read_tokens(party.home, key)
    if kept is not None:
        arrays, counts = kept
        rows = EncodedRows.of_arrays(arrays)
        rows.num_truncated, num_usable = counts.pop("num_truncated"), counts.pop("num_usable")
        rows.include(RowReport(**counts))
        return rows, num_usable
    reader = RowReader(party.format, train.seed)
    rows = encode_source(encoder, reader, party.source, train.max_length, on_rows, group_by=group_by)
    if digest is not None:
        counts = rows.counts() | {"num_truncated": rows.num_truncated, "num_usable": reader.num_usable}
        save_tokens(party.home, key, rows.arrays(), counts)
    return rows, reader.num_usable
