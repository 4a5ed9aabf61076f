"""Measuring a draft: calibration, acceptance, speedup against the same engine's plain decoding, the report."""
