"""What `fedcli doctor` looks at: this machine, and whether the workspace's experiment can run on it."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from fedcli.config import Config, TrainConfig
from fedcli.errors import ConfigError, FedError, RequirementError
from fedcli.observer import Observer
from fedcli.operations.finding import Finding, State
from fedcli.parties.party import trusts_code
from fedcli.quantities import describe_bytes, plural
from fedcli.tasks import TASKS
from fedcli.training.batches import LARGEST
from fedcli.workspace.federation_state import Experiment, FederationState, read_config
from fedcli.workspace.file_system_check import probe_file_system
from fedcli.workspace.history import is_initialised, read_identity
from fedcli.workspace.layout import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedcli.model.inspection import Inspection

PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "numpy", "filelock", "datasets"),
    *("pyarrow", "jinja2"),
)
OPTIONAL_PACKAGES = {"lm-eval": "eval", "scikit-learn": "eval", "matplotlib": "report", "dp-accounting": "privacy"}
OPTIONAL_PACKAGES |= {"obstore": "s3", "paramiko": "sftp"}
"""What an extra of fedcli brings, by its name on the index."""
HUB_TIMEOUT = 5.0
"""Seconds to wait for an answer of the hub."""


def examine(workspace: Workspace | None, *, observer: Observer) -> list[Finding]:
    """Look at Python, packages, devices, bitsandbytes, the sandbox, the hub and, where there is one, the workspace.

    What the experiment needs and has not is "failed"; what is missing and not needed, or cannot be told, a "warning".
    """
    experiment = None
    findings = [Finding("python", "ok", platform.python_version())]
    if workspace is not None:
        try:
            identity = read_identity(workspace) if is_initialised(workspace) else None
            experiment = Experiment(workspace, read_config(workspace), identity)
        except FedError as error:
            findings.append(Finding("fedcli.yaml", "failed", error.message, error.hint))
    config = None if experiment is None else experiment.config
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("packages", lambda: _packages(config)),
        ("devices", _devices),
        ("bitsandbytes", lambda: _bitsandbytes(config)),
        ("sandbox", _sandbox),
        ("hub", _hub),
    ]
    if workspace is not None:
        checks.append(("store" if workspace.store.is_remote else "file system", lambda: _place(workspace)))
    if experiment is not None and experiment.identity is not None and not experiment.config.privacy.is_off:
        checks.append(("privacy", lambda: _privacy(experiment.workspace)))
    if experiment is not None and experiment.identity is not None and experiment.config.federation.budget is not None:
        checks.append(("communication", lambda: _communication(experiment.workspace)))
    if experiment is not None:
        checks.append(("memory", lambda: _memory(experiment)))
    for name, check in checks:
        observer.checking(name)
        try:
            findings += check()
        except Exception as error:  # a look at a broken machine must not break
            cure = "Reinstall fedcli and its packages."
            findings.append(Finding(name, "failed", f"{type(error).__name__}: {error}", cure))
    return findings


def examine_model(name: str, *, root: Path, observer: Observer) -> "tuple[Inspection | None, list[Finding]]":
    """Return what a base model is, a folder's (relative to `root`) or one of the hub's cache, and its faults.

    No code that comes with it runs, and no weight is loaded. What the files leave open transformers decides, which is
    asked to make the model without weights.
    """
    from fedcli.model.base import find_base
    from fedcli.model.inspection import inspect

    observer.checking(name)
    try:
        found = inspect(find_base(name, revision=None, root=root, only_cached=True))
    except FedError as error:
        return None, [Finding("base model", "failed", error.message, error.hint)]
    findings = [Finding("base model", "failed", fault.message, fault.hint) for fault in found.faults]
    try:
        if not findings:
            found = _made_by_transformers(found)
            findings = [Finding("base model", "ok", _describe(found)), *_tokenizer(found)]
    except FedError as error:
        findings = [Finding("base model", "failed", error.message, error.hint)]
    findings += [Finding("tokenizer", "warning", note) for note in found.notes]
    return found, [*findings, *_properties(found)]


def _describe(found: "Inspection") -> str:
    size = f", {found.num_parameters:,} parameters" if found.num_parameters else ""
    return f"{found.architecture or found.kind}, {plural(found.num_layers or 0, 'layer')}{size}; nothing is missing"


def _made_by_transformers(found: "Inspection") -> "Inspection":
    """Make the model without weights, and its tokenizer; return what they tell.

    Raises FedError where they cannot be made.
    """
    from fedcli.data.encoding import Encoder
    from fedcli.model.loading import load_shapes, load_tokenizer
    from fedcli.model.targets import targets_of
    from fedcli.model.tokenizer_files import chat_abilities

    model = load_shapes(found.folder, revision=None, trust_remote_code=False)
    with suppress(ConfigError):  # none is usual for it
        found = replace(found, lora_targets=tuple(targets_of(model, None)))
    tokenizer = load_tokenizer(found.folder, trust_remote_code=False)
    found.check_tokenizer(tokenizer)
    Encoder(tokenizer)  # it needs an end of sequence
    return replace(found, tokenizer_size=max(tokenizer.get_vocab().values()) + 1, chat=chat_abilities(tokenizer))


def _tokenizer(found: "Inspection") -> Iterator[Finding]:
    yield Finding("tokenizer", "ok", f"{found.tokenizer_size:,} tokens, an embedding of {found.embedding_rows or 0:,}")
    abilities = found.chat
    if abilities is None:
        yield Finding("chat template", "ok", "none: data.template chat is not to be had")
    elif abilities.error is not None:
        cure = "Mend the base's chat_template.jinja (or tokenizer_config.json), or set data.template to another."
        yield Finding("chat template", "warning", f"writes nothing, it fails: {abilities.error}", cure)
    else:
        words = {"system": "a system turn", "tools": "tools", "thoughts": "thoughts", "several_turns": "several turns"}
        does = [text for name, text in words.items() if getattr(abilities, name)]
        lost = [text for name, text in words.items() if not getattr(abilities, name)]
        detail = f"writes {', '.join(does) or 'one turn'}" + (f"; does not write {', '.join(lost)}" if lost else "")
        yield Finding("chat template", "ok", detail)


def _properties(found: "Inspection") -> Iterator[Finding]:
    """Yield what is neither right nor wrong."""
    known = {
        "positions": f"{found.max_positions:,}, {found.positions}" if found.max_positions else None,
        "output head": {"tied": "tied to the embedding", "own": "its own"}.get(found.head or ""),
        "dropouts": ", ".join(f"{name} {value:g}" for name, value in found.dropouts.items() if value) or "none",
        "LoRA targets": ", ".join(found.lora_targets or ()) or None,
        "stored in": found.quantization,
        "memory": ", ".join(f"{name} {describe_bytes(size)}" for name, size in found.memory.items()) or None,
        "licence": found.licence,
    }
    yield from (Finding(name, "ok", detail) for name, detail in known.items() if detail)


def _packages(config: Config | None) -> Iterator[Finding]:
    for package in PACKAGES:
        try:
            yield Finding(package, "ok", metadata.version(package))
        except metadata.PackageNotFoundError:
            is_needed = package != "bitsandbytes" or _is_quantized(config)
            yield Finding(package, "failed" if is_needed else "warning", "not installed", f"pip install {package}")
    for package, extra in OPTIONAL_PACKAGES.items():
        try:
            yield Finding(package, "ok", metadata.version(package))
        except metadata.PackageNotFoundError:
            told = {
                "eval": "some benchmarks and splits need it",
                "report": "pictures need it",
                "privacy": "rows and groups need it",
            }[extra]
            yield Finding(package, "warning", f"not installed; {told}", f"pip install 'fedcli[{extra}]'")


def _is_quantized(config: Config | None) -> bool:
    return config is not None and config.model.quantization != "none"


def _devices() -> Iterator[Finding]:
    yield Finding(
        "cpu", "ok", f"{plural(os.cpu_count() or 1, 'core')}, {describe_bytes(_available_memory())} of memory available"
    )
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available():
        yield Finding("gpu", "warning", "none that torch can use", "Large models train far faster on a GPU.")
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        yield Finding(f"gpu {number}", "ok", f"{name}, {describe_bytes(free)} of {describe_bytes(total)} free")


def _bitsandbytes(config: Config | None) -> Iterator[Finding]:
    """Multiply two small matrices in int8 and nf4, and compare with the product in float32."""
    from fedcli.model.bitsandbytes import require_bitsandbytes

    bad: State = "failed" if _is_quantized(config) else "warning"
    try:
        require_bitsandbytes("int8")
        errors = _quantized_matmul_errors()
    except FedError as error:
        yield Finding("quantised matmul", bad, error.message, error.hint)
    except Exception as error:  # whatever a broken binary raises, it does not work here
        cure = "Reinstall bitsandbytes for this machine's torch and CUDA."
        yield Finding("quantised matmul", bad, f"{type(error).__name__}: {error}", cure)
    else:
        detail = ", ".join(f"{name} off by {error:.1%}" for name, error in errors.items())
        is_right = all(error < 0.25 for error in errors.values())
        yield Finding.of("quantised matmul", is_right, detail, "Reinstall bitsandbytes.", bad)


def _quantized_matmul_errors() -> dict[str, float]:
    """Return the relative error of a quantised product by kind."""
    import torch
    from bitsandbytes import functional
    from bitsandbytes.autograd._functions import matmul_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 64, generator=generator).to(device) for _ in range(2))
    exact = left @ right.T
    left8, left_scale, _ = functional.int8_vectorwise_quant(left.half())
    right8, right_scale, _ = functional.int8_vectorwise_quant(right.half())
    product = functional.int8_mm_dequant(functional.int8_linear_matmul(left8, right8), left_scale, right_scale)
    right4, state = functional.quantize_4bit(right, quant_type="nf4")
    products = {"int8": product.float(), "nf4": matmul_4bit(left, right4.t(), state)}
    return {name: float((product - exact).norm() / exact.norm()) for name, product in products.items()}


def _sandbox() -> Iterator[Finding]:
    """Run a small program in the sandbox that benchmarks of code use."""
    from fedcli.eval.sandbox import Sandbox

    try:
        Sandbox()
    except FedError as error:
        yield Finding("sandbox", "warning", error.message, error.hint)
    else:
        yield Finding("sandbox", "ok", "bubblewrap can run benchmarks of code")
    from fedcli.eval.programs import PACKAGES as PROGRAMS
    from fedcli.eval.programs import missing_programs

    missing = missing_programs(list(PROGRAMS))
    told = "; ".join(f"{name}: {missing.get(name, 'is there')}" for name in PROGRAMS)
    cure = "`fedcli eval list --group multiple` says which benchmarks need it; on Debian: apt-get install "
    cure += " ".join(PROGRAMS[name] for name in missing)
    yield Finding.of("other languages", not missing, told, cure, "warning")


def _hub() -> Iterator[Finding]:
    """Ask the hub for the head of its front page."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        cure = "Unset it to fetch models and rows by name."
        yield Finding("hub", "warning", "not asked: HF_HUB_OFFLINE is set", cure)
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception as error:  # which errors there are depends on the HTTP library that the hub's client uses
        cure = "Models and rows must lie in local folders, or in the hub's cache; $HF_ENDPOINT names a mirror."
        yield Finding("hub", "warning", f"{constants.ENDPOINT} cannot be reached: {error}", cure)
    else:
        yield Finding("hub", "ok", constants.ENDPOINT)


