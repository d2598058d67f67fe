"""The tables of the bench of truth, a module a test: every ranker on the small models, held against
presences. `table(corpus)` prints a table, keeps it, and returns what was found, JSON.
"""
