"""The clean process of a verification: loads delivered files as a user would and writes the logits that they give.

Run as `python -I -B clean_process.py ORDER.json` by `worker/verification/verification.py`. Needs numpy, and torch +
safetensors or onnxruntime; nothing of Espalier is imported, so that what is verified is what the user downloads. The
order:

    {"parent": pid, "runtime": "torch" | "onnxruntime", "threads": n, "batch_size": n, "result": path,
     "images": {"path": raw pictures as .npy, "layout": "channels_first" | "channels_last" | "no_channels"},
     "runs": [{"model": model.py, "weights": .safetensors or .onnx, "twin": None or another .safetensors of the same
               weights, "architecture": .json, "logits": path}]}

The result is `{"sha256": {file name: digest}}` of every file as it was read.
"""

import ctypes
import hashlib
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
ORPHANED = 75  # the exit code of a process whose parent has ended


def end_with_parent(parent: int) -> None:
    """Arrange that this process is killed when the process `parent`, which started it, ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(ORPHANED)


def sha256(path: str) -> str:
    """The hexadecimal sha256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def torch_network(model: str, weights: str, twin: str | None, threads: int) -> Callable[[Any], Any]:
    """The network of a delivered `model.py` with delivered weights: pictures in, logits out, both numpy.

    Raises ValueError if `twin` gives a network with other bits.
    """
    import torch

    torch.set_num_threads(threads)
    spec = importlib.util.spec_from_file_location("delivered_model", model)
    if spec is None or spec.loader is None:
        raise ImportError(f"{model} is not a Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.load(weights)
    if twin is not None:
        found, wanted = module.load(twin).state_dict(), network.state_dict()
        other = [name for name in wanted if found[name].numpy().tobytes() != wanted[name].numpy().tobytes()]
        if other:
            raise ValueError(f"{Path(twin).name} holds other weights than {Path(weights).name}: {', '.join(other[:5])}")
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}  # twice as fast on a CPU: layout only
    rank = max((tensor.dim() for tensor in network.parameters()), default=0)
    network = network.to(memory_format=layout.get(rank, torch.contiguous_format))

    def logits(images_NCx: Any) -> Any:
        images = torch.from_numpy(images_NCx)
        with torch.inference_mode():
            return network(images.contiguous(memory_format=layout.get(images.ndim, torch.contiguous_format))).numpy()

    return logits


def onnx_network(path: str, threads: int) -> Callable[[Any], Any]:
    """The network of a delivered ONNX file: pictures in, logits out, both numpy."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the torch process needs the cores too
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def logits(images_NCx: Any) -> Any:
        return session.run(["logits"], {"images": images_NCx})[0]

    return logits


def channels_first(images: Any, layout: str) -> Any:
    """A view `N x C x ...` of stored pictures."""
    if layout == "no_channels":
        return images[:, None]
    return images if layout == "channels_first" else images.transpose(0, images.ndim - 1, *range(1, images.ndim - 1))


def run_over(
    images_NCx: Any, architecture: dict[str, Any], network: Callable[[Any], Any], batch: int, out: str
) -> None:
    """Write the logits of every picture, preprocessed as the delivered `architecture.json` says, to `out` (.npy)."""
    import numpy as np

    steps = architecture["preprocessing"]
    per_channel = (1, -1) + (1,) * (images_NCx.ndim - 2)
    scale = np.float32(steps["scale"])
    mean = np.asarray(steps["mean"], np.float32).reshape(per_channel)
    std = np.asarray(steps["std"], np.float32).reshape(per_channel)
    parts = []
    for start in range(0, len(images_NCx), batch):
        ready = images_NCx[start : start + batch].astype(np.float32, order="C")
        parts.append(network((ready * scale - mean) / std))
    np.save(out, np.concatenate(parts))


def main(order_path: str) -> None:
    """Carry out one order: write the logits of each run, then the result."""
    order = json.loads(Path(order_path).read_text())
    end_with_parent(order["parent"])
    import numpy as np

    images = channels_first(np.load(order["images"]["path"], mmap_mode="r"), order["images"]["layout"])
    digests: dict[str, str] = {}
    for run in order["runs"]:
        for path in filter(None, (run["weights"], run["twin"], run["architecture"], run["model"])):
            digests[Path(path).name] = sha256(path)
        if order["runtime"] == "torch":
            network = torch_network(run["model"], run["weights"], run["twin"], order["threads"])
        else:
            network = onnx_network(run["weights"], order["threads"])
        run_over(images, json.loads(Path(run["architecture"]).read_text()), network, order["batch_size"], run["logits"])
    Path(order["result"]).write_text(json.dumps({"sha256": digests}))


if __name__ == "__main__":
    main(sys.argv[1])
