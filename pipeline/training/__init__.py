"""Draft training: anchors, objectives, the step, and the Ray Train + DeepSpeed loop around it."""
