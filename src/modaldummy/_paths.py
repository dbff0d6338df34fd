"""Finds parameters by path in a model as it is now, through whatever wraps parts of it."""

from collections.abc import Iterator
from typing import TypeAlias

from torch import Tensor, nn

# Child names that DDP, torch.compile, FSDP, activation checkpointing and Fabric put around one.
_WRAPPERS = (
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
)
_AGAIN = "_original_module"  # under which Fabric has the same module once more
# PEFT puts these two around a whole model, always together.
_PEFT_MODEL = ("base_model", "model")
# PEFT keeps the module that an adapter replaced under one of these names.
_REPLACED = ("base_layer", "original_module")
# weight_norm, spectral_norm and pruning of `torch.nn.utils` rename a parameter with these endings.
_RENAMED = ("_orig", "_g", "_v")


# The present full name of a parameter, the parameter, and the module that holds it. A plain tuple:
# a lookup makes one for each parameter at each step, and a named one takes longer to make.
Located: TypeAlias = tuple[str, nn.Parameter, nn.Module]


def strip_wrappers(name: str) -> str:
    """`name` without the segments that wrappers add: `module.enc.weight` -> `enc.weight`."""
    segments = name.split(".")
    kept: list[str] = []
    while segments:
        count = _wrapper_length(segments)
        if count == 0:
            kept.append(segments[0])
        del segments[: max(count, 1)]
    return ".".join(kept)


def find_parameters(model: nn.Module, path: str) -> list[Located]:
    """Parameters of `model` at or below the dotted `path`, with their present full names.

    Wrapper segments may be missing from the path or be too many in it. A path to a parameter also
    finds what PEFT, `torch.nn.utils.parametrize`, weight_norm and pruning put in its place. Only
    the modules along the path and below its end are visited.

    Returns:
        In model order, a tied parameter once for each name that it has; empty if nothing matches.
    """
    return _find(model, "", path.split(".") if path else [])


def _find(module: nn.Module, prefix: str, path: list[str]) -> list[Located]:
    if not path:
        return _below(module, prefix)
    head, rest = path[0], path[1:]
    found: list[Located] = []
    if (child := module._modules.get(head)) is not None:
        found = _find(child, f"{prefix}{head}.", rest)
    elif not rest:
        found = _find_own(module, prefix, head)
    if found:
        return found
    for name, stand_in in _stand_ins(module):
        inside = _find(stand_in, f"{prefix}{name}.", path)
        found += inside + (_adapters(module, prefix) if inside and name == "base_layer" else [])
    if not found and (skipped := _wrapper_length(path)):
        found = _find(module, prefix, path[skipped:])
    return found


def _below(module: nn.Module, prefix: str) -> list[Located]:
    """All parameters of `module` and of its submodules, which are named `prefix` and what follows.

    This runs for each modality at each step; a recursion of its own takes less time than the nested
    generators of `named_modules`.
    """
    found: list[Located] = []

    def collect(owner: nn.Module, prefix: str) -> None:
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                found.append((prefix + name, parameter, owner))
        for name, child in owner._modules.items():
            if child is not None:
                collect(child, f"{prefix}{name}.")

    collect(module, prefix)
    return found


def _find_own(module: nn.Module, prefix: str, name: str) -> list[Located]:
    """The parameter `name` that `module` itself holds, or what a reparametrization made of it."""
    if (parameter := module._parameters.get(name)) is not None:
        return [(prefix + name, parameter, module)]
    parametrizations = module._modules.get("parametrizations")
    if parametrizations is not None and (parts := parametrizations._modules.get(name)) is not None:
        return _below(parts, f"{prefix}parametrizations.{name}.")
    if not isinstance(vars(module).get(name), Tensor):
        return []  # a reparametrization leaves the value that it computes under the old name
    renamed = ((name + ending, module._parameters.get(name + ending)) for ending in _RENAMED)
    return [(prefix + new, part, module) for new, part in renamed if part is not None]


def _stand_ins(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children of `module` that take the place of what the path expects in `module` itself."""
    for name in _WRAPPERS + _REPLACED:
        if (child := module._modules.get(name)) is not None:
            yield name, child
    outer = module._modules.get(_PEFT_MODEL[0])
    if outer is not None and (inner := outer._modules.get(_PEFT_MODEL[1])) is not None:
        yield ".".join(_PEFT_MODEL), inner
    if (saved := module._modules.get("modules_to_save")) is not None:
        for name, child in saved.named_children():
            yield f"modules_to_save.{name}", child


def _adapters(module: nn.Module, prefix: str) -> list[Located]:
    """LoRA parameters that sit beside the layer they adapt."""
    return [
        located
        for name, child in module._modules.items()
        if name.startswith("lora_") and child is not None
        for located in _below(child, f"{prefix}{name}.")
    ]


def _wrapper_length(path: list[str]) -> int:
    """How many segments at the start of `path` belong to a wrapper: 0, 1 or 2."""
    if tuple(path[:2]) == _PEFT_MODEL:
        return 2
    return 1 if path[0] in (*_WRAPPERS, _AGAIN) else 0
