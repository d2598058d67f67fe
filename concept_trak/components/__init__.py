"""Which weights carry a concept: component attribution (CAD) and edits of the weights it names.

roles.py       what a weight is for: feed-forward, cross-attention keys, ...; rows, heads, modules
objective.py   J of erasing and of amplifying, as cotangents on the states of `rows`
scores.py      alpha = w dJ/dw with its standard error, level by level
selection.py   scores -> the weights to edit; the published rule is the preset `paper`
operators.py   what becomes of them: zero, scale, mean, gradient steps
edits.py       an edit as a file that is applied and undone to the bit
export.py      an edited pipeline as a folder, beside the model that it came from
states.py      at which noise levels and pictures a concept is asked
concept.py     from a prompt to its scores and an edit; keep.py: scores on the disk
by_picture.py  images x weights: the influence of a training picture through a group of weights
"""
