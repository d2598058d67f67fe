"""AbC in small: exemplars that the embedded model never saw, tokens learned from them, and whether
a ranking finds them among the training pictures.
"""
