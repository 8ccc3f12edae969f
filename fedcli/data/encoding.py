"""Token ids of conversations; what is learnt of them is known by construction, never searched for."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise, repeat
from typing import TYPE_CHECKING, cast

import numpy as np

from fedcli.config import TemplateChoice
from fedcli.data.encoded import EncodedExample, EncodedRow, EncodedRows
from fedcli.data.formats import RowReader, group_of
from fedcli.data.row_report import describe_counts
from fedcli.data.segments import Segment
from fedcli.data.source import Source
from fedcli.data.templates import TEXT, find_template
from fedcli.errors import ConfigError, RequirementError
from fedcli.tasks.conversation import Item, Prompt, Turn, is_text
from fedcli.tasks.format import EQUAL, MALFORMED, NOT_LEARNT, TOO_LONG, LeftOut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1024
"""Rows that are encoded at once."""


Encoded = EncodedExample | LeftOut
"""An example, or why it cannot be used."""


class Encoder:
    """Encodes with one tokenizer and one template.

    `date`, as 2026-11-29, is written by a chat template that asks for the day; None: today. Raises RequirementError
    where the tokenizer has no end-of-sequence token, ConfigError where it has no chat template and that is asked for.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template: TemplateChoice = "alpaca", *, date: str | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._template = find_template(template, tokenizer, date=date)
        self.date = self._template.date
        """The date that the template writes; None where it writes none."""
        self._spellings = _spellings(tokenizer)
        # A chat template writes the start token itself, where the model wants one.
        self.start_ids = [] if self._template.parses_special else self._special_start()
        self.end_id = self._template.end_id if self._template.end_id is not None else self._special_end()
        """The token that ends a response."""

    def prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the ids that ask for the responses, as training sees them; raise ConfigError for a faulty prompt."""
        return [example.ids.tolist() for example in self._written(prompts)]

    def responses(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[EncodedExample]:
        """Return prompts with a response each, which alone is supervised, with its end token; raise as `prompts`."""
        return self._written(
            [(*prompt, Turn("assistant", response)) for prompt, response in zip(prompts, responses, strict=True)]
        )

    def unused(self, prompt: Prompt) -> set[str]:
        """Return notes of what a prompt holds and the template does not write; raise ConfigError as `prompts`."""
        notes: set[str] = set()
        (encoded,) = self._encode([prompt], notes=[notes])
        if isinstance(encoded, LeftOut):
            raise ConfigError(f"a prompt cannot be written: {encoded.detail}", hint="Mend or remove that row.")
        return notes

    def _written(self, conversations: Sequence[Prompt]) -> list[EncodedExample]:
        examples = []
        for encoded in self._encode(conversations, last_only=True):
            if isinstance(encoded, LeftOut):
                raise ConfigError(f"a prompt cannot be written: {encoded.detail}", hint="Mend or remove that row.")
            examples.append(encoded)
        return examples

    def encode(
        self,
        items: Iterable[Item],
        max_length: int,
        on_rows: Callable[[int], None] = lambda count: None,
        *,
        places: Iterable[str] = repeat(""),
        groups: Iterable[int | None] = repeat(None),
    ) -> EncodedRows:
        """Encode what rows teach, cutting conversations at `max_length` tokens; count what was cut or left out.

        A response is learnt with the end token behind it. A conversation that is cut loses what is behind the cut, the
        end token too: the model is not taught to stop in the middle. A text is learnt whole, without a template. A row
        whose conversations are equal, cut or not, is left out. `on_rows` hears how many more rows are done. `places`
        say where items come from, `groups` which of a client's groups they belong to.
        """
        rows, iterator = EncodedRows(), iter(zip(items, places, groups, strict=False))
        of_texts: Encoder | None = None
        while chunk := list(islice(iterator, CHUNK)):
            notes: list[set[str]] = [set() for _ in chunk]
            # sides of one prompt: where one of them has thoughts, all begin where thoughts do
            with_thoughts = [
                item.num_sides > 1 and any(map(self._template.has_thoughts, item.conversations)) for item, *_ in chunk
            ]
            is_plain = all(item.num_sides == 1 and is_text(item.conversations[0]) for item, *_ in chunk)
            if is_plain:
                of_texts = of_texts or Encoder(self._tokenizer, TEXT)
            encoder = of_texts if of_texts is not None and is_plain else self
            columns = [
                encoder._encode(side, chunk[0][0].last_only, with_thoughts, notes)
                for side in zip(*(item.conversations for item, *_ in chunk), strict=True)
            ]
            for (item, place, group), encoded, noted in zip(chunk, zip(*columns, strict=True), notes, strict=True):
                try:
                    row = EncodedRow(tuple(map(_usable, encoded)), item.numbers, group=group, check=item.check)
                    row, is_cut = _cut(row, max_length)
                except LeftOut as fault:
                    rows.leave_out(fault.reason, fault.detail, place)
                    continue
                rows.notes.update(noted)
                rows.num_truncated += is_cut and not item.check  # what is checked is kept whole
                rows.append(row)
            on_rows(len(chunk))
        return rows

    def _encode(
        self,
        conversations: Sequence[Sequence[Turn]],
        last_only: bool = False,
        with_thoughts: Iterable[bool] = repeat(False),
        notes: Iterable[set[str] | None] = repeat(None),
    ) -> list[Encoded]:
        """Encode conversations, piece after piece of all at once, for tokenizers are fast on many texts."""
        builders: list[_Builder | LeftOut] = []
        for turns, thinks, noted in zip(conversations, with_thoughts, notes, strict=False):
            try:
                segments = self._template.segments(turns, last_only=last_only, with_thoughts=thinks, notes=noted)
                builders.append(_Builder(segments, list(self.start_ids), self.end_id))
            except ValueError as error:
                builders.append(LeftOut(MALFORMED, str(error)))
        while waiting := [builder for builder in builders if isinstance(builder, _Builder) and builder.segments]:
            joint = self._ids([builder.run_text + builder.segments[0].text for builder in waiting])
            apart = [builder for builder, ids in zip(waiting, joint, strict=True) if not builder.accept(ids)]
            for builder, ids in zip(apart, self._ids_apart([each.segments[0].text for each in apart]), strict=True):
                builder.start_run()
                builder.accept(ids)
        return [builder if isinstance(builder, LeftOut) else builder.result() for builder in builders]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # split_special_tokens: a text that spells </s> is no end of sequence
        encoded = self._tokenizer(
            texts, add_special_tokens=False, split_special_tokens=not self._template.parses_special, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        if self._template.parses_special:
            return ids
        # a Unigram model reads special tokens out of plain text all the same: their characters replace them
        apart = self._spellings
        return [
            row if apart.keys().isdisjoint(row) else [part for token in row for part in apart.get(token, [token])]
            for row in ids
        ]

    def _ids_apart(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of texts that stand behind other text, but are not to merge with it.

        A tokenizer that marks the start of a text (sentencepiece) would take them for one; behind a guard it does not.
        """
        found: dict[int, list[int]] = {}
        for guard in ("\n", ".", ""):
            before = self._ids([guard])[0] if guard else []
            waiting = [position for position in range(len(texts)) if position not in found]
            guarded = self._ids([guard + texts[position] for position in waiting])
            for position, ids in zip(waiting, guarded, strict=True):
                if ids[: len(before)] == before:
                    found[position] = ids[len(before) :]
        return [found[position] for position in range(len(texts))]

    def _special_start(self) -> list[int]:
        """Return the special tokens that the tokenizer puts in front of a text: [bos], [cls] or none."""
        plain = self._ids(["a"])[0]
        special: list[int] = self._tokenizer("a")["input_ids"]
        for position in range(len(special) - len(plain) + 1):
            if special[position : position + len(plain)] == plain:
                return special[:position]
        return []

    def _special_end(self) -> int:
        for token_id in (self._tokenizer.eos_token_id, self._tokenizer.sep_token_id):
            if isinstance(token_id, int):
                return token_id
        raise RequirementError(
            "the base model's tokenizer has no end-of-sequence token",
            hint="Set eos_token in its tokenizer_config.json: without it no response would ever end.",
        )


