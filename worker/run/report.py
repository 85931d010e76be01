"""The report of a job: dense against pruned, step by step, class by class. Its form is the API's contract."""

from __future__ import annotations

import gzip
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.network.cost import Cost, cost
from app.schemas.answer import MeasuresSchema
from app.schemas.report import ClassRowSchema, SparseFileSchema
from worker.evaluation import Scores
from worker.export.sparse_file import SPARSE_WEIGHTS
from worker.network import Network
from worker.precision import Precision

LARGEST_TO_COMPRESS = 64 << 20  # gzip reads about 30 MB/s

Measures = dict[str, Any]
Row = dict[str, Any]


def measures(network: Network, scores: Scores | None, *, latency_ms: Mapping[str, Any] | None = None) -> Measures:
    """`M` of a network: accuracy and loss on the test part, parameters, non-zero ones, MACs, bytes, latency."""
    nonzero = sum(int(torch.count_nonzero(parameter)) for parameter in network.parameters())
    return _measures(replace(cost(network.graph), nonzero_params=nonzero), scores, latency_ms)


def measures_of_cost(found: Cost) -> Measures:
    """`M` of a network that was never trained: cost only."""
    return _measures(found, None, None)


def _measures(found: Cost, scores: Scores | None, latency_ms: Mapping[str, Any] | None) -> Measures:
    return MeasuresSchema(
        accuracy=None if scores is None else scores.accuracy,
        loss=None if scores is None else scores.loss,
        params=found.params,
        nonzero_params=found.nonzero_params,
        macs=found.macs,
        bytes=found.bytes,
        latency_ms=None if latency_ms is None else dict(latency_ms),
    ).model_dump()


def class_rows(names: Sequence[str], baseline: Scores, final: Scores) -> list[ClassRowSchema]:
    """The report's `classes`: what pruning did to each; accuracies are None where the test part has no example."""
    return [
        ClassRowSchema(
            name=name,
            baseline_accuracy=before / examples if examples else None,
            final_accuracy=after / examples if examples else None,
            change=(after - before) / examples if examples else None,
            examples=examples,
        )
        for name, before, after, examples in zip(names, baseline.correct, final.correct, final.examples, strict=True)
    ]


def compressed_bytes(files: Sequence[Path]) -> dict[str, int]:
    """Size of each file after gzip: what zeros do save. Files above 64 MiB are left out, they take too long."""
    sizes = {}
    for path in files:
        if path.stat().st_size <= LARGEST_TO_COMPRESS:
            sizes[path.name] = len(gzip.compress(path.read_bytes(), compresslevel=6, mtime=0))
    return sizes


def sparse_file(folder: Path) -> SparseFileSchema | None:
    """The size of the file without zeros beside that of the same weights with them; None: there is no such file."""
    sparse = folder / SPARSE_WEIGHTS
    if not sparse.is_file():
        return None
    dense_bytes = (folder / "pruned.safetensors").stat().st_size
    return SparseFileSchema(name=sparse.name, size_bytes=sparse.stat().st_size, dense_bytes=dense_bytes)


def environment(precision: Precision) -> dict[str, Any]:
    """Where the job ran: versions, device, threads, number format, layout; not the name of the machine."""
    import onnxruntime

    device = torch.cuda.get_device_name(precision.device) if precision.device.type == "cuda" else _processor()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
        "device": precision.device.type,
        "device_name": device,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "precision": precision.name,
        "channels_last": precision.channels_last,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
