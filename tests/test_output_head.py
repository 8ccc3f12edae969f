"""Bases whose own code makes logits in ways of its own: their losses are those of their own full logits."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import TINY
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from fedcli import Federation
from fedcli.data.encoded import EncodedExample, EncodedRow
from fedcli.errors import RequirementError
from fedcli.model.library_logging import quiet_libraries
from fedcli.model.likelihood import collate, supervised_cross_entropy
from fedcli.model.lora import AdaptedModel, lora_config
from fedcli.model.output_head import logits_at, probe

CODE = """
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import GenerationMixin, LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

class Config(LlamaConfig):
    pass

class Base(LlamaPreTrainedModel, GenerationMixin):
    config_class = Config
    _tied_weights_keys = {}

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.post_init()

    def hidden(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]

    def logits(self, input_ids, attention_mask=None):
        return linear(self.hidden(input_ids, attention_mask), self.model.embed_tokens.weight)

    def get_output_embeddings(self):
        return None

class Model(Base):
"""
FORWARD = """
    def forward(self, input_ids, attention_mask=None, **kwargs):
        return CausalLMOutput(logits=self.logits(input_ids, attention_mask))
"""
FORMS = {
    "names its embeddings": FORWARD
    + "\n    def get_output_embeddings(self):\n        return self.model.embed_tokens\n",
    "names no head": FORWARD,
    "cannot say": FORWARD + "\n    def get_output_embeddings(self):\n        raise NotImplementedError\n",
    "names a module that it does not call": FORWARD
    + "\n    def get_output_embeddings(self):\n        return self.model.norm\n",
    "keeps the last logits by default": """
    def forward(self, input_ids, attention_mask=None, use_cache=None, logits_to_keep=1):
        return CausalLMOutput(logits=self.logits(input_ids, attention_mask)[:, -logits_to_keep:])
""",
    "keeps the last logits by an older name": """
    def forward(self, input_ids, attention_mask=None, use_cache=None, num_logits_to_keep=1):
        hidden = self.hidden(input_ids, attention_mask)[:, -num_logits_to_keep:]
        return CausalLMOutput(logits=linear(hidden, self.model.embed_tokens.weight))
""",
    "flattens its logits": """
    def forward(self, input_ids, attention_mask=None, **kwargs):
        return CausalLMOutput(logits=self.logits(input_ids, attention_mask).flatten(0, 1))
""",
    "returns a tuple": """
    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return (self.logits(input_ids, attention_mask),)
""",
    "returns a dict, and takes tokens alone": """
    def forward(self, input_ids):
        return {"logits": self.logits(input_ids)}
""",
    "mixes each position with the one before": """
    def forward(self, input_ids, attention_mask=None, **kwargs):
        logits = self.logits(input_ids, attention_mask)
        return CausalLMOutput(logits=logits + 0.5 * torch.cat([logits[:, :1], logits[:, :-1]], 1))
""",
    "scales by position": """
    def forward(self, input_ids, attention_mask=None, **kwargs):
        logits = self.logits(input_ids, attention_mask)
        return CausalLMOutput(logits=logits * torch.linspace(0.5, 2, 512)[: logits.shape[1], None])
""",
    "reshapes what its head sees": """
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden = self.hidden(input_ids, attention_mask)
        return CausalLMOutput(logits=self.lm_head(hidden.flatten(0, 1)).view(*input_ids.shape, -1))

    def get_output_embeddings(self):
        return self.lm_head
""",
    "calls its head by its weights": """
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return CausalLMOutput(logits=linear(self.hidden(input_ids, attention_mask), self.lm_head.weight))

    def get_output_embeddings(self):
        return self.lm_head
""",
    "drops by a function with a rate of its own": """
    def forward(self, input_ids, attention_mask=None, **kwargs):
        logits = self.logits(input_ids, attention_mask)
        return CausalLMOutput(logits=nn.functional.dropout(logits, 0.3, training=self.training))
""",
}
IN_DEFAULT_SUITE = ("names its embeddings", "names no head", "keeps the last logits by default")
REFUSED = {
    "gives the last logits only": (
        """
    def forward(self, input_ids, attention_mask=None, **kwargs):
        return CausalLMOutput(logits=self.logits(input_ids, attention_mask)[:, -1])
""",
        "returns logits of shape",
    ),
    "puts time first": (
        """
    def forward(self, input_ids, attention_mask=None, **kwargs):
        return CausalLMOutput(logits=self.logits(input_ids, attention_mask).transpose(0, 1))
""",
        "returns logits of shape",
    ),
    "looks ahead": (
        """
    def forward(self, input_ids, attention_mask=None, **kwargs):
        logits = self.logits(input_ids, attention_mask)
        return CausalLMOutput(logits=logits + logits.roll(-1, 1))
""",
        "a token's logits depend on later tokens",
    ),
    "takes the mean of all positions away": (
        """
    def forward(self, input_ids, attention_mask=None, **kwargs):
        logits = self.logits(input_ids, attention_mask)
        return CausalLMOutput(logits=logits - logits.mean(1, keepdim=True))
