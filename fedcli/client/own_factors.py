"""What aggregation.share asks of a client: which factors stay as they are, and which it keeps to itself."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedcli.algos import Algorithm, Array, Arrays, ClientRule
from fedcli.algos.share import freezing, own_without_unsent
from fedcli.workspace.client_state import OWN_FACTORS
from fedcli.workspace.records import Manifest


@dataclass(frozen=True)
class OwnFactors:
    """A round's `share` at one client; where there is none it changes nothing."""

    manifest: Manifest
    algorithm: Algorithm

    @property
    def unshared(self) -> set[str]:
        """The tensors that updates do not carry because of it."""
        return self.manifest.unshared_tensors

    @property
    def own(self) -> set[str]:
        """Those that the client trains all the same, and keeps."""
        return self.manifest.own_tensors

    def put_in(self, adapter: Arrays, kept: Mapping[str, Arrays]) -> "dict[str, Array]":
        """Return x for this client: with its own factors in place of the round's, once it has some."""
        return {**adapter, **kept.get(OWN_FACTORS, {})}

    def rule(self, rule: ClientRule | None, adapter: Arrays) -> ClientRule | None:
        """Return what the client does beside plain training: what it neither sends nor keeps is frozen."""
        return freezing(rule, self.unshared - self.own, adapter)

    def without_unsent(self, own: "dict[str, Array]", before: Arrays) -> "dict[str, Array]":
        """Return what the client keeps for its algorithm, of which it says nothing new of what it does not send."""
        return own_without_unsent(self.algorithm, own, self.unshared, before) if self.unshared else own

    def kept(self, trained: Arrays) -> "dict[str, dict[str, Array]]":
        """Return the factors that the client keeps, by folder."""
        if not self.own:
            return {}
        return {OWN_FACTORS: {name: trained[name] for name in sorted(self.own)}}
