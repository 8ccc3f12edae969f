"""What the server sends down in fewer bytes: the step from a round's adapter to the next."""

from collections.abc import Mapping

from fedcli.config.aggregation import TOP_K, AggregationConfig
from fedcli.errors import IntegrityError
from fedcli.workspace.encoded_differences import decode_differences, encode_differences, server_draw
from fedcli.workspace.encoding_record import EncodingRecord
from fedcli.workspace.history import Round
from fedcli.workspace.layout import ADAPTER_NAME, DELTA_NAME
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.tensors import check_values, decode, encode


def encoding_record(config: AggregationConfig) -> EncodingRecord | None:
    """Return what a manifest says of the encoding; None for float32.

    The server has nobody's error feedback: beside top_k its steps are int8.
    """
    if config.encoding == "f32":
        return None
    share = (config.top_k or TOP_K) if config.encoding == "top_k" else None
    down = "int8" if config.encoding == "top_k" else config.encoding
    return EncodingRecord(name=config.encoding, top_k=share, down=down)


def with_encoded_step(base: Round, files: Mapping[str, bytes] | None) -> dict[str, bytes] | None:
    """Return the merged files as they are published: x+ becomes float32(x + what the encoded x+ - x says).

    So whoever has x computes x+ from adapter/delta.safetensors, bit by bit. It holds the tensors that updates carry.
    """
    encoding = None if base.manifest.encoding is None else base.manifest.encoding.of_step
    if files is None or encoding is None:
        return None if files is None else {**files}
    adapter, sent = base.adapter(), base.manifest.sent_tensors
    following = decode(files[ADAPTER_NAME], base.manifest.tensors)
    step = {name: following[name] - adapter[name] for name in sent}
    delta = encode_differences(step, encoding, server_draw(base.manifest))
    try:
        found = decode_differences(delta, sent, encoding)
        check_values(found)
    except Refusal as refusal:
        raise IntegrityError(
            f"the step that the updates of round {base.number} give is too large to be sent as {encoding.name}: "
            f"{refusal.reason}",
            hint="Find the update of the largest norm with `fedcli server aggregate --dry-run`, and set it aside with "
            "`fedcli server discard`.",
        ) from refusal
    following |= {name: adapter[name] + found[name] for name in sent}
    return {**files, ADAPTER_NAME: encode(following), DELTA_NAME: delta}
