"""The server: video jobs, real-time sessions and a page, over HTTP and WebSocket.

    command.py     what `causalrt serve` does            app.py        the routes, put together
    settings.py    limits and places                     request_guard.py    what every request passes first
    auth.py        bearer tokens from a file             api_errors.py  errors as clients see them
    admission.py   who may begin: slots, queue, rate     metrics.py    what Prometheus scrapes
    engine_host.py the engine, loaded again if it dies   generation.py a thread that drives one session
    jobs.py        jobs and their order                  job_store.py    their files
    videos.py      /v1/videos                            realtime.py   /v1/realtime, with realtime_messages.py
    run.py         listening, and an end that loses nothing
    hosts.py       hosts and origins, compared           uvicorn_quirks.py  overrides of uvicorn's internals
    connections.py how many connections there may be, and how long one may be idle
    log_limit.py   how often the same message is logged

Everything but `generation.py` runs on one event loop, and needs no locks; a generation has a thread of its own. FastAPI and
uvicorn are imported when the server is started, not before.
"""
