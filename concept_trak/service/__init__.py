"""Questions over HTTP: the answers of `attribute`, from one model that stays loaded.

asked.py     what a request may hold, and the settings it stands for
desk.py      the queue and the one worker; what is accepted is written down and not lost
told.py      an answer's folder as JSON
guard.py     who may ask, from where, and how much of a body is read
app.py       the addresses; pages.py: those for a browser; counts.py: what is measured
command.py   the verb `serve`; bench.py: the verb `bench-service`
"""
