"""Does an edit of the weights that component attribution names erase a concept, and only that?

bed.py           models, prompts and pictures; the judge's rates before and after an edit
controls.py      other weights, as many and of the same layers
faithfulness.py  predicted against true effect of random knock-outs
tuning.py        ratio, selection, granularity and operator, on objects that are not reported
amplify.py       what was erased, and what the model draws worst, amplified
table.py         the table
told.py          the same in Markdown
attempts.py      one plan of many: its edit, screened and confirmed on other noise
verify.py        the search for an edit that meets a target, and the verdict
probes.py        can what was erased be had without its words?
certificate.py   the verdict as JSON, page and edit
"""
