"""How `--help` looks: panels on a terminal, plain text elsewhere, and examples that can be typed as they stand."""

import sys
from typing import Any

from fedcli.commands.output import terminal

PANELS = {
    "Begin": ("init", "doctor"),
    "Train": ("run", "client", "server", "slurm", "relay", "train-alone", "train-pooled", "study"),
    "Look at what came of it": ("status", "chat", "eval", "report", "data"),
    "Carry it": ("sync", "bundle"),
    "Keep it": ("verify", "privacy", "audit", "keys", "export", "gc"),
}
"""The commands of `fedcli --help`, by what they are for."""

EXAMPLES = {
    "init": (
        ("fedcli init study", "the demo: five clients, a built-in model"),
        ("fedcli init --list-presets", "what else there is"),
        ("fedcli init study --preset defaults --set data.source=rows.jsonl --set model.base=/models/llama", "your own"),
    ),
    "run": (
        ("fedcli run", "to the last round"),
        ("fedcli run --rounds 1 --workers 2", "one round, two clients at a time"),
    ),
    "status": (("fedcli status --watch", "a display that stays"),),
    "chat": (
        ('fedcli chat "What does the rain do to barley?"', "the latest round answers"),
        ("fedcli chat --compare", "a session with base, one client alone and the latest round"),
        ("cat prompt.txt | fedcli chat --round 3 --json", "one prompt of many lines, one document"),
    ),
    "report": (("fedcli report -o page", "page/report.html, and its pictures"),),
    "export": (
        ("fedcli export adapter --best demo", "the round that is best in a benchmark"),
        ("fedcli export model --merge --dtype bfloat16", "one model, with its tokenizer"),
    ),
    "privacy": (("fedcli privacy --id 2", "what client 2's rounds have spent"),),
    "verify": (("fedcli verify --json", "every fault, as one document"),),
    "doctor": (("fedcli doctor --model /models/llama", "what a base model is, and whether it will do"),),
    "audit plant": (
        ("fedcli audit plant --id 3 --canaries 64 --repeat 1,4,16", "then train rounds, of a federation for the audit"),
        ("fedcli audit plant --id 3 --remove", "what is trained from then on knows them no more"),
    ),
    "audit measure": (
        ("fedcli audit measure --id 3", "client 3's last update and the latest round, a table and a picture"),
        ("fedcli audit measure --id 3 --held-out data/held-out-test.jsonl --json", "its rows, too, as one document"),
    ),
    "sync": (
        ("fedcli sync study /mnt/stick/study", "a first copy, and later what it lacks"),
        ("fedcli sync --id 2 /mnt/shared/study study", "what party 2 needs; the other way what it sends"),
    ),
    "bundle round": (("fedcli bundle round /mnt/stick/round.bundle", "the latest round, for all parties"),),
    "bundle update": (("fedcli bundle update --id 2 /mnt/stick/2.bundle", "what party 2 has to send"),),
    "bundle import": (
        (
            "fedcli bundle import round.bundle -w study --server 3f1c-...",
            "a party's first",
        ),
        ("fedcli bundle import 2.bundle -w study", "later, and at the server"),
    ),
    "gc": (("fedcli gc --dry-run", "what would be removed"),),
    "train-alone": (("fedcli train-alone --id 0", "what client 0 reaches without the others"),),
    "train-pooled": (("fedcli train-pooled", "what all rows reach in one place"),),
    "client join": (("fedcli client join --id 2 --data rows.csv", "shows what the others will see, and asks"),),
    "client train": (
        ("fedcli client train --id 0", "one client"),
        ("fedcli client train --any", "all whose rows are here; as often as you like"),
    ),
    "client status": (("fedcli client status --id 0", "whether client 0 has something to do"),),
    "relay": (
        ("fedcli relay --id 2 -w /shared/national --from /shared/north", "the next thing due; the first call joins"),
    ),
    "server open": (("fedcli server open", "if `fedcli init` was interrupted"),),
    "server aggregate": (("fedcli server aggregate --partial", "with those who have answered"),),
    "server run": (("fedcli server run", "to the last round; stopped and started again, it goes on"),),
    "server score": (("fedcli server score", "where `fedcli server aggregate --no-score` merged"),),
    "server discard": (("fedcli server discard --id 2", "client 2 may send another update"),),
    "server enrol": (
        ("fedcli server enrol --id 2", "shows the fingerprint, and asks"),
        ("fedcli server enrol --id 2 --fingerprint 3f1c-...", "the one that the party read out"),
    ),
    "server revoke": (("fedcli server revoke --id 2", "client 2 is drawn no more, and its updates are refused"),),
    "client leave": (("fedcli client leave --id 2", "signed with client 2's key; the server obeys at its next merge"),),
    "keys rotate": (("fedcli keys rotate --id 2", "new keys for client 2, signed by its old ones"),),
    "keys show": (("fedcli keys show --json", "what `fedcli verify --trust FILE` takes, in a file"),),
    "data preview": (("fedcli data preview --id 0", "rows as client 0 trains on them"),),
    "data partition": (("fedcli data partition", "a split that was interrupted, or whose files are gone"),),
    "eval run": (
        ("fedcli eval demo", "base, baselines and the latest round"),
        ("fedcli eval mmlu gsm8k --round latest --base", "two benchmarks, two models"),
    ),
    "eval list": (("fedcli eval list --group finance", "one group: what it needs, and what is here"),),
    "eval fetch": (("fedcli eval fetch mt-bench fpb", "two benchmarks' files, once, for machines without a network"),),
    "eval best": (("fedcli eval best demo", "by the benchmark's first metric"),),
    "eval table": (("fedcli eval table --against best-alone", "differences to the best client alone"),),
    "study init": (
        ("fedcli study init --list", "the studies that there are"),
        ("fedcli study init demo mine --set eval.limit=60", "one of them, into the folder mine"),
    ),
    "study run": (("fedcli study run --workers 2", "all cells that are missing, two at a time"),),
    "study status": (("fedcli study status --json", "every cell, as one document"),),
    "study plot": (("fedcli study plot --format pdf", "the pictures for a paper"),),
    "study table": (
        ("fedcli study table --format latex", "the table for a paper"),
        ("fedcli study table --budget 20MB", "what each algorithm reaches with so much communication"),
        ("fedcli study table --goal fpb.accuracy=0.8", "and how much it needs to get there"),
    ),
    "study report": (("fedcli study report -o page", "page/report.html, the whole study in one file"),),
    "slurm script": (("fedcli slurm script", "the scripts to read, or to send by hand"),),
    "slurm submit": (("fedcli slurm submit --dry-run", "what would be sent"),),
}
"""Of commands by their full names: what to type, and what it does."""


