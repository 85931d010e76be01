"""Run alone: prune the network of a folder with Torch-Pruning, the same part of every group, and write what is left.

The folder has `model.py`, `weights.safetensors`, `images.npy`, `ratio.txt`; `result.json` gets the widths, or the error,
and `logits.npy` what the pruned network answers.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch


def main(folder: Path) -> None:
    """Prune, and write the result."""
    import torch_pruning as tp

    spec = importlib.util.spec_from_file_location("model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.load(str(folder / "weights.safetensors")).double().eval()
    images = torch.from_numpy(np.load(folder / "images.npy")).double()
    last = [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear)][-1]
    result: dict[str, object]
    try:
        pruner = tp.pruner.BasePruner(
            network,
            images[:1],
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=False,
            pruning_ratio=float((folder / "ratio.txt").read_text()),
            ignored_layers=[last],
        )
        pruner.step()
        with torch.no_grad():
            logits = network(images)
        np.save(folder / "logits.npy", logits.numpy())
        widths = {
            name: layer.weight.shape[0]
            for name, layer in network.named_modules()
            if isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Linear)
        }
        result = {"widths": widths}
    except Exception as exc:
        result = {"error": f"{type(exc).__name__}: {exc}"}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
