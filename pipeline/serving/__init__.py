"""Serving: an OpenAI-compatible Ray Serve application of one target with its draft colocated.

`app.py` deploys; `http.py` is the HTTP surface, `protocol.py` what a request may say, `replica.py` the target's
side, `engine_loop.py` the engine's thread, `pieces.py` what single tokens say. Only `app.py` imports Ray.
"""
