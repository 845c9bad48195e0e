"""The same shards on Ray: an actor on each core reads, decodes, explains and writes whole shards."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from bla import needs_extra
from bla.deploy.batch.location import BatchError, Location
from bla.deploy.batch.plan import BATCH_FOLDER, PLAN, Plan, Shard
from bla.deploy.batch.rows import explain_rows, write_part
from bla.deploy.batch.sources import Reader
from bla.deploy.engine import Engine
from bla.model.compiled import has_cuda
from bla.progress import Progress


class Worker:
    """Keeps one graph for all the shards that it gets. Ray starts as many workers as there is work and room for."""

    def __init__(self, plan: Plan, graph: Location, out: Location) -> None:
        if not (out / BATCH_FOLDER / PLAN).exists():
            raise BatchError(f"expected {out} on every node of the cluster under this path, got a node without it")
        self.out = out
        with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
            file.write(graph.read())
            file.flush()
            self.graph = Engine(file.name, threads=1)
        self.reader = Reader(plan)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Explain the shard with these fields, batch by batch, and write it."""
        shard = Shard(**item)
        explained = (explain_rows(self.graph, rows, self.reader.plan, self.out) for rows in self.reader.batches(shard))
        write_part(self.out, shard, [*itertools.chain.from_iterable(explained)])
        return {"count": shard.count, "device": self.graph.device}


def run_on_ray(
    plan: Plan, shards: Sequence[Shard], graph: Location, *, out: Location, workers: int | None, report: Progress
) -> Iterator[int]:
    """Explain shards on the cluster of ``RAY_ADDRESS`` or of this process, or on this machine. Yields the rows done.

    Where the cluster has GPUs and ONNX Runtime can use them, each actor asks for an equal share of them.
    """
    with needs_extra("ray", BatchError):
        import ray
        from ray.data import ActorPoolStrategy, DataContext
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        cores, gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
        actors = min(workers or cores, cores) or 1
        share = min(1, int(1e4 * gpus / actors) / 1e4) if has_cuda() else 0  # as Ray rounds, but downwards
        if gpus and not share:
            report(f"expected onnxruntime-gpu for the cluster's GPUs ({gpus}), got onnxruntime: they stay idle", 0, 0)
        DataContext.get_current().enable_progress_bars = False
        work = ray.data.from_items(
            [dataclasses.asdict(shard) for shard in shards], override_num_blocks=min(len(shards), 16 * actors)
        )
        done = work.map(
            Worker,  # an actor's class, as fn_constructor_args says
            compute=ActorPoolStrategy(min_size=1, max_size=actors),
            fn_constructor_args=(plan, graph, out),
            num_cpus=1,
            num_gpus=share or None,
        )
        devices = set[str]()
        for row in done.iter_rows():
            if row["device"] not in devices:
                devices.add(row["device"])
                report(f"actors{f' with {share:g} of a GPU' * bool(share)} compute on the {row['device']}", 0, 0)
            yield int(row["count"])
    finally:
        if ours:
            ray.shutdown()
