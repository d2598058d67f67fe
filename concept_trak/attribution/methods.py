"""The rankers that the evaluation compares, by their names in METHODS.

| method | train cotangent | unit norm | row weight | query | source |
|---|---|---|---|---|---|
| concept_trak | the settings' F | NORMALIZE | F's | one row a concept | Concept-TRAK (ICLR 2026) |
| reference | dps, by inversion | yes | 1 | one row a concept | the same, as published |
| contrast, presence, dps, dsm | of that name | yes | 1 | one row a concept | `objectives` |
| trak | dsm | no | 1 | whole picture | Park et al. 2023; Zheng et al. 2024, "TRAK" |
| d_trak | dtrak | no | 1 | whole picture | Zheng et al. 2024 |
| das | das | yes | loss | whole picture | Lin et al. 2025, in Concept-TRAK's L1 form |
| das_paper | das_mean | yes | residual | whole picture | Lin et al. 2025, squared, leave-one-out |
| journey_trak | dsm | no | 1 | its sampling path | Georgiev et al. 2023 |
| grad_dot, grad_cos | dsm | no | 1, 1/norm | whole picture | TracIn, at the one checkpoint |
| relative_influence | dsm | no | 1/norm of z | whole picture | Barshan et al. 2020 |

and, without rows: ekfac (`attribution.ekfac`), abu, abu_plus, mucs (`attribution.unlearning`),
nda (`patches`). Beyond the first four a method is compared where METHODS names it.

All with rows read the same projection of the same parameters at the same states q(x_t | x0),
unless the settings ask for an inversion. Beside them the controls of `controls`. To add one, see
`attribution.attributors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..registry import RANKERS
from ..settings import RECIPES
from . import baselines, nda  # noqa: F401  registers them

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from ..settings import Settings
    from ..store.store import Store
    from .attributors import Attributor, GradientAttributor
    from .question import Query
    from .task import AttributionTask


@dataclass(frozen=True)
class GradientMethod:
    """What distinguishes a method by gradients.

    f: its objective; empty keeps the settings' rows. per_concept: a query row for each concept.
    recipe: whose rows it has, before f. on_request: left out where METHODS is empty. by: the class
    of `attribution.attributors` or `attribution.gradient_variants` that ranks by these rows.
    """

    name: str
    f: str = ""
    normalize: bool = False
    per_concept: bool = False
    recipe: str = "default"
    on_request: bool = False
    by: str = "GradientAttributor"

    def settings_for(self, settings: Settings) -> Settings:
        """Rivals keep model, layer, projection and, but for a recipe of their own, the number of
        states.
        """
        if self.recipe != "default":
            own = {k: v for k, v in RECIPES[self.recipe].items() if k != "scope"}
            return settings.but(**own, recipe=self.recipe)
        if not self.f:
            return settings
        own = {"f": self.f, "normalize": self.normalize}
        return settings.but(**own, ddim_inversion=False, recipe="default")

    def __call__(self, task: AttributionTask) -> GradientAttributor:
        """The ranker; computes train rows that are not there yet."""
        from . import gradient_variants

        own = task.with_settings(self.settings_for(task.settings))
        made: type[GradientAttributor] = getattr(gradient_variants, self.by)
        return made(own, open_or_compute_store(own), self.per_concept, self._stored_rows)

    def _stored_rows(self, ranker: GradientAttributor, questions: list[Query]) -> np.ndarray:
        """[Q, k] query rows in a store of their own: resumed when killed, reused if unchanged."""
        from tqdm import tqdm

        from ..settings import short_hash
        from ..store.manifest import Layout
        from ..store.store import Store
        from .naming import store_base

        made_from = {"method": self.name, "rows": [ranker.identity(q) for q in questions]}
        kind = next(iter(questions[0].picture.source), "given")
        grads, dim = store_base(ranker.task.settings), ranker.task.projection.proj_dim
        folder = grads / f"queries-{self.name}-{kind}-{short_hash(made_from)}"
        layout = Layout(len(questions), dim, 1, "float32")
        store = Store.create(
            folder, layout, {"method": self.name, "made_from": short_hash(made_from)}
        )
        if store.pending():
            todo = range(store.resume_row(0), len(questions))
            for i in tqdm(todo, desc=f"queries {self.name} {kind}"):
                store.append(0, ranker.row(questions[i]), i)
            store.finish(0)
        return store.rows(range(store.num_rows))


@dataclass(frozen=True)
class NoStoreMethod:
    """A ranker of `attribution` that keeps no rows: its module there, and its class."""

    module: str
    by: str
    on_request: bool = True

    @property
    def candidates(self) -> tuple[float, ...]:
        """The steps among which one is chosen as dampings are; none for a ranker without."""
        return getattr(self._made, "candidates", ())

    def __call__(self, task: AttributionTask) -> Attributor:
        """The ranker; losses and gradients are those of TRAK's rows: dsm, noised states."""
        settings = task.settings.but(f="dsm", ddim_inversion=False, recipe="default")
        return self._made(task.with_settings(settings))

    @property
    def _made(self) -> Any:
        from importlib import import_module

        return getattr(import_module(f".{self.module}", __package__), self.by)


def swept(ranker: Any, questions: Sequence[Query]) -> np.ndarray:
    """[D, Q, N]: scores at each damping of a ranker, or at each candidate for its step."""
    if not hasattr(ranker, "candidates"):
        return ranker.rank(questions)
    import numpy as np

    return np.concatenate([ranker.at(i).rank(questions) for i in range(len(ranker.candidates))])


def open_or_compute_store(task: AttributionTask) -> Store:
    """The train rows of the settings: the committed or an earlier store, else computed now."""
    from ..errors import UserError
    from .train_grad import open_store, train_grad

    try:
        return open_store(task)
    except UserError:  # missing or unfinished; a store of something else is refused again below
        train_grad(task)
        return open_store(task)  # refuses one of which SHARDS left a part to others


for method in (
    GradientMethod("concept_trak", per_concept=True),
    GradientMethod("trak", "dsm"),
    GradientMethod("d_trak", "dtrak"),
    GradientMethod("das", "das", normalize=True),
    GradientMethod("reference", per_concept=True, recipe="reference", on_request=True),
    GradientMethod("contrast", "contrast", True, True, on_request=True),
    GradientMethod("presence", "presence", True, True, on_request=True),
    GradientMethod("dps", "dps", True, True, on_request=True),
    GradientMethod("dsm", "dsm", True, True, on_request=True),
    GradientMethod("das_paper", "das_mean", True, by="DasLeaveOneOut", on_request=True),
    GradientMethod("journey_trak", "dsm", by="JourneyTrak", on_request=True),
    GradientMethod("grad_dot", "dsm", by="GradDot", on_request=True),
    GradientMethod("grad_cos", "dsm", by="GradCos", on_request=True),
    GradientMethod("relative_influence", "dsm", by="RelatIF", on_request=True),
):
    RANKERS.add(method.name, method)
RANKERS.add("ekfac", NoStoreMethod("ekfac", "EkfacAttributor"))
RANKERS.add("abu", NoStoreMethod("unlearning", "AbU"))
RANKERS.add("abu_plus", NoStoreMethod("unlearning", "AbuPlus"))
RANKERS.add("mucs", NoStoreMethod("unlearning", "MUCS"))
