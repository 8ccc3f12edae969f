"""The vLLM backend, without vLLM: what it would be asked. It has never run for real here, for it needs a GPU."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from support.processes import fedcli

from fedcli.data.conversation import Turn
from fedcli.data.encoding import Encoder
from fedcli.eval.requests import Generation, Likelihood, LogLikelihood
from fedcli.eval.vllm_model import VllmModel
from fedcli.model.base import find_base, load_tokenizer

TINY = find_base("builtin:tiny", revision=None, root=Path())


class Engine:
    """Stands for vllm.LLM: answers every prompt with two tokens, and rates each prompt token by its position."""

    def __init__(self, **options: object) -> None:
        self.options = options
        self.asked: list[tuple] = []
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(hf_config=SimpleNamespace(max_position_embeddings=64))
        )

    def generate(self, prompts: list[dict], settings: list, *, lora_request: object, use_tqdm: bool) -> list:
        self.asked.append((prompts, settings, lora_request))
        return [
            SimpleNamespace(
                prompt_token_ids=prompt["prompt_token_ids"],
                outputs=[SimpleNamespace(text=" yes\nno", token_ids=[1, 2])],
                prompt_logprobs=[
                    {token: SimpleNamespace(logprob=-float(position), rank=1 + position % 2)}
                    for position, token in enumerate(prompt["prompt_token_ids"])
                ],
            )
            for prompt in prompts
        ]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names as vLLM documents them."""
    package, lora = ModuleType("vllm"), ModuleType("vllm.lora.request")
    package.LLM, package.SamplingParams = Engine, SimpleNamespace
    lora.LoRARequest = lambda name, number, path: (name, number, path)
    for name, module in (("vllm", package), ("vllm.lora", ModuleType("vllm.lora")), ("vllm.lora.request", lora)):
        monkeypatch.setitem(sys.modules, name, module)


def test_it_is_asked_for_the_prompts_of_the_template_with_the_adapters_folder(vllm: None) -> None:
    tokenizer = load_tokenizer(TINY, trust_remote_code=False)
    encoder = Encoder(tokenizer, "alpaca")
    model = VllmModel(TINY, tokenizer, encoder, rank=32)
    assert model._llm.options == {"model": str(TINY), "enable_lora": True, "max_lora_rank": 32}
    model.load_folder(Path("rounds/00003/adapter"))
    prompt = (Turn("user", "say yes"),)
    answers: dict[int, str] = {}
    model.generate([Generation(prompt, 8, ("\n",), temperature=0.7, top_p=0.9)], answers.__setitem__)
    assert answers == {0: " yes"}
    ((prompts, (settings,), lora),) = model._llm.asked
    assert prompts == [{"prompt_token_ids": encoder.prompt(prompt)[-(64 - 8) :]}]
    assert (settings.max_tokens, settings.temperature, settings.top_p, settings.stop) == (8, 0.7, 0.9, ["\n"])
    assert settings.stop_token_ids == [encoder.end_id]
    assert lora == ("adapter-1", 1, "rounds/00003/adapter")
    assert model.usage.num_generated_tokens == 2


def test_a_continuations_likelihood_is_the_sum_over_its_tokens(vllm: None) -> None:
    tokenizer = load_tokenizer(TINY, trust_remote_code=False)
    model = VllmModel(TINY, tokenizer, Encoder(tokenizer, "alpaca"), rank=32)
    found: dict[int, LogLikelihood] = {}
    model.log_likelihoods([Likelihood("abc", "de")], found.__setitem__)
    length = len(tokenizer("abcde")["input_ids"])
    num = length - len(tokenizer("abc")["input_ids"])
    assert found == {0: LogLikelihood(-float(sum(range(length - num, length))), False, num)}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm_the_command_says_what_it_needs(small: Path) -> None:
    done = fedcli("eval", "demo", "--base", "--backend", "vllm", cwd=small)
    assert done.returncode == 8
    assert "pip install 'fedcli[vllm]'" in done.stderr
