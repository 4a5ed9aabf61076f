"""The registry: what was run and measured, which draft may serve.

recorder.py keeps runs, registration.py makes versions of drafts, versions.py finds and fetches them, and promotion.py
makes one champion as gate.py decides.

The gate is pure and importable alone: this file imports nothing, so that `pipeline.registry.gate` needs no MLflow.
"""
