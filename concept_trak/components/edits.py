"""An edit of a model's weights as a file: safetensors of positions, old and new values.

    {name}/index [n] int64, {name}/old [n], {name}/new [n]        and what made it as metadata

An edit belongs to one model: it is refused where the network's shapes or its fp32 weights are
others than those it was made for. Edits of one model stack in any order; where two touch the same
weight, the later finds there what the earlier wrote, and undoing it, last first, puts that back. So
apply and undo are exact to the bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from ..atomic_io import write_bytes
from ..errors import UserError, script_hint
from ..validated_io import parse_json, read_safetensors, refuse_misfits, told
from .edit_operators import write_weights

MEND = f"make the edit again, e.g. {script_hint('cad/run_erase.sh', CONCEPT='cat')}"
FIELDS = ("index", "old", "new")

Change = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # index, old, new [n]


def network_hash(network: nn.Module) -> str:
    """sha256 over names, shapes and exact values of a network's weights: what an edit is bound to.

    Unlike `models.hashing` it tells fp16 and fp32 weights apart, since an edit holds values.
    """
    whole = hashlib.sha256()
    for name, weight in sorted(network.state_dict().items()):
        whole.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        whole.update(weight.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


@dataclass(frozen=True)
class Edit:
    """Values at flat positions. changes {name: (index [n], old [n], new [n])}. model: see
    `network_hash`, of the network before any edit. about: what made it (JSON). file: it was read
    from, for messages.
    """

    model: str
    changes: Mapping[str, Change]
    about: dict[str, Any] = field(default_factory=dict)
    file: str = "this edit"

    @property
    def count(self) -> int:
        """Scalars that it touches."""
        return sum(len(index) for index, _, _ in self.changes.values())

    def digest(self) -> str:
        """sha256 of what it does, whatever made it."""
        whole = hashlib.sha256(self.model.encode())
        for name, values in sorted(self.changes.items()):
            whole.update(name.encode())
            for part in values:
                whole.update(part.cpu().flatten().view(torch.uint8).numpy().tobytes())
        return whole.hexdigest()


def make_edit(
    network: nn.Module,
    new: Mapping[str, torch.Tensor],
    picked: Mapping[str, torch.Tensor],
    base: str = "",
) -> Edit:
    """The edit that writes `new` [n] at the positions `picked` [n] of a network.

    base: hash of the network without edits, where it has some or the hash is known.
    """
    weights, changes = dict(network.named_parameters()), {}
    for name, index in picked.items():
        old = weights[name].detach().flatten()[index.to(weights[name].device)].cpu()
        changes[name] = (index.cpu(), old, new[name].detach().cpu().to(old.dtype))
    return Edit(base or network_hash(network), changes)


def save_edit(path: Path, edit: Edit) -> None:
    """Write it. UserError for a disk that does not take it."""
    tensors = {
        f"{name}/{part}": value.contiguous()
        for name, values in edit.changes.items()
        for part, value in zip(FIELDS, values, strict=True)
    }
    facts = {"model": edit.model, "digest": edit.digest(), "about": json.dumps(edit.about)}
    write_bytes(path, save(tensors, metadata=facts))


def load_edit(path: str | Path) -> Edit:
    """Read what `save_edit` wrote. UserError for a file that is missing, cut off or no edit."""
    path = Path(path)
    tensors = read_safetensors(path, MEND)
    with safe_open(path, "pt") as file:
        facts = file.metadata() or {}
    if not {"model", "digest", "about"} <= facts.keys():
        raise UserError(f"{path} is no edit of a model's weights; {MEND}")
    about = parse_json(facts["about"], f"'about' of {path}", MEND, dict)
    changes = _changes(path, tensors)
    edit = Edit(facts["model"], changes, about, str(path))
    if edit.digest() != facts["digest"]:
        raise UserError(f"{path} is not what was written (its digest differs); {MEND}")
    return edit


def _changes(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Change]:
    """{weight: index, old, new} of a file's tensors. UserError that names the first that is none of
    an edit's.
    """
    changes: dict[str, Change] = {}
    wanted: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(key.rpartition("/")[0] for key in tensors):
        index, old, new = (tensors.get(f"{name}/{part}", torch.zeros(0)) for part in FIELDS)
        values = old if old.is_floating_point() else torch.zeros(0)
        flat = values.new_zeros(index.numel())
        wanted |= {f"{name}/index": flat.long(), f"{name}/old": flat, f"{name}/new": flat}
        changes[name] = index, old, new
    refuse_misfits(tensors, wanted, path, MEND)
    for name, (index, *_) in changes.items():
        if not len(index) or index.min() < 0 or len(index.unique()) < len(index):
            wrong = "holds no position, a negative one, or one twice"
            raise UserError(f"{path}: {told(f'{name}/index')} {wrong}; {MEND}")
    if not changes:
        raise UserError(f"{path} changes no weight; {MEND}")
    return changes


class EditedNetwork:
    """A network with a stack of edits on it. Attributes: network; base, its hash without edits;
    stack, the edits in the order they were applied.

    base: that hash, where it is known; of a network that was cast since, of what it was cast from.
    """

    def __init__(self, network: nn.Module, base: str = "") -> None:
        self.network, self.base = network, base or network_hash(network)
        self.stack: list[Edit] = []
        self._kept: list[dict[str, torch.Tensor]] = []  # what stood where each edit wrote

    def apply(self, edit: Edit) -> None:
        """Write the edit's new values. UserError for an edit of another model, or one that does not
        fit it; then nothing is written.
        """
        self._refuse_misfits(edit)
        weights, kept = dict(self.network.named_parameters()), {}
        for name, (index, _, new) in edit.changes.items():
            weight = weights[name]
            kept[name] = weight.detach().flatten()[index.to(weight.device)].clone()
            write_weights(weight, index.to(weight.device), new)
        self.stack.append(edit)
        self._kept.append(kept)

    def _refuse_misfits(self, edit: Edit) -> None:
        if edit.model != self.base:
            made_for = told(edit.about.get("model_path", edit.model[:10]))
            raise UserError(
                f"{edit.file} was made for another model ({made_for}); load that one with "
                "SD_MODEL_PATH and DTYPE, or make the edit again"
            )
        weights = dict(self.network.named_parameters())
        for name, (index, old, new) in edit.changes.items():
            weight = weights.get(name)
            wrong = ""
            if weight is None:
                wrong = "is no weight of this model"
            elif len(index) and index.max() >= weight.numel():
                wrong = f"has {weight.numel():,} values, and position {index.max():,} is to change"
            elif not new.to(weight).isfinite().all():
                wrong = f"has new values that {weight.dtype} cannot hold"
            elif not self._stood_there(name, index, old):
                wrong = "is not of the old values (edits that it was made on come first in EDITS)"
            if wrong:
                raise UserError(f"{edit.file}: {told(name)} {wrong}; {MEND}")

    def _stood_there(self, name: str, index: torch.Tensor, old: torch.Tensor) -> bool:
        """Whether each of these values is the model's own, or one that the stack wrote."""
        values = self.network.get_parameter(name).detach().flatten()
        index, old = index.to(values.device), old.to(values)
        found = values[index] == old
        for edit, kept in zip(reversed(self.stack), reversed(self._kept), strict=True):
            if not found.all() and name in kept:
                values = values.index_put((edit.changes[name][0].to(values.device),), kept[name])
                found |= values[index] == old
        return bool(found.all())

    def undo(self) -> Edit:
        """Take the last edit back, to the bit, and return it. UserError where there is none."""
        if not self.stack:
            raise UserError("there is no edit to undo; call apply first")
        weights, edit = dict(self.network.named_parameters()), self.stack.pop()
        for name, values in self._kept.pop().items():
            write_weights(weights[name], edit.changes[name][0].to(values.device), values)
        return edit

    def __enter__(self) -> EditedNetwork:
        return self

    def __exit__(self, *exc: object) -> None:
        while self.stack:
            self.undo()
