"""Drafts in the files of other projects.

export.py       a draft as a directory that vLLM or SGLang takes as it is
engines.py      which drafts they load, in which format; and when they don't, why, and the nearest that loads
speculators.py  vllm-project/speculators' checkpoints, for vLLM
specforge.py    SpecForge's checkpoints, for SGLang
deepspec.py     DeepSpec's checkpoints
qwen3.py        what the three have in common: layers shaped as Qwen3's, one bfloat16 file, a checked way back
eagle3.py       the same of Eagle3's layer
vocabulary.py   a reduced vocabulary in their files
"""
