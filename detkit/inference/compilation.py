"""A network compiled by TorchInductor: kept between runs, one for images of all sizes, and its errors told."""

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from detkit.errors import ConfigError
from detkit.model import Model
from detkit.structures import Inputs

Trunk: TypeAlias = Callable[[Tensor], list[Tensor]]
Outputs: TypeAlias = Callable[[list[Tensor], Inputs], Any]
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
CACHE = "~/.cache/detkit/compiled"


def compiled(model: Model, trunk: Trunk, head: Outputs) -> tuple[Trunk, Outputs]:
    """The two parts of a network, compiled when they first run.

    Args:
        model: whose parts they are.
        trunk: from images to maps.
        head: from maps to raw outputs.

    Raises:
        ConfigError: by the two functions, where there is no compiler that works.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Torch's own folder is a temporary one. It sets the variable itself, sometimes before this.
    if os.environ.get(CACHE_VARIABLE, default_cache_dir()) == default_cache_dir():
        os.environ[CACHE_VARIABLE] = str(Path(CACHE).expanduser())
    # It warns on every machine without a GPU that there is none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # A network for images of all sizes.
    dynamic = not model.fit.one_size
    options: dict[str, Any] = {"freezing": True}
    fast_trunk = torch.compile(trunk, dynamic=dynamic, options=options)
    fast_head = torch.compile(head, dynamic=dynamic, options=options)

    def features(images: Tensor) -> list[Tensor]:
        with compiler_errors():
            return fast_trunk(images)

    def outputs(features: list[Tensor], inputs: Inputs) -> Any:
        if model.head.reads_sizes:
            return head(features, inputs)
        # The sizes inside the padding only pass through; the compiled code would be for these alone.
        whole = Inputs(inputs.size, (inputs.size,) * len(inputs.sizes), inputs.proposals)
        with compiler_errors():
            return with_sizes(fast_head(features, whole), inputs.sizes)

    return features, outputs


def with_sizes(outputs: Any, sizes: tuple[tuple[int, int], ...]) -> Any:
    """Raw outputs of a head, nested named tuples, with these `sizes` of the images inside the padding."""
    if not hasattr(outputs, "_fields"):
        return outputs
    changed = {name: with_sizes(value, sizes) for name, value in zip(outputs._fields, outputs)}
    return outputs._replace(**(changed | ({"sizes": sizes} if "sizes" in changed else {})))


def _compiler() -> list[str]:
    """The C++ compiler's command, as TorchInductor chooses it."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return shlex.split(os.environ.get("CXX", "")) or [usual]


REMEDY = "Install it (the packages g++ and python3-dev), name another by the variable CXX, or leave --compile out."


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where that needs a C++ compiler and there is none.

    Raises:
        ConfigError: naming the one that is missing.
    """
    command = _compiler()
    if device.type == "cpu" and not shutil.which(command[0]):
        raise ConfigError(f"--compile needs a C++ compiler, but there is no {command[0]}. {REMEDY}")


@contextmanager
def compiler_errors() -> Iterator[None]:
    """The network is compiled when it first runs: what goes wrong then becomes a ConfigError.

    Raises:
        ConfigError: with what the compiler said.
    """
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        yield
    except BackendCompilerFailed as error:
        reason = error.inner_exception
        if isinstance(reason, (CppCompileError, InvalidCxxCompiler)):
            raise ConfigError(
                f"--compile needs a C++ compiler with OpenMP, but {shlex.join(_compiler())} does not work: "
                f"{_last_error(getattr(reason, 'output', str(reason)))}. {REMEDY}"
            ) from error
        name, line = type(reason).__name__, (str(reason).splitlines() or [""])[0]
        raise ConfigError(
            f"TorchInductor cannot compile this network ({name}: {line}). Leave --compile out."
        ) from error


def _last_error(said: str) -> str:
    """The line that tells the most; the last of all may only say that the compiler gave up."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "error" in line), lines[-1] if lines else "it said nothing")
