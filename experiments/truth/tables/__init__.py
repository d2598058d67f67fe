"""The tables of the bench of truth, a module a test: every ranker on the small models, held against
presences. `table(task)` prints a table, keeps it, and returns what was found, JSON.
"""
