"""The same shards on Ray: an actor a core reads, decodes, explains and writes whole shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bla.deploy.batch.plan import BATCH_FOLDER, PLAN, BatchError, Plan, Reader, Shard
from bla.deploy.batch.rows import explain_shard


class Worker:
    """Keeps one graph for all the shards that come to it. Ray starts as many as there is work and room for."""

    def __init__(self, plan: Plan, graph: Path, out: Path) -> None:
        from bla.deploy.engine import Engine

        if not (out / BATCH_FOLDER / PLAN).exists():
            raise BatchError(f"expected {out} on every node of the cluster under this path, got a node without it")
        self.out = out
        self.graph = Engine(graph, threads=1)
        self.reader = Reader(plan)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Explain the shards of a batch of ``{"index", "file", "first", "count", "number"}``."""
        for values in zip(*(batch[name].tolist() for name in FIELDS), strict=True):
            explain_shard(self.reader, Shard(*values), self.graph, self.out)
        return {"count": batch["count"]}


FIELDS = ("index", "file", "first", "count", "number")


def run_on_ray(
    plan: Plan,
    shards: Sequence[Shard],
    graph: Path,
    *,
    out: Path,
    workers: int | None,
    finished: Callable[[int], None],
) -> None:
    """Explain shards on the cluster that ``RAY_ADDRESS`` names, or that this process is part of, or on this machine."""
    try:
        import ray
        from ray.data import ActorPoolStrategy, DataContext
    except ImportError:
        raise BatchError("expected Ray: pip install 'bounded-logit-attention[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        cores = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
        context = DataContext.get_current()
        context.enable_progress_bars = False
        work = ray.data.from_items(
            [{name: getattr(shard, name) for name in FIELDS} for shard in shards],
            override_num_blocks=min(len(shards), 16 * cores),
        )
        done = work.map_batches(
            Worker,
            batch_size=1,
            compute=ActorPoolStrategy(min_size=1, max_size=workers or cores),
            fn_constructor_args=(plan, graph.resolve(), out.resolve()),
            num_cpus=1,
        )
        for row in done.iter_rows():
            finished(int(row["count"]))
    finally:
        if ours:
            ray.shutdown()