def _place(workspace: Workspace) -> Iterator[Finding]:
    if workspace.store.is_remote:
        from fedcli.operations.doctor_store import store_findings

        yield from store_findings(workspace)
        return
    cure = "Put the workspace on a file system that has this (docs/PROTOCOL.md); on Lustre mount it with -o flock."
    set_right = "Set this machine's clock (NTP): deadlines go by the server's."
    for name, problem in probe_file_system(workspace.root).items():
        if name == "clock":
            yield Finding.of("clock", not problem, problem or "as the file system's", set_right, "warning")
            continue
        yield Finding.of(f"disk: {name}", not problem, problem or str(workspace.root), cure)


def _privacy(workspace: Workspace) -> Iterator[Finding]:
    """Compare the noise of the latest round, unit client, with what it hides."""
    from fedcli.server.privacy_notes import cure_of_noise, describe_noise, is_too_noisy, noise_to_signal

    manifest = FederationState.open(workspace).head.manifest
    if noise_to_signal(manifest) is not None:
        cure = cure_of_noise(manifest)
        yield Finding.of("privacy", not is_too_noisy(manifest), describe_noise(manifest), cure, "warning")


def _communication(workspace: Workspace) -> Iterator[Finding]:
    """Compare what all rounds move with federation.budget."""
    from fedcli.server.communication_cost import describe_budget

    federation = FederationState.open(workspace)
    if (found := describe_budget(federation.head.manifest, federation.config.federation)) is not None:
        is_within, told, cure = found
        yield Finding.of("communication", is_within, told, cure, "warning")