def encode_source(
    encoder: Encoder,
    reader: RowReader,
    source: Source,
    max_length: int,
    on_rows: Callable[[int], None] = lambda count: None,
    *,
    group_by: str | None = None,
) -> EncodedRows:
    """Read and encode the rows of a source; what the reader left out counts too.

    Rows with one value in the column `group_by` are one group. Raises ConfigError where not one row is usable, or a
    usable one has no such value.
    """
    places: deque[str] = deque()
    groups: deque[int | None] = deque()
    numbers: dict[str, int] = {}

    def items() -> Iterator[Item]:
        for row, item in reader.read(source.rows()):
            places.append(row.where)
            groups.append(None if group_by is None else numbers.setdefault(group_of(row, group_by), len(numbers)))
            yield item

    rows = encoder.encode(
        items(), max_length, on_rows, places=iter(places.popleft, None), groups=iter(groups.popleft, object())
    )
    reader.require_rows(source.location)
    rows.include(reader)
    rows.unused.pop(group_by or "", None)
    require_encoded(rows, source.location, reader.num_rows, max_length)
    return rows


def cut(rows: EncodedRows, max_length: int) -> EncodedRows:
    """Return rows as they are trained on at a length, with those that it leaves out counted."""
    made = EncodedRows()
    made.include(rows)
    for row in rows:
        try:
            kept, is_cut = _cut(row, max_length)
        except LeftOut as fault:
            made.leave_out(fault.reason, fault.detail, "")
        else:
            made.num_truncated += is_cut
            made.append(kept)
    return made


