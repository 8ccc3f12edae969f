"""A transformers model on this machine that answers in batches: longest first, padded on the left to generate."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby, islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fedcli.data.encoding import Encoder
from fedcli.errors import RequirementError
from fedcli.eval.batches import MAX_BATCH_TOKENS, PREFIX_TOKENS, Keeper, Pace, batches
from fedcli.eval.endings import closed_up, leaving, stops
from fedcli.eval.remembered import Usage, not_finite
from fedcli.eval.requests import Generation, Likelihood, LogLikelihood, Text, before_stop
from fedcli.eval.streaming import Pieces, StreamedAnswer
from fedcli.model.library_logging import quiet_libraries
from fedcli.model.loading import pad_id_of, short_memory
from fedcli.model.prefix_cache import Kept, Row, begin, bytes_per_token, keep, logits_of, padded_left
from fedcli.randomness import stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT_BYTES = {"cpu": 2**30}
"""Of the prefixes' keys and values, by the kind of device; of others MOST_KEPT_BYTES."""
MOST_KEPT_BYTES = 2**32
LEAVING = 1 / 8
"""Of a batch of answers behind a prefix: when so many have ended, they leave it."""
CACHE_GROWTH = 64
"""Tokens that the cache of answers grows by."""
WHOLE = (
    "this model computes each prompt whole, also where prompts begin alike: its layers keep a state, or give other "
    "values behind kept keys and values"
)
UNKNOWN_CONTEXT = 2048
"""Tokens, for a model that does not say how many it takes."""

RequestT = TypeVar("RequestT")
AnswerT = TypeVar("AnswerT")