def _memory(experiment: Experiment) -> Iterator[Finding]:
    """Compare what training is estimated to need with what the device has."""
    import torch

    from fedcli.model.loading import has_bfloat16
    from fedcli.model.memory_estimate import estimate_memory
    from fedcli.model.targets import targets_of

    config, train = experiment.config, experiment.config.train
    try:
        model, finding = _base_model(experiment)
    except FedError as error:
        yield Finding("base model", "failed", error.message, error.hint)
        return
    yield finding
    try:
        targets = targets_of(model, config.adapter.target_modules)
    except FedError as error:
        yield Finding("adapter", "failed", error.message, error.hint)
        return
    estimate = estimate_memory(
        model,
        quantization=config.model.quantization,
        rank=config.adapter.global_rank,
        target_modules=targets,
        rows=_rows_at_once(train, config.task, "cuda" if torch.cuda.is_available() else "cpu"),
        length=train.max_length,
        has_checkpointing=train.gradient_checkpointing,
        compute_bytes=2 if has_bfloat16() else 4,
    )
    available = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else _available_memory()
    detail = (
        f"about {describe_bytes(estimate.total)} "
        f"(weights {describe_bytes(estimate.weights)}, adapter {describe_bytes(estimate.adapter)}, "
        f"optimiser {describe_bytes(estimate.optimizer)}, activations {describe_bytes(estimate.activations)}) "
        f"of {describe_bytes(available)}"
    )
    cure = "Lower train.micro_batch_size or max_length, set train.gradient_checkpointing, or quantise the base."
    yield Finding.of("memory", estimate.total <= available, detail, cure)


