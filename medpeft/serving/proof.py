"""Proof, by digests, that the base and every adapter are what they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..table import Table


@dataclass(frozen=True)
class Fact:
    """What a bank proves of its base or of one adapter.

    Attributes:
        name: Name of the adapter; "" for the base.
        before: Digest when the bank was made, or when the adapter was added.
        now: Digest now; "" of an adapter that was removed.
    """

    name: str
    before: str
    now: str

    @property
    def what(self) -> str:
        """The adapter, or the base, in words."""
        return repr(self.name) if self.name else "base"

    @property
    def verdict(self) -> str:
        """What became of it."""
        if not self.now:
            return "removed"
        return "unchanged" if self.now == self.before else "CHANGED"


@dataclass(frozen=True)
class Proof:
    """What became of the base and of every adapter that was ever in a bank. Print it.

    Attributes:
        base: The base.
        adapters: Every adapter in the bank.
        removed: Adapters that were removed, in order; a name that was used again is listed each time.

    Examples:
        >>> import medpeft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> bank = medpeft.Bank(medpeft.apply(model, "bias", head="1"))
        >>> bank.add("north")
        >>> bank.add("south")
        >>> bank.use(None)
        >>> bank.remove("north")
        >>> proof = bank.prove()
        >>> proof.holds, [fact.name for fact in proof.removed]
        (True, ['north'])
    """

    base: Fact
    adapters: tuple[Fact, ...]
    removed: tuple[Fact, ...]

    @property
    def holds(self) -> bool:
        """Whether the base and every adapter in the bank have the bits that they had at first."""
        return all(fact.now == fact.before for fact in (self.base, *self.adapters))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON."""
        described: dict[str, Any] = {"holds": self.holds}
        for field, facts in (("base", (self.base,)), ("adapters", self.adapters), ("removed", self.removed)):
            described[field] = [{"name": f.name, "before": f.before, "now": f.now} for f in facts]
        return described

    def __str__(self) -> str:
        rows = (self.base, *self.adapters, *self.removed)
        return str(Table("proof", rows, ("what", "before", "now", "verdict"), summed=False))