def _usable(encoded: Encoded) -> EncodedExample:
    if isinstance(encoded, LeftOut):
        raise encoded
    return encoded


def _cut(row: EncodedRow, max_length: int) -> tuple[EncodedRow, bool]:
    """Return a row cut at `max_length` tokens, and whether a response lost some; raise LeftOut where it is not used.

    A training example must keep a token to learn, and sides must differ.
    """
    sides = []
    for side in row.sides:
        if not side.supervised[:max_length].any():
            if not side.supervised.any():
                raise LeftOut(NOT_LEARNT, "no response is learnt: the row or the template keeps all of them out")
            raise LeftOut(TOO_LONG, f"the prompt has {side.prompt_length} tokens, and train.max_length is {max_length}")
        sides.append(EncodedExample(side.ids[:max_length], side.supervised[:max_length]))
    if any(np.array_equal(one.ids, other.ids) for one, other in pairwise(sides)):
        raise LeftOut(EQUAL)
    is_cut = any(side.supervised[max_length:].any() for side in row.sides)
    return replace(row, sides=tuple(sides)), bool(is_cut)


def require_encoded(rows: EncodedRows, where: object, num_rows: int, max_length: int) -> None:
    """Raise ConfigError where not one row of those that were read could be encoded."""
    if rows:
        return
    hint = "Responses must not be empty (nor alike, in a pair), and prompts must leave room for them."
    if MALFORMED in rows.left_out or NOT_LEARNT in rows.left_out:
        hint = "Mend the rows, or set data.template to one that can write them; docs/DATA.md says what each can."
    elif TOO_LONG in rows.left_out:
        hint = "Prompts must leave room for responses: raise train.max_length."
    raise ConfigError(
        f"{where}: none of its {num_rows} rows is usable at max_length {max_length} "
        f"({describe_counts(rows.left_out)}); first, {next(iter(rows.first_cases.values()), 'none')}",
        hint=hint,
    )


def _spellings(tokenizer: "PreTrainedTokenizerBase") -> dict[int, list[int]]:
    """Return the ids of the characters of every special token, but for that of what is unknown."""
    special = set(tokenizer.all_special_ids)
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.discard(tokenizer.unk_token_id)
    spellings = {}
    for number in special:
        characters = list(str(tokenizer.convert_ids_to_tokens(number)))
        spellings[number] = list(cast("list[int]", tokenizer.convert_tokens_to_ids(characters)))
    return spellings


class _Builder:
    """Token ids of one conversation while its pieces come in.

    A piece is tokenised together with the text before it where that leaves the earlier tokens as they are, so that
    training sees what generation will; a tokenizer that would merge across the boundary gets them apart. A run is the
    text since the last such cut or end token.
    """

    def __init__(self, segments: list[Segment], start_ids: list[int], end_id: int) -> None:
        self.segments = segments
        self.run_text = ""
        self._run_ids: list[int] = []
        self._ids = start_ids
        self._supervised = [False] * len(start_ids)
        self._end_id = end_id

    def accept(self, joint: list[int]) -> bool:
        """Take the next piece, given the ids of run and piece together; return False where they must be apart."""
        length = len(self._run_ids)
        if joint[:length] != self._run_ids:
            return False
        segment = self.segments.pop(0)
        new = joint[length:] + ([self._end_id] if segment.ends else [])
        self._ids += new
        self._supervised += [segment.is_supervised] * len(new)
        self.run_text += segment.text
        self._run_ids = joint
        if segment.ends:
            self.start_run()
        return True

    def start_run(self) -> None:
        """Forget the text so far: the next piece is tokenised by itself."""
        self.run_text, self._run_ids = "", []

    def result(self) -> EncodedExample:
        """Return what was built."""
        return EncodedExample(np.array(self._ids, np.int32), np.array(self._supervised, np.bool_))
