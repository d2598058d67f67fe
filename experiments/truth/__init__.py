"""The bench of truth: does a score say what training on a picture did? Only retraining tells.

`plan` says which pictures, under which captions, a small model learns; `trainer` trains one, seeded
and resumable; `fleet` trains all of a plan, a process a core; `presence` measures how much a
model knows of each concept; the tests hold rankings against that: `lies`, `hidden`,
`counterfactual`, `lds`. Any ranker of `attribution.methods` can be asked.
"""
