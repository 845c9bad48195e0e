"""Training: settings, networks, feature cache, the loop and its checkpoints."""
