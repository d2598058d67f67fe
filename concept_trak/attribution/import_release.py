"""The mask a run must project with, and the adoption of header-less gradients as a store that
records theirs.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..gradients.cuda_mask import GPUS, generator_name
from ..gradients.projection import make_projection
from ..gradients.projectors import CPU_GENERATOR
from ..store.store import Store
from .mask_detection import (
    RELEASE_SEED,
    AmbiguousMask,
    TensorLayout,
    identify_mask,
    parameter_counts,
    sd14_attn2_layout,
)


def resolve_mask(proj_mask: str, store_identity: dict | None = None) -> str:
    """The mask a run must use: "portable" or a key of GPUS.

    proj_mask: "auto", "portable" or a key of GPUS. store_identity: the identity (JSON) of the
    gradients the run has to agree with, or None when it computes new ones, for which auto means
    portable (as it does where another library drew the mask). Raises UserError for an unknown mask,
    a mask other than the store's (naming both), and a store that does not record one.
    """
    if proj_mask not in ("auto", "portable", *GPUS):
        raise UserError(
            f"PROJ_MASK={proj_mask!r} is unknown; set PROJ_MASK to auto, portable or "
            f"one of {', '.join(GPUS)}"
        )
    if store_identity is None:
        return "portable" if proj_mask == "auto" else proj_mask
    projection = store_identity.get("projection")
    if not projection:
        raise UserError(
            "these train gradients do not record their mask; remove their manifest.json and "
            "train_grad-*.json and run the same again, or set GRAD_DIR to another folder"
        )
    names, generator = ["portable"], projection.get("generator")
    own = not {"backend", "modules"} & projection.keys() and "input_dim" in projection
    if projection["kind"] == "random_mask" and own:
        made_by = {name: _generator(name, projection["input_dim"]) for name in ("portable", *GPUS)}
        names = [name for name, made in made_by.items() if made == generator]
    if not names:
        raise UserError(
            f"these train gradients were masked by {generator!r}, which this version cannot "
            "rebuild; update it: git pull"
        )
    if proj_mask != "auto" and proj_mask not in names:
        raise UserError(
            f"PROJ_MASK={proj_mask} but these train gradients were made with the mask {names[0]}; "
            f"set PROJ_MASK to auto or {names[0]}"
        )
    return names[0] if proj_mask == "auto" else proj_mask


def adopt_release(
    folder: Path,
    dim: int,
    proj_mask: str = "auto",
    layout: TensorLayout | None = None,
    verify: bool = True,
) -> Store:
    """Open the raw float32 shards of `folder` as a Store [N, dim] whose identity records the
    projection that made them.

    proj_mask: "auto" recognises the mask by the columns. A stated one ("portable" or a key of GPUS)
    is believed unless the columns clearly show another. layout: as for `identify_mask`. A folder
    that has its manifest is reopened and compared (verify: as for Store.open). The identity's
    "projection" is what the Projection's describe() gives, so that a query through any other mask
    is refused. Raises UserError as `resolve_mask`, `identify_mask`, `Store.adopt_raw` and
    `Store.open`.
    """
    folder, input_dim = Path(folder), int(parameter_counts(layout or sd14_attn2_layout()).sum())
    if (folder / "manifest.json").exists():
        identity = Store.open(folder, {"dim": dim}, verify=False).identity
        expected = _projection(input_dim, dim, resolve_mask(proj_mask, identity))
        return Store.open(folder, {"dim": dim, "projection": expected}, verify=verify)
    resolve_mask(proj_mask)
    raw = Store.raw_shards(folder, dim)
    try:
        found, evidence = identify_mask(raw, layout)
        if proj_mask not in ("auto", *evidence["masks"][0]["names"]):
            raise UserError(
                f"PROJ_MASK={proj_mask} but the columns of {folder} show the mask {found}; set "
                f"PROJ_MASK to auto or {found}"
            )
    except AmbiguousMask as unclear:
        if proj_mask == "auto":
            raise
        evidence = {"stated": proj_mask, "not recognised": str(unclear)}
    projection = _projection(input_dim, dim, found if proj_mask == "auto" else proj_mask)
    return Store.adopt_raw(folder, dim, {"projection": projection}, {"mask": evidence})


def _projection(input_dim: int, dim: int, mask: str) -> dict:
    """The description of a released artifact's projection, for its identity."""
    return make_projection("random_mask", input_dim, dim, RELEASE_SEED, mask=mask).describe()


def _generator(name: str, input_dim: int) -> str:
    return CPU_GENERATOR if name == "portable" else generator_name(name, input_dim)
