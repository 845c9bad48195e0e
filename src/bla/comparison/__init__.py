"""`bla compare`: every method on the same photos, cut to the same area, before the same judges; resumable."""

from bla.comparison.making import ALL, CHEAP, COSTLY, RUN
from bla.comparison.result import METRICS, SCHEMA_VERSION, compare

__all__ = ["ALL", "CHEAP", "COSTLY", "METRICS", "RUN", "SCHEMA_VERSION", "compare"]
