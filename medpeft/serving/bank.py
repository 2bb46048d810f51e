"""Bank: many adapters on one base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.aside import recovered, require_acting
from ..adapters.forward import adapted_forward
from ..adapters.record import Adapted, applied, require_model
from ..adapters.running import counted, switching
from ..adapters.wiring import stay_wired
from ..checkpoint.header import content_digest
from ..checkpoint.save import checked_metadata
from ..checkpoint.source import Source
from ..checkpoint.state import Array
from ..errors import MedpeftError, clipped, require
from .base import Base
from .entry import BankEntry, Entries, entry_of_model, entry_of_state, read_entry, table_of
from .inputs import Inputs
from .mixed import run_mixed
from .proof import Fact, Proof
from .switch import InModel, take_out

State = Mapping[str, Tensor | Array]


class Bank:
    """Many adapters on one base: one is used, or each image of a batch has its own.

    The adapters may be of any methods and options, and their heads may differ in the number of classes. Each
    is kept once, as tensors in their own precision on the model's device. The base is not copied, but for
    the tensors that a selective method trains.

    Args:
        model: The base with its pretrained weights, on its device; or a model after `apply` or `load`.

    Raises:
        MedpeftError: the model is compiled, sharded, wrapped, or gave up the base's values
            (`keep_base=False`).

    Examples:
        >>> import copy, io, medpeft, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> files = {}
        >>> for seed, site in enumerate(["north", "south"]):
        ...     trained = medpeft.apply(copy.deepcopy(base), "ssf", init="official", seed=seed, head="1")
        ...     files[site] = io.BytesIO()
        ...     medpeft.save(trained, files[site], metadata={"classes": ["benign", "malignant"]})
        >>> bank = medpeft.Bank(base.eval())
        >>> for site, file in files.items():
        ...     bank.add(site, file)
        >>> x = torch.randn(3, 8)
        >>> mixed = bank(x, ["north", "south", "north"])
        >>> bank.use("south")
        >>> torch.allclose(base(x)[1], mixed[1], atol=1e-6)
        True
        >>> bank.names, bank.used, bank.metadata("north")["classes"]
        (('north', 'south'), 'south', ['benign', 'malignant'])
    """

    def __init__(self, model: nn.Module) -> None:
        require_model(model)
        with switching(model, "Bank"):
            self._base = Base(model)
            stay_wired(model, adapted_forward, self)
        self._in_model = InModel(self._base)
        self._entries = Entries()
        self._removed: list[Fact] = []
        self._digest = self._base_digest()

    def add(
        self,
        name: str,
        source: Source | State | None = None,
        *,
        like: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Add an adapter. Everything is checked first; a call that fails changes nothing.

        Args:
            name: Its name in the bank.
            source: A checkpoint as for `load`: a path, bytes, or an open file. Or a state, as `state` gives
                it. None takes the adapters that the model has at the moment.
            like: For a state, the name of an adapter in the bank of the same methods and options; None if it
                is of those that the model has at the moment.
            metadata: Whatever is worth knowing, in the place of what the file says; names of the classes
                belong under "classes".

        Raises:
            MedpeftError: the name is taken, or nothing was applied whose adapters could be taken.
            CheckpointError: the file is damaged, was trained on another base, has another head or values
                that are not finite; or the state does not fit.
        """
        require(isinstance(name, str) and bool(name), f"name={clipped(name)} must be text.")
        require(
            name not in self._entries, f"{name!r} is in the bank already: remove it, or take another name."
        )
        if metadata is not None:
            metadata = checked_metadata(metadata)
        with counted(self._base.model):  # So that no other thread is about to switch the model's adapters.
            self._notice_others()
        entry = self._read(name, source, like, metadata)
        # Where it will act there still are the base's values.
        self._base.keep(entry.kind.record, adapted=False)
        with switching(self._base.model, "add"):
            present = self._entries.setdefault(name, entry)
            require(present is entry, f"{name!r} is in the bank already: another thread added it.")
            self._in_model.recognise(entry)

    def _read(
        self, name: str, source: Source | State | None, like: str | None, metadata: Mapping[str, Any] | None
    ) -> BankEntry:
        """Read and check an adapter."""
        require(
            like is None or isinstance(source, Mapping),
            f"like={clipped(like)} is for a state: a file, and the model, say their methods and options.",
        )
        kinds = self._entries.kinds()
        if source is None:
            return entry_of_model(self._base, kinds, name, metadata)
        if not isinstance(source, Mapping):
            return read_entry(self._base, kinds, name, source, metadata)
        if like is not None:
            return entry_of_state(self._base, self._entries.named(like).kind, name, source, metadata)
        in_model = entry_of_model(self._base, kinds, name, metadata)
        return entry_of_state(self._base, in_model.kind, name, source, metadata)

    def use(self, name: str | None, *, discard: bool = False) -> None:
        """Make the model compute with an adapter, or with None as the base, bit for bit.

        Between adapters of one kind (the same methods, options and number of classes) values are written into
        the same tensors: optimizers keep theirs and a compiled model stays compiled. Otherwise adapters are
        taken out and others installed. Calls of the bank and of the model in other threads are waited for.

        Args:
            name: Name of the adapter.
            discard: Give up values that were trained since the last `use` and are not in the bank.

        Raises:
            MedpeftError: there is no such adapter; the model was adapted by other means than the bank, or
                trained since the last `use`; or the base has changed.
        """
        with switching(self._base.model, "use"):
            entry = None if name is None else self._entries.named(name)
            self._notice_others()
            self._base.require_unchanged()
            installed, changed = self._in_model.installed, []
            if installed is None:  # The base is in, or what others have applied.
                self._take_out_others(discard=discard)
            else:
                if installed.record.aside is not None:
                    require_acting(recovered(self._base.model, "use"), "use")
                installed.require_present(self._base.model)
                changed = installed.changed_since_installed()
                if changed and not discard:
                    raise installed.trained_error(changed)
            self._in_model.switch_to(entry, changed)

    @torch.no_grad()
    def __call__(self, x: Tensor, names: str | Iterable[str | None] | None, **inputs: Any) -> Any:
        """Compute each image of a batch with an adapter of its own, whatever the model uses at the moment.

        Images with adapters of one kind are computed together where its methods allow that (`by_image` in
        `register`) and every layer gets its rows image by image, which is tried out on the first batch. What
        comes out is then that of each image alone but for rounding. Elsewhere there is one forward for each
        adapter on its images, with the bits of `use` and a call of the model on these images.

        Args:
            x: The images along the first axis.
            names: Name of the adapter of each image, None for the base; or one for all of them.
            **inputs: Further inputs of the model. Tensors with as many rows as there are images are divided
                like these, also in lists and dicts.

        Returns:
            What the model returns for the batch. Where that has another shape for some images, as with heads
            of different sizes: a list of what it returns for each image, without the axis of the batch.

        Raises:
            MedpeftError: there is no such adapter, or not one name for each image; the model is in training
                mode; or the base has changed.
        """
        model = self._base.model
        require(
            isinstance(x, Tensor) and x.ndim > 0, "The bank takes images as a tensor, along its first axis."
        )
        if names is None or isinstance(names, str):
            names = [names] * len(x)
        require(isinstance(names, Iterable), f"names={clipped(names)} must be a name for each image.")
        names = list(names)
        require(len(x) == len(names) > 0, f"There are {len(names)} names for {len(x)} images.")
        with counted(model):  # A switch of the model's adapters waits for it.
            require(not model.training, "The model is in training mode: call model.eval() first.")
            self._notice_others()
            self._base.require_unchanged()
            self._base.require_same_modules()
            entries = [None if name is None else self._entries.named(name) for name in names]
            return run_mixed(self._base, entries, Inputs.of_batch(x, inputs))

    def remove(self, name: str) -> None:
        """Remove an adapter. Every other output keeps its bits, and `prove` says so.

        Raises:
            MedpeftError: there is no such adapter, or the model uses it.
        """
        with switching(self._base.model, "remove"):
            entry = self._entries.named(name)
            require(self.used != name, f"The model uses {name!r}: call use(None), or use another one first.")
            del self._entries[name]
            self._removed.append(Fact(name, entry.digest, now=""))

    def prove(self) -> Proof:
        """Compute the digests of the base and of every adapter, beside those of the beginning.

        The digest of an adapter is the `content` in the header of its file.
        """
        base = Fact("", self._digest, self._base_digest())
        adapters = []
        for name, entry in dict(self._entries).items():
            adapters.append(Fact(name, entry.digest, content_digest(entry.values)))
        return Proof(base, tuple(adapters), tuple(self._removed))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order in which they were added."""
        return tuple(self._entries)

    @property
    def used(self) -> str | None:
        """Name of the adapter that the model computes with, None for the base or what others have applied."""
        installed = self._in_model.installed
        if installed is None or applied(self._base.model) is not installed.record:
            return None
        return installed.name

    @property
    def bytes(self) -> int:
        """Memory that the tensors of all adapters take."""
        return sum(entry.bytes for entry in list(self._entries.values()))

    def metadata(self, name: str) -> dict[str, Any]:
        """Return what was saved with an adapter."""
        return dict(self._entries.named(name).metadata)

    def state(self, name: str) -> dict[str, Tensor]:
        """Copy the tensors of an adapter, as `medpeft.state` would of a model that uses it."""
        entry = self._entries.named(name)
        return {key: value.detach().cpu().clone() for key, value in entry.values.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        entries = list(self._entries.values())
        title = f"Bank of {len(entries)} adapters on {type(self._base.model).__name__}, using {self.used!r}"
        return str(table_of(entries, title))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise MedpeftError(
            "A bank is of one model and cannot be copied or pickled: copy the model, make a bank of the "
            "copy, and add the files."
        )

    def _notice_others(self) -> None:
        """Forget what is no longer in the model, and keep the base's values under adapters of others.

        No thread may be switching the model.
        """
        record, installed = applied(self._base.model), self._in_model.installed
        if installed is not None and record is not installed.record:
            self._in_model.installed = installed = None
        if installed is None and record is not None:
            self._base.keep(record)

    def _take_out_others(self, *, discard: bool) -> None:
        """Take out adapters that others installed; their values must be in the bank too, unless `discard`."""
        record = applied(self._base.model)
        if record is None:
            return
        digest = content_digest(Adapted.of(self._base.model).saved)
        known = any(entry.digest == digest for entry in list(self._entries.values()))
        require(
            known or discard,
            f"The model has adapters ({record.name}) whose values are not in the bank: add them under a name "
            "of their own, or pass discard=True.",
        )
        take_out(self._base, record)

    def _base_digest(self) -> str:
        return content_digest(self._base.tensors())
