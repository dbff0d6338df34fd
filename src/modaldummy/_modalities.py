"""Which parameters each modality owns: specs become paths once, paths are looked up live."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor, nn

from modaldummy._errors import ParameterMapError, describe, unknown_modality
from modaldummy._kinds import check_dtype, check_reachable, is_sparse_table
from modaldummy._paths import Located, find_parameters, strip_wrappers

ModalityKey: TypeAlias = str | tuple[str, ...]
ParamSpec: TypeAlias = "str | nn.Module | nn.Parameter | Iterable[ParamSpec]"
# Keys are ModalityKey and checked when the wrapper is made; Mapping is invariant in its key type,
# so that naming it here would refuse a plain dict[str, str] or dict[tuple[str, str], str].
ParameterMap: TypeAlias = Mapping[Any, ParamSpec]


class ModalityMap:
    """Parameters by modality, as the model is at each call.

    Args:
        model: The model whose parameters are meant; bare or wrapped.
        modality_param_map: Modality, or tuple of modalities that own something jointly, to spec.

    Raises:
        ParameterMapError: The map is empty, a key is no name, or a spec matches nothing.
    """

    def __init__(self, model: nn.Module, modality_param_map: ParameterMap) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {describe(model)}.")
        if not isinstance(modality_param_map, Mapping) or not modality_param_map:
            raise ParameterMapError(
                "`modality_param_map` must be a non-empty mapping such as {'T1': 'encoders.T1'}, "
                f"got {describe(modality_param_map)}."
            )
        self.model = model
        self.paths: dict[ModalityKey, tuple[str, ...]] = {}
        for given, spec in modality_param_map.items():
            _check_key(given, self.paths)
            key = _plain(given)
            where = f"`modality_param_map[{key!r}]`"
            paths = tuple(dict.fromkeys(_paths_of(spec, model, where)))
            if not paths:
                raise ParameterMapError(
                    f"{where} is empty; give a path, a module or a parameter, or drop the key."
                )
            self.paths[key] = paths
            for located in self._lookup(key):
                check_dtype(located, key)
        members = (name for key in self.paths for name in _members(key))
        self.modalities: tuple[str, ...] = tuple(dict.fromkeys(members))

    def named_parameters(self, key: ModalityKey) -> dict[str, nn.Parameter]:
        """Parameters of one key of the map by their present full name, frozen ones included."""
        for name in _members(key):
            if name not in self.modalities:
                raise unknown_modality(name, self.modalities, "`modality`")
        own = next(
            (other for other in self.paths if set(_members(other)) == set(_members(key))), None
        )
        located = self.owned([] if own is None else [own]).values()
        return {name: parameter for name, parameter, _ in located}

    def active_keys(self, active: Collection[str]) -> list[ModalityKey]:
        """Keys of the map all of whose modalities are active."""
        present = set(active)
        return [key for key in self.paths if present.issuperset(_members(key))]

    def owned(self, keys: Iterable[ModalityKey]) -> dict[int, Located]:
        """Parameters, frozen ones included, that any of these keys of the map owns, by `id`."""
        found: dict[int, Located] = {}
        for key in keys:
            for located in self._lookup(key):
                found.setdefault(id(located[1]), located)
        return found

    def shared_with_trunk(self) -> set[int]:
        """`id` of parameters of the map that also have a name that no key owns.

        Such as the weight of a tower that is tied to an output layer. Walks the whole model.
        """
        located = [found for key in self.paths for found in self._lookup(key)]
        names = {strip_wrappers(name) for name, _, _ in located}
        elsewhere = {
            id(parameter)
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if strip_wrappers(name) not in names
        }
        return elsewhere.intersection(id(parameter) for _, parameter, _ in located)

    def inactive_parameters(self, active: Collection[str]) -> list[Located]:
        """Trainable parameters that only inactive keys own, each once.

        A tuple key is active only if all its modalities are.

        Raises:
            ParameterMapError: A path matches nothing any more, or no gradient can reach what it
                matches.
        """
        present = self.active_keys(active)
        inactive = [key for key in self.paths if key not in present]
        taught = self.owned(present)
        idle: dict[int, Located] = {}
        for key in inactive:
            for located in self._lookup(key):
                _, parameter, _ = located
                identity = id(parameter)
                if parameter.requires_grad and identity not in taught:
                    check_reachable(located, key)
                    # A sparse table that a dense layer uses too gets dense gradients anyway.
                    if identity not in idle or not is_sparse_table(located):
                        idle[identity] = located
        return list(idle.values())

    def _lookup(self, key: ModalityKey) -> list[Located]:
        everything: list[Located] = []
        for path in self.paths[key]:
            found = find_parameters(self.model, path)
            if not found:
                raise ParameterMapError(
                    f"`modality_param_map[{key!r}]`: {path!r} was found when the wrapper was made "
                    f"but matches no parameter of {type(self.model).__name__} any more; make a new "
                    "wrapper after you change the model's structure."
                )
            everything += found
        return everything


def text_of(key: ModalityKey) -> str:
    """A key as one word: `T1`, `T1-dMRI`."""
    return key if isinstance(key, str) else "-".join(key)


def _members(key: ModalityKey) -> tuple[str, ...]:
    return key if isinstance(key, tuple) else (key,)


def _plain(key: ModalityKey) -> ModalityKey:
    """`key` with plain strings in place of members of a string Enum, which print otherwise."""
    return tuple(map(str.__str__, key)) if isinstance(key, tuple) else str.__str__(key)


def _check_key(key: ModalityKey, earlier: Collection[ModalityKey]) -> None:
    names = _members(key)
    valid = all(isinstance(name, str) and name for name in names)
    if not names or not valid or len(set(names)) < len(names):
        raise ParameterMapError(
            "Keys of `modality_param_map` must be modality names or tuples of different names, "
            f"got {key!r}."
        )
    twin = next((other for other in earlier if text_of(other) == text_of(key)), None)
    if twin is not None and set(_members(twin)) != set(names):
        raise ParameterMapError(
            f"Keys {twin!r} and {key!r} of `modality_param_map` are both written "
            f"{text_of(key)!r} in logs and findings; rename a modality."
        )
    same = next((other for other in earlier if set(_members(other)) == set(names)), None)
    if same is not None:
        raise ParameterMapError(
            f"Keys {same!r} and {key!r} of `modality_param_map` mean the same modalities; "
            "give one key the paths of both."
        )


def _paths_of(spec: object, model: nn.Module, where: str) -> Iterator[str]:
    """Full paths that `spec` selects; a glob gives one for each parameter that it matches."""
    if isinstance(spec, str):
        yield from _match(spec, model, where)
    elif isinstance(spec, nn.Module):
        yield _path_of_module(spec, model, where)
    elif isinstance(spec, nn.Parameter):
        named = model.named_parameters()
        path = next((name for name, parameter in named if parameter is spec), None)
        if path is None:
            raise ParameterMapError(
                f"{where} holds a parameter of shape {list(spec.shape)} that is not part of "
                f"{type(model).__name__}; take it from the model that you pass as `model`."
            )
        yield path
    elif isinstance(spec, Iterable) and not isinstance(spec, (Mapping, Tensor, bytes)):
        for item in spec:
            yield from _paths_of(item, model, where)
    else:
        raise ParameterMapError(
            f"{where} must be a path, a module, a parameter or an iterable of these, "
            f"got {describe(spec)}."
        )


def _path_of_module(spec: nn.Module, model: nn.Module, where: str) -> str:
    named = model.named_modules()
    path: str | None = next((name for name, module in named if module is spec), None)
    if path is None:
        raise ParameterMapError(
            f"{where} holds a {type(spec).__name__} that is not part of {type(model).__name__}; "
            "pass one of its submodules, or a list of them."
        )
    if not find_parameters(model, path):
        raise ParameterMapError(
            f"{where} holds the {type(spec).__name__} at {path!r}, which has no parameters; "
            "leave it out."
        )
    return path


def _match(spec: str, model: nn.Module, where: str) -> list[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    if not any(wildcard in spec for wildcard in "*?["):
        # Wrapper segments alone would select the whole model, by accident more often than not.
        if (strip_wrappers(spec) or spec in modules) and spec and find_parameters(model, spec):
            return [spec]
    else:
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        bare = strip_wrappers(spec)
        if found := [n for n in names if fnmatchcase(strip_wrappers(n), bare)]:
            return found
    if spec and spec in modules:
        raise ParameterMapError(f"{where}: the module {spec!r} has no parameters; leave it out.")
    raise ParameterMapError(
        f"{where}: {spec!r} matches no parameter of {type(model).__name__}"
        f"{_suggestion(spec, model)} A path names one parameter or one module, segment by "
        "segment; a glob such as 'encoder.T1.*' is held against full parameter names."
    )


def _suggestion(spec: str, model: nn.Module) -> str:
    """`; closest: ...` with up to three paths that look like `spec`."""
    paths = [strip_wrappers(name) for name, _ in model.named_modules() if name]
    paths += [strip_wrappers(name) for name, _ in model.named_parameters()]
    word = spec.strip("*").rpartition(".")[2].strip("*").lower()
    similar = [path for path in paths if word and word in path.lower()]
    similar += difflib.get_close_matches(spec, paths)
    closest = list(dict.fromkeys(similar))[:3]
    return f"; closest: {', '.join(map(repr, closest))}." if closest else "."