def _base_model(experiment: Experiment) -> "tuple[PreTrainedModel, Finding]":
    """Return the base model without weights, and whether they are here and whole; nothing but config.json is fetched.

    Raises FedError where they are not, and the hub is not to be asked for them.
    """
    from huggingface_hub import constants

    from fedcli.model.base import find_base, is_hub_id
    from fedcli.model.inspection import inspect
    from fedcli.model.loading import load_shapes

    settings, root = experiment.config.model, experiment.workspace.root
    finding = Finding("base model", "ok", settings.base)
    source: Path | str
    try:
        source = find_base(settings.base, revision=settings.revision, root=root, only_cached=True)
    except RequirementError:
        if constants.HF_HUB_OFFLINE or not is_hub_id(settings.base, root):
            raise
        source, detail = settings.base, f"{settings.base}: the hub's cache does not hold its weights"
        finding = Finding("base model", "warning", detail, "The first command that needs them fetches them.")
    else:
        found = inspect(source, trust_remote_code=trusts_code(experiment)).require()
        max_length = experiment.config.train.max_length
        found.check_length(max_length)
        if notes := found.notes_for(max_length):
            finding = Finding("base model", "warning", f"{settings.base}: {'; '.join(notes)}")
    return load_shapes(source, revision=settings.revision, trust_remote_code=trusts_code(experiment)), finding


def _rows_at_once(train: TrainConfig, task: str, device: str) -> int:
    """Return the most rows, two for a pair, that a micro-batch may have where all are as long as they may be."""
    sides = TASKS[task].item.num_sides
    fitting = max(1, LARGEST[device] // (sides * train.max_length))
    return sides * (train.micro_batch_size or min(train.batch_size, fitting))


def _available_memory() -> int:
    """Return the bytes of main memory that a new process may use."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
