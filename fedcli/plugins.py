"""What installed packages add to fedcli: entry points, read when a name is looked up and loaded when it is used.

A package adds an algorithm, a task, a format, a reward function or a benchmark with an entry point in the group
`fedcli.algorithms`, `fedcli.tasks`, `fedcli.formats`, `fedcli.rewards` or `fedcli.benchmarks`, whose name is the
thing's name.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, Literal, TypeVar

from fedcli.errors import RequirementError

Group = Literal["fedcli.algorithms", "fedcli.tasks", "fedcli.formats", "fedcli.rewards", "fedcli.benchmarks"]
OWN_PACKAGE = "fedcli"
T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Things of one kind by name: fedcli's own ones, then those of installed packages.

    `check` gets the name and what an entry point loaded, and returns it or raises ValueError. Looking up a name raises
    RequirementError where two packages give it, or where its package cannot be loaded; an unknown name is a KeyError.
    """

    def __init__(self, group: Group, own: Mapping[str, T], check: Callable[[str, object], T]) -> None:
        self._group = group
        self._own = dict(own)
        self._check = check
        self._loaded: dict[str, T] = {}
        self._refused: set[str] = set()

    @cached_property
    def _others(self) -> dict[str, EntryPoint]:
        """The entry points by name; none is loaded."""
        found: dict[str, EntryPoint] = {}
        for entry in sorted(_installed().select(group=self._group), key=lambda entry: (entry.name, _package(entry))):
            if entry.name in self._own or entry.name in found:
                first = OWN_PACKAGE if entry.name in self._own else _package(found[entry.name])
                raise RequirementError(
                    f"two packages give {entry.name!r} in {self._group}: {first} and {_package(entry)}",
                    hint=f"Uninstall one of them: `pip uninstall {_package(entry)}`.",
                )
            found[entry.name] = entry
        return found

    def add(self, name: str, thing: T) -> None:
        """Add a thing of this process alone; raise ValueError for a name that is taken."""
        if name in self:
            raise ValueError(f"{name!r} is taken: {self.package_of(name)} gives it")
        self._own[name] = self._check(name, thing)

    def package_of(self, name: str) -> str:
        """Return the name of the package that a known name comes from."""
        return OWN_PACKAGE if name in self._own else _package(self._others[name])

    def usable(self) -> Iterator[T]:
        """Yield the things that can be loaded; a warning is logged, once, for each that cannot."""
        others = self._others  # first, so that a name that two packages give is an error and no warning
        yield from self._own.values()
        for name in others:
            try:
                yield self[name]
            except RequirementError as error:
                if name not in self._refused:
                    import logging  # every command would pay for it

                    logging.getLogger(__name__).warning("fedcli: warning: %s", " ".join(str(error).split()))
                self._refused.add(name)

    def __getitem__(self, name: str) -> T:
        others = self._others  # first, so that a name that two packages give is an error for every name
        if name in self._own:
            return self._own[name]
        if name not in self._loaded:
            self._loaded[name] = self._load(others[name])
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._own
        yield from self._others

    def __len__(self) -> int:
        return len(self._own) + len(self._others)

    def __contains__(self, name: object) -> bool:
        return name in self._others or name in self._own

    def _load(self, entry: EntryPoint) -> T:
        try:
            return self._check(entry.name, entry.load())
        except (Exception, SystemExit) as error:  # whatever a stranger's module raises, its package is named
            raise RequirementError(
                f"{entry.name!r} of the package {_package(entry)} cannot be loaded: {type(error).__name__}: {error}",
                hint=f"Mend or uninstall that package: `pip uninstall {_package(entry)}`.",
            ) from error


@cache
def _installed() -> Any:
    """Return all entry points, of another type in Python 3.11 than later; finding them takes milliseconds."""
    return entry_points()


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value
