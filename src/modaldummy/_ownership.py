"""Which keys of the map own a parameter, and which parameters the trunk has too."""

from modaldummy._core.parameter_map import ModalityKey, ParameterMap
from modaldummy._core.paths import find_parameters, strip_wrappers


def owners_of(parameters: ParameterMap) -> dict[int, list[ModalityKey]]:
    """Keys of the map that own a parameter, in map order, by the `id` of the parameter."""
    owners: dict[int, list[ModalityKey]] = {}
    for key in parameters.paths:
        for parameter_id in parameters.of_keys([key]):
            owners.setdefault(parameter_id, []).append(key)
    return owners


def shared_with_trunk(parameters: ParameterMap) -> set[int]:
    """`id` of each parameter of the map that also has a name that no key owns.

    Such as the weight of a tower that is tied to an output layer. Walks the whole model.
    """
    entries = [
        entry
        for paths in parameters.paths.values()
        for path in paths
        for entry in find_parameters(parameters.model, path)
    ]
    owned_names = {strip_wrappers(name) for name, _, _ in entries}
    elsewhere = {
        id(parameter)
        for name, parameter in parameters.model.named_parameters(remove_duplicate=False)
        if strip_wrappers(name) not in owned_names
    }
    return elsewhere & parameters.all().keys()
