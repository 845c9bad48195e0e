"""A classifier that explains: trunk, attention, head, and how a given classifier is split into them."""
