"""Drafts in the files of other projects.

export.py       a draft as a directory that vLLM or SGLang takes as it is
conversion.py   a checkpoint of one of the projects as a draft artifact
engines.py      which drafts they load, in which format; and when they don't, why, and the nearest that loads
speculators.py  vllm-project/speculators' checkpoints, for vLLM
specforge.py    SpecForge's checkpoints, for SGLang
deepspec.py     DeepSpec's checkpoints
files.py        what the three have in common: one bfloat16 file, a config.json, a checked way back
qwen3.py        layers shaped as Qwen3's in a config.json
gemma4.py       layers shaped as Gemma 4's
eagle3.py       Eagle3's layer
vocabulary.py   a reduced vocabulary in their files
"""
