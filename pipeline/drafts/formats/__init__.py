"""Drafts in the files of other projects.

export.py       a draft as a directory that vLLM or SGLang takes as it is
engines.py      which drafts they load, in which format; and when they don't, why, and the nearest that loads
speculators.py  vllm-project/speculators' DSpark and DFlash checkpoints, for vLLM
specforge.py    SpecForge's DSpark and DFlash checkpoints, for SGLang
deepspec.py     DeepSpec's DSpark and DFlash checkpoints
qwen3.py        what the three have in common: layers shaped as Qwen3's, one bfloat16 file, a checked way back

Another algorithm (Eagle3) is another such shape: each format's `obstacles`, `write` and `read` choose it by the draft's
algorithm and the file's architecture.
"""
