"""What the library is measured by: benchmarks, retraining, tables and the models they need.

The library never imports from here.
"""

from concept_trak.registry import BENCHMARKS, RANKERS

BENCHMARKS.homes.append("experiments.benchmarks")
RANKERS.homes.append("experiments.emoji.classifier.ranker")
