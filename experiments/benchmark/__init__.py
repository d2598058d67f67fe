"""Does it work: benchmarks, controls, tables."""
