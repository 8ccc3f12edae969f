"""A transformers model on this machine that answers in batches: longest first, padded on the left to generate."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby, islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fedcli.data.encoding import Encoder
from fedcli.errors import RequirementError
from fedcli.eval.remembered import Usage, not_finite
from fedcli.eval.requests import Generation, Likelihood, LogLikelihood, Text, before_stop
from fedcli.eval.streaming import Pieces, StreamedAnswer
from fedcli.model.library_logging import quiet_libraries
from fedcli.model.loading import pad_id_of, short_memory
from fedcli.model.output_head import logits_at
from fedcli.randomness import stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 64
FIRST_BATCH = {"cpu": 4}
"""Items of the first batch, by the kind of device, where nobody says how many; of others BATCH_SIZE."""
SAMPLED_BATCH = {"cpu": 8}
"""The same of every batch of sampled answers, which depend on it: no clock may decide."""
BATCH_SECONDS = 30.0
"""About as long as a batch may take: what is answered is kept, and shown, after each."""
MOST_GROWTH = 4
MAX_BATCH_TOKENS = 2**16
"""Of a batch with its padding and what may be generated."""
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
        self, model: Any, tokenizer: "PreTrainedTokenizerBase", encoder: Encoder, *, batch_size: int | None = None
    ) -> None:
        self.usage = Usage()
        self._model = model
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
            pace = self._pace(is_sampled=first.temperature > 0)
            for batch in self._batches(prompts, room, pace):
                texts = self._in_halves([(prompts[index], requests[index].sample) for index in batch], ask)
                self.usage.num_requests += len(batch)
                for index, text in zip(batch, texts, strict=True):
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
        (text,) = self._in_halves([(ids, request.sample)], ask)
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
        for batch in self._batches({place: row.ids for place, row in enumerate(rows)}, 0, self._pace()):
            answers = self._in_halves([rows[place] for place in batch], self._score)
            for place, found in zip(batch, answers, strict=True):
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

    def _pace(self, *, is_sampled: bool = False) -> "_Pace":
        """Return how many rows batches have: as many as a user asks for, else as many as suit their kind."""
        device = self._model.device.type
        if self._batch_size is not None or is_sampled:
            return _Pace(self._batch_size or SAMPLED_BATCH.get(device, BATCH_SIZE), is_fixed=True)
        # elsewhere than on a CPU in half precision, which batches change: no clock decides there either
        return _Pace(FIRST_BATCH.get(device, BATCH_SIZE), is_fixed=device not in FIRST_BATCH)

    def _batches(self, rows: dict[int, list[int]], room: int, pace: "_Pace") -> Iterator[list[int]]:
        """Yield the indices of rows in batches, longest first: what does not fit into memory fails at once.

        Whoever iterates answers a batch before it asks for the next one, whose size depends on how long that took.
        """
        batch: list[int] = []
        for index in sorted(rows, key=lambda index: -len(rows[index])):
            longest = len(rows[batch[0]]) + room if batch else 0
            if len(batch) >= pace.size or longest * (len(batch) + 1) > MAX_BATCH_TOKENS:
                started = time.monotonic()
                yield batch
                pace.took(len(batch), time.monotonic() - started)
                batch = []
            batch.append(index)
        if batch:
            yield batch

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
        self, rows: list[tuple[list[int], int]], request: Generation, room: int, streamer: Pieces | None = None
    ) -> list[str]:
        """Return what follows each prompt (its ids, and which of its samples it is), cut before the first stop."""
        from transformers import StoppingCriteriaList

        prompts = [ids for ids, _ in rows]
        width = max(map(len, prompts))
        device = self._model.device
        padded = [[self._pad_id] * (width - len(ids)) + ids for ids in prompts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if request.temperature > 0:
            sampling = {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
            name = hashlib.sha256(repr(rows).encode()).hexdigest()
            torch.manual_seed(stream_seed(0, "evaluation", part=name) % 2**63)
        if request.stop:
            sampling["stopping_criteria"] = StoppingCriteriaList([self._stops(request.stop, width)])
        generated = self._model.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=room,
            repetition_penalty=1.0,  # whatever the model's own generation_config.json says
            pad_token_id=self._pad_id,
            eos_token_id=self._encoder.end_id,
            streamer=streamer,
            **sampling,
        )[:, width:]
        self.usage.num_generated_tokens += int((generated != self._pad_id).sum())
        return [before_stop(text, request.stop) for text in self._texts(prompts, generated.tolist())]

    def _stops(self, stop: Sequence[str], width: int) -> Callable[..., torch.Tensor]:
        """Return what tells whether rows have come to a stop sequence; it looks only behind the prompts' `width`."""
        num_tokens = max(len(mark.encode()) for mark in stop) + 1

        def has_stopped(input_ids: torch.Tensor, _scores: torch.Tensor, **_: object) -> torch.Tensor:
            ends = self._decoded(input_ids[:, max(width, input_ids.shape[1] - num_tokens) :].tolist())
            return torch.tensor([any(mark in end for mark in stop) for end in ends], device=input_ids.device)

        return has_stopped

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

    def _score(self, rows: list["_Continued"]) -> list[list[LogLikelihood]]:
        """Return the log-likelihood of every row's options; logits are made at the positions that predict them only."""
        width = max(len(row.ids) for row in rows)
        input_ids = torch.full((len(rows), width), self._pad_id)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        predicts = torch.zeros((len(rows), width), dtype=torch.bool)
        for number, row in enumerate(rows):
            input_ids[number, : len(row.ids)] = torch.tensor(row.ids)
            mask[number, : len(row.ids)] = 1
            predicts[number, len(row.ids) - row.length : len(row.ids)] = True
        device = self._model.device
        base = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        inputs = {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}
        logits = logits_at(base, predicts.to(device), **inputs).float()
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


@dataclass
class _Pace:
    """The rows of a batch: as many as the one before would have had in BATCH_SECONDS, unless that is fixed."""

    size: int
    is_fixed: bool = False

    def took(self, num_rows: int, seconds: float) -> None:
        """Take note of how long a batch took."""
        if not self.is_fixed:
            in_time = int(num_rows * BATCH_SECONDS / max(seconds, 1e-9))
            self.size = max(1, min(BATCH_SIZE, num_rows * MOST_GROWTH, in_time))
