"""The embedded model and data: the benchmark, the model, its classifier and the artwork."""
