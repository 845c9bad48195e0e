"""`bla compare`: every method on the same photos, cut to the same area, before the same judges; resumable."""

from bla.comparison.catalogue import ALL, CHEAP
from bla.comparison.comparison import SCHEMA_VERSION, compare
from bla.comparison.methods import RUN
from bla.metrics.metric import METRICS

__all__ = ["ALL", "CHEAP", "METRICS", "RUN", "SCHEMA_VERSION", "compare"]
