"""Bounded logit attention: image classifiers that show what they looked at."""