def panel_of(name: str) -> str | None:
    """Return the panel in which `fedcli --help` lists a command, or None for one of a group."""
    return next((panel for panel, names in PANELS.items() if name in names), None)


def example_lines(name: str) -> list[str]:
    """Return a command's examples, each with what it does behind it, or below it where that would be too wide."""
    lines: list[str] = []
    width = max((len(typed) for typed, _ in EXAMPLES.get(name, ())), default=0)
    for typed, does in EXAMPLES.get(name, ()):
        lines += [f"{typed.ljust(width)}  # {does}"] if width < 50 else [f"# {does}", typed]
    return lines


def format_help(command: Any, name: str, ctx: Any, formatter: Any) -> bool:
    """Print a command's help in panels where stdout is a terminal; return whether it is, for rich is slow to load."""
    if not sys.stdout.isatty():
        return False
    from rich.panel import Panel
    from rich.text import Text
    from typer.rich_utils import rich_format_help

    rich_format_help(obj=command, ctx=ctx, markup_mode="rich")  # no help text holds a [tag]
    if lines := example_lines(name):
        text = Text("\n".join(lines))
        terminal().print(Panel(text, title="Examples", title_align="left", border_style="dim"))
    return True


def format_examples(name: str, formatter: Any) -> None:
    """Write a command's examples as they stand, behind plain help."""
    if lines := example_lines(name):
        with formatter.section("Examples"):
            for line in lines:
                formatter.write(f"  {line}\n")
