"""The server: video jobs, real-time sessions and a page, over HTTP and WebSocket.

    command.py     `causalrt serve`                       app.py        the application and its routes
    settings.py    limits, paths, times                  request_guard.py    checks of every request
    auth.py        bearer tokens from a file             api_errors.py  errors as clients see them
    admission.py   slots, queue and rate limits          metrics.py    metrics for Prometheus
    engine_host.py the engine, reloaded if it dies       generation.py a thread that drives one session
    jobs.py        jobs and their order                  job_store.py    their files
    videos.py      /v1/videos                            realtime.py   /v1/realtime, with realtime_messages.py
    run.py         listening, draining and ending
    hosts.py       normalised hosts and origins          uvicorn_quirks.py  overrides of uvicorn's internals
    connections.py limits on the number and idle time of connections
    log_limit.py   limit on repeated log messages

Everything but `generation.py` and `engine_host.py` runs on one event loop without locks; each generation has its own thread.
FastAPI and uvicorn are imported only when the server starts.
"""
