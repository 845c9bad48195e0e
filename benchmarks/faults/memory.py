"""The peak memory of a hundred photos decoded at once, each 34 bytes and 50 million pixels.

python -m benchmarks.faults.memory --photos 100
"""

from __future__ import annotations

import argparse
import base64
import resource
from concurrent.futures import ThreadPoolExecutor

from bla.data.photo import DECODING, Transform

BOMB = base64.b64decode("UklGRhoAAABXRUJQVlA4TA0AAAAvnpvnFgcQERGIiP4HAA==")


def main() -> None:
    """Decode, and compare the peak with the budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=100)
    options = parser.parse_args()
    transform = Transform((224, 224), (0.5,) * 3, (0.5,) * 3, mode="crop")
    transform.read(b"P5\n1 1\n255\n0")
    idle = _peak()
    with ThreadPoolExecutor(32) as pool:
        for _ in pool.map(lambda _: transform.read(BOMB), range(options.photos)):
            pass
    budget, peak = DECODING.most / 2**20, _peak()
    print(f"idle {idle:,.0f} MiB, peak {peak:,.0f} MiB, budget {budget:,.0f} MiB")
    raise SystemExit(peak > 1.5 * idle + budget)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
