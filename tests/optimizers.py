"""Optimizers that take dense gradients, by name, each made from parameters and a learning rate."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pytorch_optimizer import Lion
from torch import optim
from torch.nn import Parameter
from torch.optim import Optimizer

Make = Callable[[Sequence[Parameter], float], Optimizer]


def _matrices_only(kind: Any, params: Sequence[Parameter], lr: float) -> Optimizer:
    made: Optimizer = kind([p for p in params if p.ndim == 2], lr=lr)
    return made


def _makes(kind: Any, **options: Any) -> Make:
    return lambda params, lr: kind(params, lr=lr, **options)


OPTIMIZERS: dict[str, Make] = {
    "SGD": _makes(optim.SGD),
    "SGD, momentum 0.9": _makes(optim.SGD, momentum=0.9),
    "SGD, momentum 0.9, decay 0.01": _makes(optim.SGD, momentum=0.9, weight_decay=0.01),
    "ASGD": _makes(optim.ASGD),
    "Rprop": _makes(optim.Rprop),
    "RMSprop": _makes(optim.RMSprop),
    "Adagrad": _makes(optim.Adagrad),
    "Adadelta": _makes(optim.Adadelta),
    "Adam": _makes(optim.Adam),
    "AdamW": _makes(optim.AdamW),
    "Adamax": _makes(optim.Adamax),
    "NAdam": _makes(optim.NAdam),
    "RAdam": _makes(optim.RAdam),
    "Adafactor": _makes(optim.Adafactor),
    "Lion": _makes(Lion),
}
if hasattr(optim, "Muon"):  # torch 2.9 and newer
    OPTIMIZERS["Muon"] = partial(_matrices_only, optim.Muon)
