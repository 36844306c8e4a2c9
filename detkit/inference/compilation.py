"""Compilation of a network by TorchInductor, with a persistent cache, dynamic image sizes and readable errors."""

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
    """Compile the two parts of a network; compilation takes place when they first run.

    The returned functions raise ConfigError if there is no working compiler.

    Args:
        model: the model that the parts belong to.
        trunk: maps images to feature maps.
        head: maps feature maps to raw outputs.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Torch's default folder is temporary. Torch sets the variable itself, possibly before this point.
    if os.environ.get(CACHE_VARIABLE, default_cache_dir()) == default_cache_dir():
        os.environ[CACHE_VARIABLE] = str(Path(CACHE).expanduser())
    # It warns about the missing GPU on every machine without one.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
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
        # The sizes inside the padding only pass through, but as constants they would specialise the compiled code.
        whole = Inputs(inputs.size, (inputs.size,) * len(inputs.sizes), inputs.proposals)
        with compiler_errors():
            return with_sizes(fast_head(features, whole), inputs.sizes)

    return features, outputs


def with_sizes(outputs: Any, sizes: tuple[tuple[int, int], ...]) -> Any:
    """Replace the image sizes inside the padding in a head's raw outputs, which are nested named tuples."""
    if not hasattr(outputs, "_fields"):
        return outputs
    changed = {name: with_sizes(value, sizes) for name, value in zip(outputs._fields, outputs)}
    return outputs._replace(**(changed | ({"sizes": sizes} if "sizes" in changed else {})))


def _compiler() -> list[str]:
    """Return the C++ compiler command that TorchInductor chooses."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return shlex.split(os.environ.get("CXX", "")) or [usual]


REMEDY = "Install it (packages g++ and python3-dev), set the variable CXX to another one, or omit --compile."


def check_compiler(device: torch.device) -> None:
    """Check that the C++ compiler that the device requires is installed.

    Raises:
        ConfigError: it is missing.
    """
    command = _compiler()
    if device.type == "cpu" and not shutil.which(command[0]):
        raise ConfigError(f"--compile needs a C++ compiler, but there is no {command[0]}. {REMEDY}")


@contextmanager
def compiler_errors() -> Iterator[None]:
    """Convert compilation errors, which occur when the network first runs, to ConfigError.

    Raises:
        ConfigError: compilation failed; the message contains the compiler's.
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
        raise ConfigError(f"TorchInductor cannot compile this network ({name}: {line}). Omit --compile.") from error


def _last_error(said: str) -> str:
    """Return the most informative line; the very last one may only state that compilation failed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "error" in line), lines[-1] if lines else "no output")
