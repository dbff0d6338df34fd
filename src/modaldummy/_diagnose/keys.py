"""What keys of a log stand for, whatever wrote them."""

import functools
import re

# The first of these that a history has is the loss.
LOSSES = ("loss", "training_loss", "total_loss", "train_loss", "train_loss_step", "loss_step")
_LONGEST = 1000  # characters of a key that is looked at; to search one takes their square
STEPS = ("step", "_step", "global_step", "Step")
_ROLES = {
    "report": r"modaldummy/(real|dummy|uncapped|fraction|num_params|num_elements)",
    "present": r"modaldummy/active/(.+)",
    "active": r"active/(.+)",
    "grad": r"grad_(ratio|ranks)",
    "missing": r"grad_missing/(.+)",
    "overall": r"grad_norm()",  # as trainers log it, of all parameters
    "norm": r"grad_norm/(.+)",
    "label": r"grad/\[([^]]+)\]/.+",  # of a batch with inactive modalities
    "whole": r"grad/[^/]*\.[^/]*()",  # of one without; others log a `grad/norm`
    "constant": r"grad/([^/]+)/.+",  # of any, with keys that are the same at each step
}


@functools.lru_cache(maxsize=2**16)
def role_of(key: str) -> tuple[str, str]:
    """What a key of a log stands for, and for which modality; `("", "")` for an unknown one.

    Such as `("norm", "T1")` for `train/grad_norm/T1`, whatever a logger put before it, and
    `("loss", "train_loss")` for a loss.
    """
    if len(key) > _LONGEST:
        return "", ""
    # A panel of Weights & Biases writes `<run> - <key>`, and extremes beside it.
    rest = key.rpartition(" - ")[2].strip()
    found = _role(rest)
    return found if found[0] or rest == key else _role(key)


def _role(key: str) -> tuple[str, str]:
    head, _, last = key.rpartition("/")
    if head in ("", "train", "trainer", "training"):
        if last in STEPS:
            return "step", ""
        if last in LOSSES:
            return "loss", last
    if not key.endswith(("__MIN", "__MAX")):
        for start in [0, *(slash.end() for slash in re.finditer("/", key))]:
            for role, pattern in _ROLES.items():
                if match := re.fullmatch(pattern, key[start:]):
                    return role, match.group(1)
    return "", ""
