"""How the study's tables came to their form, by Alembic: each step a file in `versions`."""
