"""Draft architectures, their configs, vocabularies, warm starts and checkpoints."""
