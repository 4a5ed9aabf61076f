"""Conversations in; token rows with loss masks out; regeneration by the target.

conversations.py  JSON-lines readers and validation
rows.py           chat template -> token row with loss mask
build.py          a file of conversations -> the corpus artifact
asking.py         prompts -> conversations in the target's own words, by its engine
answers.py        those conversations -> the artifact that a corpus is made from
regenerate.py     the stage: regeneration by actors, on Ray Data
"""
