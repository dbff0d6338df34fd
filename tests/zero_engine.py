"""A stand-in for a DeepSpeed engine of ZeRO, whose optimizer steps flat tensors."""

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Optimizer

from modaldummy._engines import zero_flat_parameters
from tests.preflight.models import Engine

Parameters = list[nn.Parameter]
NUM_RANKS = 2


class Group:
    """A group of parameters, and the flat tensor that a rank steps for it.

    Args:
        parameters: The parameters.
        rank: The rank that has a half of the flat tensor; None for one that has all of it.
    """

    def __init__(self, parameters: Parameters, rank: int | None) -> None:
        self.parameters = parameters
        whole = flattened(parameters)
        self.size = len(whole) if rank is None else len(whole) // NUM_RANKS
        self._part = slice((rank or 0) * self.size, ((rank or 0) + 1) * self.size)
        self.offsets = [0, *accumulate(parameter.numel() for parameter in parameters)][:-1]
        self.flat = nn.Parameter(whole[self._part].clone())

    def take_gradients(self) -> None:
        """Move the gradients of the parameters to the flat tensor."""
        gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in self.parameters]
        self.flat.grad = flattened(gradients)[self._part].clone()
        for parameter in self.parameters:
            parameter.grad = None

    def give_values(self) -> None:
        """Copy the values of the flat tensor to the parameters."""
        whole = flattened(self.parameters).clone()
        whole[self._part] = self.flat.detach()
        vector_to_parameters(whole, self.parameters)


def flattened(tensors: Iterable[Tensor]) -> Tensor:
    """One vector with the elements of all tensors, and padding that makes two halves equal."""
    vector = parameters_to_vector(tensor.detach() for tensor in tensors)
    return pad(vector, (0, len(vector) % NUM_RANKS))


class Zero12:
    """The optimizer of ZeRO-1 and 2, which steps one flat tensor after the other.

    A rank stands for its process group, so that `dist.get_rank` must return its argument; None is
    the only rank of the default group.
    """

    def __init__(
        self, groups: list[Parameters], make: Callable[..., Optimizer], rank: int | None
    ) -> None:
        self.groups = [Group(parameters, rank) for parameters in groups]
        self.single_partition_of_fp32_groups = [group.flat for group in self.groups]
        self.partition_size = [group.size for group in self.groups]
        self.real_dp_process_group = [rank for _ in groups]
        self.round_robin_bit16_groups = groups
        self.round_robin_bit16_offsets = [group.offsets for group in self.groups]
        self.optimizer = make([{"params": [group.flat]} for group in self.groups])

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def step(self) -> None:
        groups = self.optimizer.param_groups
        for place, group in enumerate(self.groups):
            group.take_gradients()
            self.optimizer.param_groups = [groups[place]]
            self.optimizer.step()
            group.give_values()
        self.optimizer.param_groups = groups


class Zero3:
    """The optimizer of ZeRO-3, which steps one sub-group after the other."""

    def __init__(self, groups: list[Parameters], make: Callable[..., Optimizer]) -> None:
        self.groups = [Group(parameters, None) for parameters in groups]
        self.fp32_partitioned_groups_flat = [group.flat for group in self.groups]
        self.fp16_groups = groups
        self.sub_group_to_group_id = {place: place for place in range(len(groups))}
        self.grad_position = {
            parameter: [place, offset, parameter.numel()]
            for place, group in enumerate(self.groups)
            for parameter, offset in zip(group.parameters, group.offsets, strict=True)
        }
        self.optimizer: Any = make([{"params": [group.flat]} for group in self.groups])
        for own in self.optimizer.param_groups:
            own["params"] = []  # between steps

    def get_param_id(self, parameter: nn.Parameter) -> nn.Parameter:
        return parameter

    def step(self) -> None:
        for group, own in zip(self.groups, self.optimizer.param_groups, strict=True):
            group.take_gradients()
            own["params"] = [group.flat]
            self.optimizer.step()
            own["params"] = []
            group.give_values()


class ZeroEngine(Engine):
    """An engine that steps `optimizer` after each `num_micros` calls of `step`.

    Attributes:
        global_steps: The steps so far, also those that were skipped.
        overflows: Whether gradients are not finite, so that the engine skips its steps.
    """

    def __init__(self, module: nn.Module, stage: int, optimizer: Any, num_micros: int = 1) -> None:
        super().__init__(module, stage)
        self.optimizer = optimizer
        self.global_steps = 0
        self.overflows = False
        self._num_micros = num_micros
        self._micro_step = 0

    def step(self) -> None:
        self._micro_step += 1
        if self._micro_step % self._num_micros:
            return
        if self.overflows:
            self.module.zero_grad()
        else:
            self.optimizer.step()
        self.global_steps += 1


def zero_snapshot(engine: Any) -> dict[tuple[str, str], Tensor]:
    """The master copy and the optimizer state of each parameter on this rank."""
    name_of = {id(p): name for name, p in engine.module.named_parameters()}
    found = {}
    for each in zero_flat_parameters(engine):
        state = engine.optimizer.optimizer.state.get(each.flat, {})
        for kind, tensor in {"master": each.flat.detach(), **state}.items():
            if isinstance(tensor, Tensor) and tensor.shape == each.flat.shape:
                for part in each.ranges:
                    own = tensor[part.start : part.stop].clone()
                    found[name_of[id(part.parameter)], kind] = own
    return found
