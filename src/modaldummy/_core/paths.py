"""Finds parameters by path in a model as it is now, through whatever wraps parts of it."""

from typing import TypeAlias

from torch import Tensor, nn

from modaldummy._engines import (
    RENAMED_ENDINGS,
    child_modules,
    lora_adapters,
    num_wrapper_segments,
    own_parameters,
    wrapped_modules,
)

# The present full name of a parameter, the parameter, and the module that holds it. A plain tuple:
# a lookup makes one for each parameter at each step, and a named tuple takes five times as long.
Found: TypeAlias = tuple[str, nn.Parameter, nn.Module]


def strip_wrappers(name: str) -> str:
    """`name` without the segments that wrappers add: `module.enc.weight` -> `enc.weight`."""
    segments = name.split(".")
    kept: list[str] = []
    while segments:
        count = num_wrapper_segments(segments)
        if count == 0:
            kept.append(segments[0])
        del segments[: max(count, 1)]
    return ".".join(kept)


def find_parameters(model: nn.Module, path: str) -> list[Found]:
    """Parameters of `model` at or below the dotted `path`, with their present full names.

    The path may lack wrapper segments such as `module.`, or have them where the model has none. A
    path to a parameter also finds what PEFT, `torch.nn.utils.parametrize`, weight_norm and pruning
    put in its place. Only the modules along the path and below its end are visited.

    Returns:
        In model order, a tied parameter once for each of its names; empty if nothing matches.
    """
    return _find(model, "", path.split(".") if path else [])


def _find(module: nn.Module, prefix: str, path: list[str]) -> list[Found]:
    if not path:
        return _below(module, prefix)
    head, rest = path[0], path[1:]
    found: list[Found] = []
    if (child := child_modules(module).get(head)) is not None:
        found = _find(child, f"{prefix}{head}.", rest)
    elif not rest:
        found = _find_own(module, prefix, head)
    if found:
        return found
    for name, wrapped in wrapped_modules(module):
        inside = _find(wrapped, f"{prefix}{name}.", path)
        found += inside
        if inside and name == "base_layer":
            for adapter_name, adapter in lora_adapters(module):
                found += _below(adapter, f"{prefix}{adapter_name}.")
    if not found and (count := num_wrapper_segments(path)):
        found = _find(module, prefix, path[count:])
    return found


def _below(module: nn.Module, prefix: str) -> list[Found]:
    """All parameters of `module` and of its submodules; `prefix` is the path of `module`.

    This runs for each modality at each step. A recursion of its own is faster than the nested
    generators of `named_modules`.
    """
    found: list[Found] = []

    def collect(owner: nn.Module, prefix: str) -> None:
        for name, parameter in own_parameters(owner).items():
            if parameter is not None:
                found.append((prefix + name, parameter, owner))
        for name, child in child_modules(owner).items():
            if child is not None:
                collect(child, f"{prefix}{name}.")

    collect(module, prefix)
    return found


def _find_own(module: nn.Module, prefix: str, name: str) -> list[Found]:
    """The parameter `name` of `module` itself, or what a reparametrization made of it."""
    own = own_parameters(module)
    if (parameter := own.get(name)) is not None:
        return [(prefix + name, parameter, module)]
    parametrizations = child_modules(module).get("parametrizations")
    if parametrizations is not None:
        parts = child_modules(parametrizations).get(name)
        if parts is not None:
            return _below(parts, f"{prefix}parametrizations.{name}.")
    # A reparametrization leaves the tensor that it computes under the old name.
    if not isinstance(vars(module).get(name), Tensor):
        return []
    renamed = ((name + ending, own.get(name + ending)) for ending in RENAMED_ENDINGS)
    return [(prefix + new, part, module) for new, part in renamed if part is not None]
