"""Names of layers: they become attributes of `nn.Module`s, keys of safetensors files and words of generated source."""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, Field

from app.validation.strict import fault

INPUT = "input"
LONGEST_NAME = 200

# Attributes of `torch.nn.Module` without a leading underscore (torch cannot be imported here; a test compares). A
# sub-module of such a name is refused by `add_module`, or worse: `setattr` leaves the method in place.
MODULE_ATTRIBUTES = frozenset(
    {
        "T_destination",
        "add_module",
        "apply",
        "bfloat16",
        "buffers",
        "call_super_init",
        "children",
        "compile",
        "cpu",
        "cuda",
        "double",
        "dump_patches",
        "eval",
        "extra_repr",
        "float",
        "forward",
        "get_buffer",
        "get_extra_state",
        "get_parameter",
        "get_submodule",
        "half",
        "ipu",
        "load_state_dict",
        "modules",
        "mtia",
        "named_buffers",
        "named_children",
        "named_modules",
        "named_parameters",
        "parameters",
        "register_backward_hook",
        "register_buffer",
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "register_load_state_dict_post_hook",
        "register_load_state_dict_pre_hook",
        "register_module",
        "register_parameter",
        "register_state_dict_post_hook",
        "register_state_dict_pre_hook",
        "requires_grad_",
        "set_extra_state",
        "set_submodule",
        "share_memory",
        "state_dict",
        "to",
        "to_empty",
        "train",
        "training",
        "type",
        "xpu",
        "zero_grad",
    }
)
# Names of tensors inside a layer: `weight.weight` would be a confusing key.
TENSOR_NAMES = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})
# What our own network and the generated source call their parts.
OWN_WORDS = frozenset({INPUT, "graph", "self"})
WINDOWS_DEVICES = frozenset(
    {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(10)), *(f"lpt{i}" for i in range(10))}
)

_FORM = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def why_refused(name: str) -> str | None:
    """Why `name` cannot be a layer's name, or None when it can."""
    if not _FORM.fullmatch(name):
        return "a layer's name is ASCII letters, digits and underscores and starts with a letter"
    if len(name) > LONGEST_NAME:
        return f"a layer's name has at most {LONGEST_NAME} characters"
    if keyword.iskeyword(name):
        return f"'{name}' is a word of Python, and layer names become words of the generated source"
    if name in MODULE_ATTRIBUTES:
        return f"'{name}' is an attribute of every torch module"
    if name in TENSOR_NAMES:
        return f"'{name}' is the name of a tensor inside a layer"
    if name == INPUT:
        return "'input' is the name of the network's input"
    if name in OWN_WORDS:
        return f"'{name}' is a word of the generated network"
    if name.lower() in WINDOWS_DEVICES:
        return f"'{name}' is a device on Windows"
    return None


def local_names(layers: Iterable[tuple[str, str | None]]) -> list[str]:
    """The names of one list of layers, given as (type, name or None).

    The unnamed are `<type><n>`, counted per type from 1.
    """
    counts: Counter[str] = Counter()
    names = []
    for kind, name in layers:
        if name is None:
            counts[kind] += 1
            name = f"{kind}{counts[kind]}"
        names.append(name)
    return names


def _checked(name: str) -> str:
    reason = why_refused(name)
    if reason is not None:
        raise fault(reason + ": choose another")
    return name


LayerName = Annotated[str, Field(max_length=LONGEST_NAME), AfterValidator(_checked)]
# A name in `inputs`: any name that a layer could have, or "input".
Reference = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME, pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
