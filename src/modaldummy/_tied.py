"""Parameters that a modality and the trunk share."""

from modaldummy._core.parameter_map import ParameterMap
from modaldummy._core.paths import strip_wrappers


def shared_with_trunk(parameters: ParameterMap) -> set[int]:
    """`id` of each parameter of the map that also has a name that no key owns.

    Such as the weight of a tower that is tied to an output layer. Walks the whole model.
    """
    occurrences = [owned for key in parameters.paths for owned in parameters.occurrences(key)]
    names = {strip_wrappers(owned.name) for owned in occurrences}
    elsewhere = {
        id(parameter)
        for name, parameter in parameters.model.named_parameters(remove_duplicate=False)
        if strip_wrappers(name) not in names
    }
    return elsewhere.intersection(id(owned.parameter) for owned in occurrences)
