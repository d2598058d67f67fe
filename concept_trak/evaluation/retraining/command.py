"""`concept-trak truth --test lies|lds`: rankings held against retraining.

By default the table is made anew from the committed presences and from scores computed now on the
committed small models; RETRAIN=1 first trains what has no presences yet.
"""

from __future__ import annotations

from typing import Any

from ...flags import add_setting_flags
from ...settings import ROOT

KEPT = ROOT / "experiments/truth"  # plans, presences and tables that are committed
SEEDS = (0, 1, 2)
LDS_SUBSETS, LDS_AGAIN = 48, 16
TESTS = ("lies", "lds")
# stages and fields of `Settings` that its help shows
USES = ("truth", "methods", "rows", "projection", "query", "query_form", "scoring", "batch_size")


def add_parser(verbs: Any) -> None:
    """The sub-command `truth`: which test, and the flags of `Settings`."""
    says = "Hold rankings against what retraining a small model without pictures really does."
    sub = verbs.add_parser("truth", help=says, description=says)
    sub.add_argument("--test", choices=TESTS, required=True, help="which test (required)")
    add_setting_flags(sub, (*USES, "device", "gpu_id"))
    sub.set_defaults(run=run)
