"""Finds parameters by path in a model as it is now, through whatever wraps parts of it."""

from torch import nn

from modaldummy._core.parameter import ParameterEntry
from modaldummy._engines import (
    adapters_beside,
    child_modules,
    direct_parameters,
    num_wrapper_segments,
    parametrization_of,
    renamed_parameters,
    wrapped_modules,
)


def strip_wrappers(name: str) -> str:
    """`name` without the segments that wrappers add: `module.enc.weight` -> `enc.weight`."""
    segments = name.split(".")
    kept: list[str] = []
    while segments:
        count = num_wrapper_segments(segments)
        kept += [] if count else segments[:1]
        segments = segments[count or 1 :]
    return ".".join(kept)


def find_parameters(model: nn.Module, path: str) -> list[ParameterEntry]:
    """Parameters of `model` at or below the dotted `path`, with their present full names.

    The path may lack wrapper segments such as `module.`, or have them where the model has none. A
    path to a parameter also finds what PEFT, `torch.nn.utils.parametrize`, weight_norm and pruning
    put in its place. Only the modules along the path and below its end are visited.

    Returns:
        In model order, a tied parameter once for each of its names; empty if nothing matches.
    """
    return _find(model, "", path.split(".") if path else [])


def _find(module: nn.Module, prefix: str, path: list[str]) -> list[ParameterEntry]:
    if not path:
        return _below(module, prefix)
    head, rest = path[0], path[1:]
    entries: list[ParameterEntry] = []
    if (child := child_modules(module).get(head)) is not None:
        entries = _find(child, f"{prefix}{head}.", rest)
    elif (parameter := direct_parameters(module).get(head)) is not None:
        entries = [] if rest else [(prefix + head, parameter, module)]
    elif not rest and (parts := parametrization_of(module, head)) is not None:
        entries = _below(parts, f"{prefix}parametrizations.{head}.")
    elif not rest:
        renamed = renamed_parameters(module, head)
        entries = [(prefix + name, parameter, module) for name, parameter in renamed]
    if entries:
        return entries
    for name, wrapped in wrapped_modules(module):
        inside = _find(wrapped, f"{prefix}{name}.", path)
        entries += inside
        for adapter_name, adapter in adapters_beside(module, name) if inside else ():
            entries += _below(adapter, f"{prefix}{adapter_name}.")
    if not entries and (count := num_wrapper_segments(path)):
        entries = _find(module, prefix, path[count:])
    return entries


def _below(module: nn.Module, prefix: str) -> list[ParameterEntry]:
    """All parameters of `module` and of its submodules; `prefix` is the path of `module`.

    This runs for each modality at each step. A recursion of its own is faster than the nested
    generators of `named_modules`.
    """
    owned = direct_parameters(module).items()
    entries = [(prefix + name, p, module) for name, p in owned if p is not None]
    for name, child in child_modules(module).items():
        if child is not None:
            entries += _below(child, f"{prefix}{name}.")
    return entries
