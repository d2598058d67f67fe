"""Which weights carry a concept: component attribution (CAD) and edits of the weights it names.

parameter_groups.py  what a weight is for: feed-forward, cross-attention keys, ...; rows, heads
objective.py         J of erasing and of amplifying, as cotangents
scores.py            alpha = w dJ/dw with its standard error, level by level
selection.py         scores -> the weights to edit; the published rule is the preset `paper`
edit_operators.py    what becomes of them: zero, scale, mean, gradient steps
edits.py             an edit as a file that is applied and undone to the bit
export.py            an edited pipeline as a folder, beside the model that it came from
states.py            at which noise levels and images a concept is scored
concept_plan.py      from a prompt to its scores and an edit; score_io.py: scores on the disk
data_influence.py    images x weights: the influence of an image through a group of weights
"""
