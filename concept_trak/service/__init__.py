"""Questions over HTTP: the answers of `attribute`, from one model that stays loaded.

app.py              the addresses
request_schema.py   what a request may hold, and the settings it stands for
response_schema.py  an answer's folder as JSON
job_queue.py        the queue and its one worker; accepted questions are saved and not lost
middleware.py       who may ask, from where, and how much of a body is read
html.py             pages for a browser; metrics.py: what is measured
outgoing.py         which files and texts may leave
server.py           the verb `serve`
"""
