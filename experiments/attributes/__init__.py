"""The tables of the paper on labelled pictures: Synthetic, CelebA-HQ, and faces that are drawn.

A class-conditional model learns pictures of all combinations of attributes but some; it draws both;
each attribute of each drawing is a question. `questions` asks, `stages` runs from nothing to rows,
`scored` keeps what every ranker found, `table` tells it; `truth` holds it against retraining.
"""
