"""Data-parallel training: each process draws, scores and replays its own groups, and all take the same step.

A process that was started alone is a world of one, in which every function here gives back what it was given. What
has to agree is small: rewards, counts, sums of what is measured, gradients of what is trained. `torchrun` and
`accelerate launch` tell each process through the environment who it is; inside `joined` they work together.

Left out: weights shared out among GPUs (FSDP). Generators run their network part by part and rollouts end after
different numbers of steps, so that its all-gathers would not meet; with adapters over bfloat16 weights the largest
network here takes 2 GB of each GPU.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

T = TypeVar("T")


_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


def world_size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() and not _ALONE.get() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if distributed.is_initialized() and not _ALONE.get() else 0


def is_main() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes of a launcher work together, each on the GPU of its own number where there are GPUs.

    Raises ValueError where the launcher started more processes than the machine has GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        here, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if here >= gpus:
            raise ValueError(f"process {here} of this machine has no GPU: there are {gpus}; launch at most {gpus}")
        torch.cuda.set_device(here)
    distributed.init_process_group()  # gloo for main memory, NCCL where there are GPUs
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is a world of one: for what one of them does for all."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def require_whole_groups(num_groups: int) -> None:
    """Raise ValueError in one line where the groups cannot be shared out equally."""
    size = world_size()
    if num_groups % size:
        below = num_groups - num_groups % size
        near = " or ".join(str(count) for count in (below, below + size) if count)
        raise ValueError(f"num_groups={num_groups}: expected a multiple of the {size} processes; nearest: {near}")


def own(values: T) -> T:
    """The part of a sequence or tensor, in order of rank, that belongs to this process."""
    each = len(values) // world_size()
    return values[rank() * each : (rank() + 1) * each]


def gather(values: Tensor) -> Tensor:
    """The rows (B, ...) of all processes in order of rank, (W * B, ...), in each of them."""
    if world_size() == 1:
        return values
    mine = values.to(_meeting_place(values.device)).contiguous()
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    distributed.all_gather(parts, mine)
    return torch.cat(parts).to(values.device)


def total(values: Tensor) -> Tensor:
    """Sum over processes of tensors of one shape."""
    return values if world_size() == 1 else gather(values[None]).sum(0)


def highest(values: Tensor) -> Tensor:
    """Element-wise maximum over processes."""
    return values if world_size() == 1 else gather(values[None]).amax(0)


def mean(value: float) -> float:
    """Mean over processes of a number."""
    return value if world_size() == 1 else float(total(torch.tensor(value, dtype=torch.float64))) / world_size()


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes, in place; where no process has one, there is none afterwards."""
    if world_size() == 1:
        return
    parameters = list(parameters)
    somewhere = highest(torch.tensor([value.grad is not None for value in parameters], dtype=torch.int32)).tolist()
    wanted = [value for value, present in zip(parameters, somewhere, strict=True) if present]
    for value in wanted:
        value.grad = torch.zeros_like(value) if value.grad is None else value.grad
    pending = [distributed.all_reduce(value.grad, async_op=True) for value in wanted]
    for work in pending:
        work.wait()


@torch.no_grad()
def same_start(modules: Iterable[nn.Module]) -> None:
    """Give every process the parameters and buffers of the main one."""
    if world_size() == 1:
        return
    for module in modules:
        for value in (*module.parameters(), *module.buffers()):
            shown = value.data.to(_meeting_place(value.device)).contiguous()
            distributed.broadcast(shown, src=0)
            value.data.copy_(shown)


def from_main(value: T | None) -> T:
    """What the main process was given, in every process; plain values."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def main_first() -> Iterator[None]:
    """The main process runs what is inside before the others do, and nobody leaves before all have."""
    if world_size() == 1:
        yield
        return
    try:
        if not is_main():
            distributed.barrier()
        yield
    finally:  # an error inside is everybody's
        if is_main():
            distributed.barrier()
        distributed.barrier()


def _meeting_place(device: torch.device) -> torch.device:
    """Where tensors of a device can be sent from: a group made for GPUs alone takes no others."""
    known = str(distributed.get_backend_config())
    return device if device.type in known else torch.device("cuda")