""",
        "a token's logits depend on later tokens",
    ),
}


def write_base(folder: Path, forward: str) -> Path:
    """Save the built-in base, tied, under a model class of its own."""
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"]
    config |= {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Model"]}))
    (folder / "own.py").write_text(CODE + forward)
    return folder


def load(folder: Path) -> AdaptedModel:
    config = lora_config(rank=4, alpha=8, dropout=0.0, target_modules=["q_proj"], base=None)
    return AdaptedModel(folder, config, trust_remote_code=True)


def row(*lengths: int) -> EncodedRow:
    """Return sides of so many tokens, half of which are supervised."""
    generator = np.random.default_rng(sum(lengths))
    sides = [
        EncodedExample(generator.integers(3, 900, length).astype(np.int32), np.arange(length) >= length // 2)
        for length in lengths
    ]
    return EncodedRow(tuple(sides))


def own_losses(model: Any, examples: tuple[EncodedExample, ...]) -> torch.Tensor:
    """Return -log p of the supervised tokens, of a plain Llama's or of the model's own full logits."""
    found = []
    for example in examples:
        ids = torch.from_numpy(example.ids).long()
        log_probs = model(ids[None])[0, :-1].log_softmax(-1)
        picked = -log_probs[torch.arange(len(ids) - 1), ids[1:]]
        found.append(picked[torch.from_numpy(example.supervised)[1:]])
    return torch.cat(found)


def full_logits(form: str, plain: LlamaForCausalLM) -> Any:
    """Return what makes a form's logits of token ids: a plain Llama's, and what the form does to them."""

    def logits(ids: torch.Tensor) -> torch.Tensor:
        made = plain(input_ids=ids).logits
        if form == "mixes each position with the one before":
            return made + 0.5 * torch.cat([made[:, :1], made[:, :-1]], 1)
        return made * torch.linspace(0.5, 2, 512)[: ids.shape[1], None] if form == "scales by position" else made

    return logits


@pytest.mark.parametrize(
    "form", [form if form in IN_DEFAULT_SUITE else pytest.param(form, marks=pytest.mark.slow) for form in FORMS]
)
def test_the_loss_is_that_of_the_models_own_full_logits(form: str, tmp_path: Path) -> None:
    adapted = load(write_base(tmp_path / "base", FORMS[form]))
    plain = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    examples = row(9, 14, 5).sides
    adapted.start_training(has_dropout=True, has_checkpointing=False)
    with torch.no_grad():
        expected = own_losses(full_logits(form, plain), examples)
        found, rows = supervised_cross_entropy(adapted.base, collate(examples, adapted.pad_id))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert rows.tolist() == [0] * 5 + [1] * 7 + [2] * 3


@pytest.mark.parametrize(
    "form", [form if form == "looks ahead" else pytest.param(form, marks=pytest.mark.slow) for form in REFUSED]
)
def test_a_base_without_logits_of_each_token_or_that_looks_ahead_is_refused(form: str, tmp_path: Path) -> None:
    forward, problem = REFUSED[form]
    with pytest.raises(RequirementError, match=problem):
        load(write_base(tmp_path / "base", forward))


def test_a_bidirectional_model_is_refused_and_keeps_its_mode() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    for is_decoder in (True, False):
        model = BertLMHeadModel(BertConfig(vocab_size=61, is_decoder=is_decoder, **sizes)).train()
        if is_decoder:
            probe(model)
        else:
            with pytest.raises(RequirementError, match="no causal language model"):
                probe(model)
        assert all(module.training for module in model.modules())


def test_the_head_of_an_ordinary_model_sees_the_asked_positions_only() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes)).eval()
    seen: list[tuple[int, ...]] = []
    probe(model)
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: seen.append(tuple(output.shape)))
    positions = torch.zeros(3, 8, dtype=torch.bool)
    positions[0, 2] = positions[1, 5] = True
    ids = torch.arange(24).view(3, 8)
    logits = logits_at(model, positions, input_ids=ids)
    assert seen == [(2, 61)]
    torch.testing.assert_close(logits, model(input_ids=ids).logits[positions], rtol=0, atol=1e-6)


def test_a_base_that_cannot_generate_trains_all_the_same(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", FORMS["names no head"])
    code = (base / "own.py").read_text().replace("(LlamaPreTrainedModel, GenerationMixin)", "(LlamaPreTrainedModel)")
    (base / "own.py").write_text(code)
    adapted, usual = load(base), load(TINY)
    assert adapted.parameters.keys() == usual.parameters.keys()


@pytest.mark.slow
def test_a_federation_of_such_a_base_trains_aligns_and_merges_as_one_of_the_plain_base(tmp_path: Path) -> None:
    bases = [TINY, write_base(tmp_path / "base", FORMS["names its embeddings"])]
    for task in ("sft", "dpo"):
        losses = []
        for number, base in enumerate(bases):
            overrides: dict[str, object] = {
                "task": task, "model.base": str(base), "model.trust_remote_code": True, "data.source": "builtin:demo",
                "federation.clients": 2, "federation.rounds": 1, "train.steps": 2, "train.batch_size": 4,
                "adapter.target_modules": ["q_proj"],
            }  # fmt: skip
            federation = Federation.create(tmp_path / f"{task}{number}", preset="defaults", settings=overrides)
            training = federation.client(0).train().training
            assert training is not None
            losses.append(training.losses)
            federation.server.aggregate(partial=True)
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    federation.export(tmp_path / "merged", merge=True)
    ids = torch.arange(3, 20)[None]
    logits = []
    for folder in (tmp_path / "merged", tmp_path / "base"):
        with quiet_libraries(), torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
            logits.append(model(input_ids=ids).logits)
    assert float((logits[0] - logits[1]).abs().max()) > 1e-6
