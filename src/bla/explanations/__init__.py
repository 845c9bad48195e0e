"""The explanation, frozen, and its pictures. Loads no torch."""
