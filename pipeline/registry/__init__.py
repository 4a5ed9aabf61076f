"""The registry: what was run and measured, which draft may serve (recorder.py, gate.py, promotion.py).

The gate is pure and importable alone: this file imports nothing, so that `pipeline.registry.gate` needs no MLflow.
"""
