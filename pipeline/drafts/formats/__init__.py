"""Drafts in the files of other projects.

deepspec.py  DeepSpec's DSpark and DFlash checkpoints for Qwen3-shaped drafts, which vLLM and SGLang load as they are
"""
