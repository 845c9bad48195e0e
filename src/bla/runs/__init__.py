"""Run folders: trained, measured, loaded, shared."""