class LocalModel:
    """Answers requests with a loaded model (with or without an adapter in it) and a template's encoder.

    A prompt that is too long for the model's context loses its beginning, and is counted. Greedy answers depend on the
    batch only where two tokens are as likely as makes no difference; sampled ones on which prompts
    share a batch.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: "PreTrainedTokenizerBase",
        encoder: Encoder,
        *,
        batch_size: int | None = None,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.usage = Usage()
        self._model = model
        self._base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._on_note = on_note
        self._has_told = False
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._batch_size = batch_size
        lengths = [getattr(model.config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
        limits = [*lengths, tokenizer.model_max_length]
        self._context = min(
            (limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9), default=UNKNOWN_CONTEXT
        )
        """Tokens that the model takes, prompt and answer together."""
        self._pad_id = pad_id_of(tokenizer, model, encoder.end_id)

    def generate(self, requests: Sequence[Generation], on_answer: Callable[[int, str], None]) -> None:
        """Answer every request; equal settings share batches."""

        def settings(index: int) -> tuple[Any, ...]:
            request = requests[index]
            return (request.max_new_tokens, request.stop, request.temperature, request.top_p)

        for _, same in groupby(sorted(range(len(requests)), key=settings), settings):
            indices = list(same)
            first = requests[indices[0]]
            room = min(first.max_new_tokens, self._context // 2)
            ask = partial(self._generate, request=first, room=room)
            encoded = self._asking([requests[index].prompt for index in indices], room)
            prompts = dict(zip(indices, encoded, strict=True))
            most = {index: len(ids) - 1 for index, ids in prompts.items()}
            for batch in self._batches(prompts, most, room, is_sampled=first.temperature > 0):
                texts = self._in_halves([(row, requests[index].sample) for index, row in batch], ask)
                self.usage.num_requests += len(batch)
                for (index, _), text in zip(batch, texts, strict=True):
                    on_answer(index, text)

    def stream(self, request: Generation, on_text: Callable[[str], None]) -> StreamedAnswer:
        """Answer one request, and tell of the answer's text as it comes; the pieces together are the text.

        White space around it is left out: it belongs to the template.
        """
        room = min(request.max_new_tokens, self._context // 2)
        num_cut = self.usage.num_truncated
        (ids,) = self._asking([request.prompt], room)
        pieces = Pieces(lambda tokens: self._texts([ids], [tokens])[0].strip(), on_text)
        ask = partial(self._generate, request=request, room=room, streamer=pieces)
        (text,) = self._in_halves([(Row(ids), request.sample)], ask)
        self.usage.num_requests += 1
        is_cut = pieces.tokens[-1:] != [self._encoder.end_id]
        return StreamedAnswer(text.strip(), len(ids), len(pieces.tokens), is_cut, self.usage.num_truncated > num_cut)

    def log_likelihoods(self, requests: Sequence[Likelihood], on_answer: Callable[[int, LogLikelihood], None]) -> None:
        """Answer every request."""
        rows: list[_Continued] = []
        places: dict[tuple[int, ...], int] = {}
        asked: dict[int, list[int]] = {}
        for index, (ids, length) in enumerate(self._continued(requests)):
            # Answers of one token to one prompt (A, B, C, D) share a row: its logits have them all.
            key = (length, *(ids[:-1] if length == 1 else ids))
            place = places.setdefault(key, len(rows))
            if place == len(rows):
                rows.append(_Continued(ids[:-1], length, []))
            rows[place].options.append(ids[-length:])
            asked.setdefault(place, []).append(index)
        prompts = {place: row.ids for place, row in enumerate(rows)}
        most = {place: len(row.ids) - row.length for place, row in enumerate(rows)}
        for batch in self._batches(prompts, most, 0):
            answers = self._in_halves([(rows[place], row) for place, row in batch], self._score)
            for (place, _), found in zip(batch, answers, strict=True):
                self.usage.num_requests += len(found)
                for index, answer in zip(asked[place], found, strict=True):
                    on_answer(index, answer)

    def _asking(self, prompts: Sequence[Text], room: int) -> list[list[int]]:
        """Return the ids of prompts, each of which leaves room for an answer."""
        written = iter(self._encoder.prompts([prompt for prompt in prompts if not isinstance(prompt, str)]))
        return [self._cut(self._text(prompt) if isinstance(prompt, str) else next(written), room) for prompt in prompts]

    def _continued(self, requests: Sequence[Likelihood]) -> list[tuple[list[int], int]]:
        """Return the ids of prompts with continuations, and how many of each are the continuation's, at least one.

        They may be one more than the context holds: the last one is only predicted.
        """
        turns = [(request.prompt, request.continuation) for request in requests if not isinstance(request.prompt, str)]
        written = iter(self._encoder.responses(*zip(*turns, strict=True)) if turns else ())
        rows = []
        for request in requests:
            if isinstance(request.prompt, str):
                whole, length = self._joined(request.prompt, request.continuation)
            else:
                example = next(written)
                # A chat template may write more behind the response.
                whole = example.ids[: int(example.supervised.nonzero()[0][-1]) + 1].tolist()
                length = int(example.supervised.sum())
            ids = self._cut(whole, -1)
            rows.append((ids, min(max(length, 1), len(ids) - 1)))
        return rows

    def _joined(self, prompt: str, continuation: str) -> tuple[list[int], int]:
        """Return the ids of a text, and how many are the continuation's; white space before it is, as in lm-eval."""
        context = prompt.rstrip()
        whole = self._text(prompt + continuation)
        if len(whole) < 2 or (not context and whole[0] != self._start_id()):
            whole = [self._start_id(), *whole]
        return whole, len(whole) - (len(self._text(context)) if context else 1)

    def _text(self, text: str) -> list[int]:
        """Return the ids of a text as it is, with the start token where the tokenizer puts one; never none at all."""
        return [int(token) for token in self._tokenizer(text, verbose=False)["input_ids"]] or [self._start_id()]

    def _start_id(self) -> int:
        start = self._tokenizer.bos_token_id
        return start if isinstance(start, int) else self._encoder.end_id

    def _cut(self, ids: list[int], room: int) -> list[int]:
        self.usage.num_truncated += len(ids) > self._context - room
        return ids[-(self._context - room) :]

    def _batches(
        self, rows: dict[int, list[int]], most: dict[int, int], room: int, *, is_sampled: bool = False
    ) -> Iterator[list[tuple[int, Row]]]:
        """Yield rows in batches; `most` of a row's tokens may be in a prefix. Sampled ones share none."""
        device = self._model.device.type
        pace = Pace.of(device, self._batch_size, is_sampled=is_sampled)
        return batches(rows, most, room, pace, (lambda: None) if is_sampled else self._keeper)

    def _keeper(self) -> Keeper | None:
        """Return what computes prefixes; None for a model whose prompts must be computed whole, which is told once."""
        self._model.eval()
        with quiet_libraries():
            num_bytes, device = bytes_per_token(self._base), self._model.device.type
        if not num_bytes:
            if not self._has_told:
                self._on_note(WHOLE)
            self._has_told = True
            return None
        return Keeper(
            self._kept,
            KEPT_BYTES.get(device, MOST_KEPT_BYTES) // num_bytes,
            PREFIX_TOKENS.get(device, MAX_BATCH_TOKENS),
        )

    def _kept(self, rows: list[Row]) -> list[Kept | None]:
        """Compute prefixes; those that memory is too small for are None."""
        try:
            return self._in_halves(rows, lambda half: [*keep(self._base, half, self._pad_id)])
        except RequirementError:
            return [None] * len(rows)

    def _in_halves(self, rows: list[RequestT], ask: Callable[[list[RequestT]], list[AnswerT]]) -> list[AnswerT]:
        """Ask for a batch at once, in halves where memory is too small for it."""
        self._model.eval()
        try:
            with torch.inference_mode(), quiet_libraries():
                return ask(rows)
        except (RuntimeError, MemoryError) as error:
            if "probability tensor" in str(error):  # what torch.multinomial says of NaN
                raise not_finite() from error
            if (where := short_memory(error)) is None:
                raise
            if len(rows) == 1:
                raise RequirementError(
                    f"{where} is too small for a single prompt",
                    hint="Free some, or use a quantised base (model.quantization).",
                ) from error
            torch.cuda.empty_cache()
        half = len(rows) // 2
        return self._in_halves(rows[:half], ask) + self._in_halves(rows[half:], ask)

    def _generate(
        self, rows: list[tuple[Row, int]], request: Generation, room: int, streamer: Pieces | None = None
    ) -> list[str]:
        """Return what follows each prompt (its tokens, and which of its samples it is), cut before the first stop."""
        from transformers import StoppingCriteriaList

        prompts = [list(row.ids) for row, _ in rows]
        device, cache = self._model.device, None
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if request.temperature > 0:
            sampling = {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
            name = hashlib.sha256(
                repr([(ids, sample) for ids, (_, sample) in zip(prompts, rows, strict=True)]).encode()
            )
            torch.manual_seed(stream_seed(0, "evaluation", part=name.hexdigest()) % 2**63)
        if any(row.kept for row, _ in rows):
            input_ids, mask, cache = begin(self._base, [row for row, _ in rows], self._pad_id, CACHE_GROWTH)
            sampling |= {"past_key_values": cache, "use_cache": True}
        else:
            input_ids, mask = padded_left([row for row, _ in rows], self._pad_id)
        width = input_ids.shape[1]
        found: list[list[int]] = [[] for _ in rows]
        going, made = list(range(len(rows))), 0
        while going and made < room:
            criteria = [stops(request.stop, width, self._decoded)] if request.stop else []
            if cache is not None:
                criteria = [leaving(criteria, self._encoder.end_id, math.ceil(LEAVING * len(going)))]
            input_ids = self._model.generate(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=room - made,
                repetition_penalty=1.0,  # whatever the model's own generation_config.json says
                pad_token_id=self._pad_id,
                eos_token_id=self._encoder.end_id,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList(criteria),
                **sampling,
            )
            for number, tokens in zip(going, input_ids[:, width + made :].tolist(), strict=True):
                found[number] += tokens
            if cache is None:
                break
            more, made = input_ids.shape[1] - width - made, input_ids.shape[1] - width
            is_open = [not self._has_ended(found[number], request) for number in going]
            places = closed_up(is_open)
            going = [going[place] for place in places]
            chosen = torch.tensor(places, dtype=torch.long)
            mask = torch.nn.functional.pad(mask[chosen], (0, more), value=1)
            input_ids = input_ids[chosen.to(device)]
            cache.batch_select_indices(chosen.to(device))
        self.usage.num_generated_tokens += sum(token != self._pad_id for tokens in found for token in tokens)
        return [before_stop(text, request.stop) for text in self._texts(prompts, found)]

    def _has_ended(self, tokens: list[int], request: Generation) -> bool:
        """Return whether an answer holds the end of the sequence or a stop."""
        if self._encoder.end_id in tokens:
            return True
        (text,) = self._decoded([tokens])
        return before_stop(text, request.stop) != text

    def _texts(self, prompts: list[list[int]], generated: list[list[int]]) -> list[str]:
        """Return answers with the space that they begin with, which sentencepiece drops where a text begins."""
        before = self._decoded([ids[-1:] for ids in prompts])
        joined = self._decoded([ids[-1:] + answer for ids, answer in zip(prompts, generated, strict=True)])
        alone = self._decoded(generated)
        return [
            text.removeprefix(start) if text.startswith(start) else plain
            for start, text, plain in zip(before, joined, alone, strict=True)
        ]

    def _decoded(self, rows: list[list[int]]) -> list[str]:
        texts: list[str] = self._tokenizer.batch_decode(rows, skip_special_tokens=True)
        return texts

    def _score(self, asked: list[tuple["_Continued", Row]]) -> list[list[LogLikelihood]]:
        """Return the log-likelihood of every row's options; logits are made at the positions that predict them only."""
        rows = [row for row, _ in asked]
        logits = logits_of([row for _, row in asked], [row.length for row in rows], self._base, self._pad_id).float()
        device = logits.device
        starts = list(accumulate((row.length for row in rows), initial=0))
        positions: list[int] = []
        tokens: list[int] = []
        for start, row in zip(starts, rows, strict=False):
            for option in row.options:
                positions += range(start, start + row.length)
                tokens += option
        found = logits.log_softmax(-1)[torch.tensor(positions, device=device), torch.tensor(tokens, device=device)]
        log_probs, likeliest = iter(found.double().tolist()), logits.argmax(-1).tolist()
        return [
            [
                LogLikelihood(
                    sum(islice(log_probs, row.length)), option == likeliest[start : start + row.length], row.length
                )
                for option in row.options
            ]
            for start, row in zip(starts, rows, strict=False)
        ]


@dataclass(frozen=True)
class _Continued:
    """Tokens that a model is given, the last `length` of which predict a continuation, and what that may be."""

    ids: list[int]
    length: int
    options: list[list[int]]
