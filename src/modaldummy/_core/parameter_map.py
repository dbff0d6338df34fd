"""Which parameters each modality owns: specs become paths once, paths are looked up at each call.

`ParameterMap.split` divides the parameters of one step into active and inactive ones, a `Step`.
"""

import dataclasses
import difflib
import re
import sys
import unicodedata
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from modaldummy._core.parameter import (
    OwnedParameter,
    ParameterEntry,
    ParameterSlot,
    check_connectable,
    is_sparse_table,
    slot_of,
)
from modaldummy._core.paths import find_parameters, strip_wrappers
from modaldummy._engines import FSDP1_FLAT, is_flat_parameter
from modaldummy._errors import ParameterMapError, describe, unknown_modality

ModalityKey: TypeAlias = str | tuple[str, ...]
ParamSpec: TypeAlias = "str | nn.Module | nn.Parameter | Iterable[ParamSpec]"
# The keys are ModalityKey, checked when the wrapper is made. Mapping is invariant in its key type,
# so naming that type here would refuse a plain dict[str, str] or dict[tuple[str, str], str].
ModalityParamMap: TypeAlias = Mapping[Any, ParamSpec]
# Names under which the doctor cannot find a modality in the log keys of this library.
_UNLOGGABLE = re.compile(r"(in)?active|\s.*|.*(\s|__MIN|__MAX)|.*[]\n].*", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Step:
    """The keys and parameters that one batch makes active and inactive.

    Attributes:
        active: Modalities in the batch, in map order.
        inactive: The other modalities of the map, in map order.
        active_keys: Keys of the map all of whose modalities are active.
        inactive_entries: Trainable parameters that only inactive keys own, each once, as plain
            tuples.
    """

    active: tuple[str, ...]
    inactive: tuple[str, ...]
    active_keys: tuple[ModalityKey, ...]
    inactive_entries: tuple[ParameterEntry, ...]

    @property
    def inactive_parameters(self) -> list[OwnedParameter]:
        """The `inactive_entries` as named records."""
        return [OwnedParameter(*entry) for entry in self.inactive_entries]

    def without(self, slots: Collection[ParameterSlot]) -> "Step":
        """The same step, with fewer inactive parameters."""
        entries = tuple(entry for entry in self.inactive_entries if slot_of(entry) not in slots)
        return dataclasses.replace(self, inactive_entries=entries)


class ParameterMap:
    """The parameters of each modality, as the model is at each call.

    Args:
        model: The model whose parameters are meant, bare or wrapped.
        modality_param_map: Modality, or tuple of modalities that own something jointly, to spec.

    Attributes:
        model: As given.
        paths: Key of the map to the paths of what it owns.
        modalities: All modalities that occur in keys, in map order.

    Raises:
        ParameterMapError: The map is empty, a key is not a modality name or a tuple of them, or a
            spec matches no parameter or a trainable float8 parameter.
    """

    def __init__(self, model: nn.Module, modality_param_map: ModalityParamMap) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {describe(model)}.")
        if not isinstance(modality_param_map, Mapping) or not modality_param_map:
            raise ParameterMapError(
                "`modality_param_map` must be a non-empty mapping such as {'T1': 'encoders.T1'}, "
                f"got {describe(modality_param_map)}."
            )
        self.model = model
        self.paths: dict[ModalityKey, tuple[str, ...]] = {}
        names_in_model = _NamesInModel(model)
        seen: dict[frozenset[str] | str, ModalityKey] = {}
        for given, spec in modality_param_map.items():
            _check_key(given, seen)
            # Plain strings in place of members of a string Enum, which print differently.
            names = tuple(map(str.__str__, modalities_of(given)))
            key: ModalityKey = names if isinstance(given, tuple) else names[0]
            where = _where(key)
            paths = tuple(dict.fromkeys(_paths_of(spec, names_in_model, where)))
            if not paths:
                raise ParameterMapError(
                    f"{where} is empty. Give a path, a module or a parameter, or drop the key."
                )
            self.paths[key] = paths
            trainable = [entry for entry in self._entries_of(key) if entry[1].requires_grad]
            if any(is_flat_parameter(parameter) for _, parameter, _ in trainable):
                raise ParameterMapError(f"{where}: {FSDP1_FLAT}")
            check_connectable([entry for entry in trainable if not is_lazy(entry[1])], where)
        members = (name for key in self.paths for name in modalities_of(key))
        self.modalities: tuple[str, ...] = tuple(dict.fromkeys(members))

    def split(self, active: Collection[str]) -> Step:
        """Divide keys and parameters by what is active in a batch.

        A tuple key is active if all its modalities are. `split(())` makes all keys inactive, so
        that its `inactive_parameters` are all trainable parameters of the map.

        Raises:
            UnknownModalityError: A name in `active` is not a modality of the map.
            ParameterMapError: A path matches nothing any more, or no gradient can reach what it
                matches.
        """
        self._check_names(active, "`active`")
        active = set(active)
        active_keys = dict.fromkeys(self.active_keys(active))
        inactive_keys = [key for key in self.paths if key not in active_keys]
        active_ids: set[int] = set().union(*map(self.parameter_ids, active_keys))
        inactive: dict[int, ParameterEntry] = {}
        for key in inactive_keys:
            entries = self._entries_of(key)
            # What an active key owns too gets a gradient from the real loss.
            entries = [e for e in entries if e[1].requires_grad and id(e[1]) not in active_ids]
            check_connectable(entries, _where(key))
            for entry in entries:
                # A sparse table that a dense layer uses too gets dense gradients, so that entry
                # goes first.
                if id(entry[1]) not in inactive or not is_sparse_table(entry):
                    inactive[id(entry[1])] = entry
        return Step(
            active=tuple(name for name in self.modalities if name in active),
            inactive=tuple(name for name in self.modalities if name not in active),
            active_keys=tuple(active_keys),
            inactive_entries=tuple(inactive.values()),
        )

    def active_keys(self, active: Collection[str]) -> tuple[ModalityKey, ...]:
        """Keys of the map all of whose modalities are active."""
        names = set(active)
        return tuple(key for key in self.paths if names.issuperset(modalities_of(key)))

    def all(self) -> dict[int, OwnedParameter]:
        """All parameters of the map, frozen ones included, by `id`."""
        return self.of_keys(self.paths)

    def of_keys(self, keys: Iterable[ModalityKey]) -> dict[int, OwnedParameter]:
        """Parameters, frozen ones included, that any of these keys owns, by `id`."""
        parameters: dict[int, OwnedParameter] = {}
        for key in keys:
            for entry in self._entries_of(key):
                parameters.setdefault(id(entry[1]), OwnedParameter(*entry))
        return parameters

    def parameter_ids(self, key: ModalityKey) -> list[int]:
        """`id` of each parameter of one key; of a tied one once for each of its names."""
        return [id(parameter) for _, parameter, _ in self._entries_of(key)]

    def named_parameters(self, key: ModalityKey) -> dict[str, nn.Parameter]:
        """Parameters of one key by their present full names, frozen ones included.

        Raises:
            UnknownModalityError: The map has no such modality.
        """
        names = modalities_of(key)
        self._check_names(names, "`modality`")
        keys = [other for other in self.paths if set(modalities_of(other)) == set(names)]
        return {owned.name: owned.parameter for owned in self.of_keys(keys).values()}

    def _check_names(self, names: Iterable[str], where: str) -> None:
        known = set(self.modalities)
        for name in names:
            if not isinstance(name, str) or name not in known:
                raise unknown_modality(name, self.modalities, where)

    def _entries_of(self, key: ModalityKey) -> list[ParameterEntry]:
        everything: list[ParameterEntry] = []
        for path in self.paths[key]:
            entries = find_parameters(self.model, path)
            if not entries:
                raise ParameterMapError(
                    f"{_where(key)}: {path!r} was found when the wrapper was made but matches no "
                    f"parameter of {type(self.model).__name__} any more. Make a new wrapper after "
                    f"you change the structure of the model.{_flat_hint(self.model)}"
                )
            everything += entries
        return everything


def text_of(key: ModalityKey) -> str:
    """A key as one word: `T1`, `T1-dMRI`."""
    return key if isinstance(key, str) else "-".join(key)


def _nfc(text: str) -> str:
    """`text` with one spelling of each character that Unicode spells in several ways."""
    return unicodedata.normalize("NFC", text)


def _where(key: ModalityKey) -> str:
    return f"`modality_param_map[{key!r}]`"


def modalities_of(key: ModalityKey) -> tuple[str, ...]:
    """The modalities that a key names, one or several."""
    return key if isinstance(key, tuple) else (key,)


def _check_key(key: ModalityKey, seen: dict[frozenset[str] | str, ModalityKey]) -> None:
    """Refuse what is not a key, or means or reads the same as something in an earlier key.

    Args:
        key: As given.
        seen: Keys by their modalities, and keys and modalities by how they are written. What `key`
            contains is added.
    """
    names = modalities_of(key)
    valid = all(isinstance(name, str) and name for name in names)
    if not names or not valid or len(set(names)) < len(names):
        raise ParameterMapError(
            "Keys of `modality_param_map` must be modality names or tuples of different names, "
            f"got {key!r}."
        )
    if (other := seen.setdefault(frozenset(names), key)) != key:
        raise ParameterMapError(
            f"Keys {other!r} and {key!r} of `modality_param_map` mean the same modalities. Give "
            "one key the paths of both."
        )
    for part in (*names, key):
        if _UNLOGGABLE.fullmatch(text_of(part)):
            raise ParameterMapError(
                f"`modality_param_map` has the modality {part!r}, which log keys such as "
                "'grad/[inactive]/...' and 'active/T1' would not show. Rename it: avoid `active`, "
                "`inactive`, `]`, line breaks, outer spaces, and `__MIN` or `__MAX` at the end."
            )
        other = seen.setdefault(_nfc(text_of(part)), part)
        if set(modalities_of(other)) != set(modalities_of(part)):
            raise ParameterMapError(
                f"{other!a} and {part!a} in the keys of `modality_param_map` are both written "
                f"{text_of(part)!r} in logs and findings. Rename a modality."
            )


class _NamesInModel:
    """The names of modules and parameters, for which a map walks its model once.

    Attributes:
        model: The model.
        modules: All modules by all their names.
        first: The first name of each module and parameter, by `id`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        named = [*parameters.items(), *self.modules.items()]
        self.first = {id(part): name for name, part in reversed(named)}
        # Name without wrappers, position and full name of each parameter.
        self._sorted = sorted((strip_wrappers(p), i, p) for i, p in enumerate(parameters))

    def matching(self, glob: str) -> list[str]:
        """Full names of the parameters that a glob matches without wrappers, in model order."""
        # Names that begin alike are neighbours, so few are compared with each of many globs.
        start = re.split(r"[*?\[]", glob, maxsplit=1)[0]
        low = bisect_left(self._sorted, (start,))
        near = self._sorted[low : bisect_left(self._sorted, (start + chr(sys.maxunicode),))]
        # Making a pattern of the usual glob would take longer than all else.
        found = [p[1:] for p in near if glob == f"{start}*" or fnmatchcase(p[0], glob)]
        return [name for _, name in sorted(found)]


def _paths_of(spec: object, names: _NamesInModel, where: str) -> list[str]:
    """Full paths that `spec` selects; a glob gives one for each parameter that it matches."""
    if isinstance(spec, str):
        paths = _match(spec, names, where)
    elif isinstance(spec, (nn.Module, nn.Parameter)):
        if (path := names.first.get(id(spec))) is None:
            raise ParameterMapError(
                f"{where} contains {describe(spec)} that is not part of "
                f"{type(names.model).__name__}. Take modules and parameters from the model that "
                "you pass as `model`."
            )
        paths = [path]
    elif isinstance(spec, Iterable) and not isinstance(spec, (Mapping, Tensor, bytes)):
        return [path for item in spec for path in _paths_of(item, names, where)]
    else:
        raise ParameterMapError(
            f"{where} must be a path, a module, a parameter or an iterable of these, "
            f"got {describe(spec)}."
        )
    if not find_parameters(names.model, paths[0]):  # only a module can be without any
        raise ParameterMapError(
            f"{where}: the module {paths[0]!r} has no parameters. Leave it out."
        )
    return paths


def _match(spec: str, names: _NamesInModel, where: str) -> list[str]:
    bare = strip_wrappers(spec)
    # Names may contain the characters of a glob, such as `a[0]`, so an exact path goes first.
    # Wrapper segments alone would select the whole model, by accident more often than not.
    if spec and (spec in names.modules or (bare and find_parameters(names.model, spec))):
        return [spec]
    if matches := names.matching(bare):
        return matches
    raise ParameterMapError(
        f"{where}: {spec!r} matches no parameter of {type(names.model).__name__}"
        f"{_suggestion(spec, names.model)} A path names one parameter or one module, segment by "
        "segment. A glob such as 'encoder.T1.*' is compared with full parameter names."
        f"{_flat_hint(names.model)}"
    )


def _flat_hint(model: nn.Module) -> str:
    return f" {FSDP1_FLAT}" if any(map(is_flat_parameter, model.parameters())) else ""


def _suggestion(spec: str, model: nn.Module) -> str:
    """`; closest: ...` with up to three paths that look like `spec`."""
    paths = [strip_wrappers(name) for name, _ in model.named_modules() if name]
    paths += [strip_wrappers(name) for name, _ in model.named_parameters()]
    bare = strip_wrappers(spec)
    alike = [p for p in paths if fnmatchcase(_nfc(p), _nfc(bare)) and not fnmatchcase(p, bare)]
    if alike:
        return f"; {alike[0]!a} prints alike, but has other Unicode characters than {bare!a}."
    word = spec.strip("*").rpartition(".")[2].strip("*").lower()
    similar = [path for path in paths if word and word in path.lower()]
    similar += difflib.get_close_matches(spec, paths)
    closest = list(dict.fromkeys(similar))[:3]
    return f"; closest: {', '.join(map(repr, closest))}." if closest else "."
