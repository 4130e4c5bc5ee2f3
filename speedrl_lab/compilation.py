"""Functions of a network as torch.compile makes them: fused kernels instead of one call of PyTorch an operation.

On a CPU inductor writes C++ and needs a compiler for it; on a GPU it writes Triton, which was not tried: none was at
hand. CUDA graphs are left out. What is compiled is a function of modules and tensors, once a process: all blocks of a
network and all its copies share it, and no weight gets another name. Kernels stay on disk for the next process.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` for tensors of any number of rows; made at the first call for one row, for more, and with gradient."""
    return torch.compile(function, dynamic=True)


def as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` itself: what stands for `compiled` where nothing is compiled."""
    return function


def require_compiler(device: torch.device) -> None:
    """Compile a sum on `device`; raises OSError in one line where that does not work."""

    def add(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    try:
        torch.compile(add)(torch.zeros(2, device=device))
    except Exception as error:  # of many kinds, with the whole of a compiler's output
        said = str(error).strip().splitlines() or [type(error).__name__]
        wanted = "triton" if device.type == "cuda" else "a C++ compiler (g++, or the one that CXX names)"
        raise OSError(
            f"compiled=True needs {wanted} that works with torch.compile; install it, or leave compiled out "
            f"({said[0][:200]})"
        ) from None
