"""Results kept under the hash of everything that they depend on, so that a second look costs seconds.

An entry is a table of plain values in outputs/cache, written whole or not at all. Nothing is ever
invalidated: what has changed has another key. The folder may be deleted at any time.
"""

import ast
import gzip
import hashlib
import inspect
import json
import os
import textwrap
import uuid
import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from speedrl_lab.runs import outputs_root

PACKAGE = Path(__file__).parent


def fingerprint(*values: Any) -> str:
    """SHA-256 of nested values, 64 hex digits: equal content, equal digits, in any process.

    Plain values, sequences, mappings, dataclasses, arrays, tensors, and networks (class, settings and all
    weights); any other object counts as the source of its class and its attributes. Raises TypeError for
    what has no content to compare, such as a function.
    """
    digest = hashlib.sha256()
    _feed(digest, values, ())
    return digest.hexdigest()


def _feed(digest: "hashlib._Hash", value: Any, above: tuple[int, ...]) -> None:
    """Add a value to a digest, each part behind its type and length, so that no two values run together."""

    def add(kind: str, content: bytes) -> None:
        digest.update(f"{kind} {len(content)};".encode() + content)

    def add_all(kind: str, parts: Sequence[Any]) -> None:
        add(kind, str(len(parts)).encode())
        for part in parts:
            _feed(digest, part, (*above, id(value)))

    if id(value) in above:
        raise TypeError(f"a {type(value).__name__} that contains itself has no fingerprint")
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device | Path):
        add(type(value).__name__, repr(value).encode())
    elif isinstance(value, bytes):
        add("bytes", value)
    elif isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().flatten()
        add(f"{value.dtype} {tuple(value.shape)}", flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray | np.generic):
        _feed(digest, torch.as_tensor(value), above)
    elif isinstance(value, Mapping):
        add_all("mapping", sorted(value.items(), key=lambda item: repr(item[0])))
    elif isinstance(value, list | tuple):
        add_all("sequence", value)
    elif isinstance(value, nn.Module):  # repr: the layers and their settings
        add_all("network", [_source(type(value)), repr(value), getattr(value, "config", {}), value.state_dict()])
    elif is_dataclass(value) or (hasattr(value, "__dict__") and not callable(value)):
        add_all("object", [_source(type(value)), vars(value)])
    else:
        raise TypeError(f"a {type(value).__name__} has no fingerprint")


@cache
def _source(kind: type) -> list[str]:
    """Names of a class and of those that it derives from, with their bare code where it can be read.

    Read once: a file that is edited later is not the code that runs.
    """
    parts = []
    for base in kind.__mro__[:-1]:
        parts.append(f"{base.__module__}.{base.__qualname__}")
        if not base.__module__.startswith("torch."):
            try:
                parts.append(_bare(textwrap.dedent(inspect.getsource(base))))
            except (OSError, TypeError):  # typed into a console
                continue
    return parts


def sources(*modules: str) -> list[str]:
    """The code of modules of this package, such as "sampler", for a key that changes with them.

    Layout, comments and docstrings decide nothing and are left out.
    """
    return [_bare((PACKAGE / f"{module}.py").read_text()) for module in modules]


def _bare(source: str) -> str:
    """Source code as its syntax tree, without the statements that are strings alone."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [line for line in body if not (isinstance(line, ast.Expr) and _is_text(line.value))]
    return ast.dump(tree)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def load(folder: str, key: str, columns: Sequence[str], rows: int) -> pd.DataFrame | None:
    """The table stored under a key in outputs/cache/<folder>, or None where there is none.

    A file that cannot be read or has not these columns and as many rows is no error: a warning, and None.
    """
    path = _path(folder, key)
    if not path.is_file():
        return None
    try:
        table = pd.DataFrame(json.loads(gzip.decompress(path.read_bytes())))
        if list(table.columns) != list(columns) or len(table) != rows:
            raise ValueError(f"{len(table)} rows of {', '.join(map(str, table.columns))}")
    except (OSError, EOFError, ValueError, TypeError, zlib.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"{path} is broken ({reason}); it is computed again", stacklevel=2)
        return None
    return table


def store(folder: str, key: str, table: pd.DataFrame) -> None:
    """Write a table of numbers and strings under a key; exact, and safe beside other writers of the same key.

    Where nothing can be written there is a warning: the table is as good without a copy.
    """
    path = _path(folder, key)
    text = json.dumps({name: table[name].tolist() for name in table})
    partial = path.with_name(f"{key}.{os.getpid()}.{uuid.uuid4().hex}.partial")  # a name of one's own
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(gzip.compress(text.encode(), mtime=0))
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        warnings.warn(f"cannot keep a result in {path.parent} ({error.strerror}); it is not cached", stacklevel=2)


def _path(folder: str, key: str) -> Path:
    return outputs_root() / "cache" / folder / f"{key}.json.gz"
