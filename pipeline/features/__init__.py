"""Hidden-state features of the frozen target, with Ray Data: kept in a store, or streamed into training.

store.py    the store: shards, reader, the check that it belongs to the target
forward.py  token rows -> feature rows: batching and the target's forward
extract.py  corpus -> store, exactly once per row whatever is killed
stream.py   corpus -> Ray Dataset of feature rows
"""
