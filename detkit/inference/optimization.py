"""Optimization of a trained model for prediction: batch-norm folding, half precision and compilation."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from detkit.errors import ConfigError
from detkit.inference.compilation import Outputs, Trunk, check_compiler, compiled
from detkit.model import Model
from detkit.structures import Inputs

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROBE_SIDE = 160
"""Side in pixels of the image that traces the layer order of a network that takes images of any size."""
TIMM_NORM = "BatchNormAct2d"
"""timm's batch norm with a built-in activation."""


class FastNetwork:
    """A model optimized to compute its raw outputs as fast as the hardware allows.

    The model is modified in place and can only be used for prediction afterwards. Batch norms that follow a convolution
    are folded into its weights (outputs differ by float32 rounding only). In half precision, convolutions and linear
    layers compute in 16 bits and everything else (norms, boxes, scores) in float32, which changes scores by a few
    thousandths.

    Args:
        model: in evaluation mode, on its device.
        precision: "auto" is bf16 if the hardware has matrix units for it (GPUs of compute capability 8.0 or higher,
            CPUs with AMX), otherwise fp32; always fp32 for heads with Head.full_precision. "bf16" also accepts
            AVX512-BF16.
        compile: compile backbone, neck and head with TorchInductor. This takes about a minute the first time; the
            result is cached in ~/.cache/detkit/compiled. One compilation serves images of all sizes; if sizes differ,
            a second one may follow for images whose coarse maps have fewer than 20,480 values.

    Attributes:
        features: maps images in 0..1 to the feature maps after backbone and neck.
        outputs: maps these and the head's Inputs to its raw outputs.
        choices: one-line summary of how the network runs.

    Raises:
        ConfigError: the precision is not available on the device, the model is already in half precision, or there is
            no compiler. A compiler that does not work raises ConfigError when the network first runs.
    """

    def __init__(self, model: Model, precision: Precision = "auto", compile: bool = False) -> None:
        if any(weight.dtype != torch.float32 for weight in model.parameters()):
            raise ConfigError(
                "This model is not in float32: it has already been converted to half precision for prediction, which "
                "cannot be undone. Load it again."
            )
        self.model = model
        self.device = model.mean.device
        check_choices(precision, compile, self.device)
        if precision == "auto" and model.head.full_precision:
            precision = "fp32"
        self.precision, reason = choose_precision(precision, self.device)
        self.folded = fold_batch_norms(model)
        if self.precision != "fp32":
            _halve_weights(model, DTYPES[self.precision])
        self.features: Trunk = self._trunk
        self.outputs: Outputs = self._head
        if compile:
            self.features, self.outputs = compiled(model, self._trunk, self._head)
        self.choices = ", ".join(
            [
                str(self.device),
                self.precision + (f" ({reason})" if reason else ""),
                "channels_last",
                f"{self.folded} batch norms folded",
                "compiled" if compile else "not compiled",
            ]
        )

    def __call__(
        self, images: Tensor, sizes: tuple[tuple[int, int], ...], proposals: tuple[Tensor, ...] | None = None
    ) -> Any:
        """Compute the same as `Model.forward`; to be called inside `arithmetic`."""
        features = self.features(images)
        return self.outputs(features, Inputs((images.shape[2], images.shape[3]), sizes, proposals))

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Run network and head, including `decode`, in the chosen precision and without gradients."""
        half = self.precision != "fp32"
        dtype = DTYPES[self.precision] if half else None
        # Also in float32, since the caller may have enabled autocast.
        with torch.inference_mode(), torch.autocast(self.device.type, dtype, enabled=half), usual_defaults():
            yield

    def _trunk(self, images: Tensor) -> list[Tensor]:
        model = self.model
        features = model.backbone((images - model.mean) / model.std)
        return features if model.neck is None else model.neck(features)

    def _head(self, features: list[Tensor], inputs: Inputs) -> Any:
        return self.model.head(features, inputs)


@contextmanager
def usual_defaults() -> Iterator[None]:
    """Create new tensors as float32 on the CPU, whatever torch's defaults are.

    The default dtype is shared by all threads, so if the caller has changed it, they run one at a time.
    """
    device = torch.get_default_device()
    with nullcontext() if device.type == "cpu" else torch.device("cpu"):
        if torch.get_default_dtype() == torch.float32 and not ONE_AT_A_TIME.locked():
            yield
            return
        with ONE_AT_A_TIME:
            dtype = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
            try:
                yield
            finally:
                torch.set_default_dtype(dtype)


def check_choices(precision: Precision, compile: bool, device: torch.device) -> None:
    """Check that the machine supports the given precision and compilation.

    Raises:
        ConfigError: the precision is not available on the device, or there is no compiler.
    """
    choose_precision(precision, device)
    if compile:
        check_compiler(device)


def choose_precision(asked: Precision, device: torch.device) -> tuple[Precision, str]:
    """Resolve the precision; return it with the reason: why "auto" chose it, or the instructions that it uses.

    Raises:
        ConfigError: it is not available on the device.
    """
    if asked == "fp32" or asked not in ("auto", *DTYPES):
        if asked != "fp32":
            raise ConfigError(f"'precision' must be auto, fp32, bf16 or fp16, but is '{asked}'.")
        return "fp32", ""
    native = bf16_instructions(device)
    if asked == "auto":
        if native in MATRIX_UNITS:
            return "bf16", native
        faster = f", but --precision bf16, using {native}, is faster and changes some boxes" if native else ""
        return "fp32", f"no matrix units for bf16 on this {device.type}{faster}"
    if asked == "bf16" and not native:
        raise ConfigError(
            f"This {device.type} has no bf16 instructions, so bf16 would be slower than fp32. Use --precision "
            f"auto or fp32."
        )
    if asked == "fp16" and device.type not in ("cuda", "mps"):
        raise ConfigError(f"fp16 is for GPUs, but the device is '{device}'. Use --precision auto, bf16 or fp32.")
    return asked, native if asked == "bf16" else ""


ONE_AT_A_TIME = threading.Lock()
MATRIX_UNITS = ("tensor cores", "AMX")
"""Hardware on which bf16 is so much faster than float32 that `auto` selects it, although one box in ten then moves by a
pixel or its score by a few hundredths. AVX512-BF16, 1.3 to 2.3 times as fast as float32, is left to the user."""


def bf16_instructions(device: torch.device) -> str:
    """Name the hardware unit that multiplies bf16 faster than float32; empty if the device has none."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "tensor cores" if torch.cuda.is_bf16_supported(including_emulation=False) else ""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        named = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
        return next((name for key, name in named.items() if capabilities.get(key)), "")
    return ""


@torch.no_grad()
def fold_batch_norms(model: Model) -> int:
    """Fold batch norms into the convolutions before them; return their number.

    The order is observed in a forward pass, not inferred from the order of the modules: a norm is folded if its input
    is always the unmodified output of the same convolution and nothing else reads that output.
    """
    makers: dict[nn.Module, list[nn.Module | None]] = {}
    calls: dict[nn.Module, int] = {}
    hooks = []
    with_head = any(_foldable(module) for module in model.head.modules())

    def made(module: nn.Module, _: Any, output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        # Stored on the tensor, so that no output is kept alive. In-place operations increment the version.
        output.made_by = (module, output._version)  # type: ignore[attr-defined]

    def used(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        maker, version = getattr(inputs[0], "made_by", (None, None))
        makers.setdefault(norm, []).append(maker if version == inputs[0]._version else None)

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(made))
        elif _foldable(module):
            hooks.append(module.register_forward_pre_hook(used))
    try:
        _probe(model, with_head)
    finally:
        for hook in hooks:
            hook.remove()
    pairs: dict[nn.Module, nn.Module] = {}
    for norm, found in makers.items():
        convolution = found[0]
        if convolution is not None and set(found) == {convolution} and calls[convolution] == len(found):
            pairs[norm] = convolution
    pairs = _unshared(model, pairs, with_head)
    for norm, convolution in pairs.items():
        _fold(cast(nn.Conv2d, convolution), cast(nn.BatchNorm2d, norm))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in pairs:
                setattr(parent, name, _rest(child))
    return len(pairs)


def _unshared(model: Model, pairs: dict[nn.Module, nn.Module], with_head: bool) -> dict[nn.Module, nn.Module]:
    """Keep the pairs (norm, convolution) whose convolution is read by the norm only."""
    several = len(set(pairs.values())) < len(pairs)  # two norms share a convolution
    if not pairs or not (several or _read_elsewhere(model, pairs, with_head)):
        return pairs
    if len(pairs) == 1:
        return {}
    items, middle = list(pairs.items()), len(pairs) // 2
    return _unshared(model, dict(items[:middle]), with_head) | _unshared(model, dict(items[middle:]), with_head)


def _read_elsewhere(model: Model, pairs: Mapping[nn.Module, nn.Module], with_head: bool) -> bool:
    """Return whether anything but its norm (a shortcut, another norm) reads the output of one of the convolutions.

    In a second pass the convolutions output NaN, and only their norms are given the true values. If NaN reaches another
    layer or the network's outputs, the output was read there.
    """
    hooks, readers = [], []

    def give_nan(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        nan = torch.full_like(output, torch.nan)
        nan.target = output  # type: ignore[attr-defined]
        return nan

    def take_target(norm: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].target,)  # type: ignore[attr-defined]

    def watch(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if _has_nan(inputs) and output is not inputs[0]:
            readers.append(module)

    for module in model.modules():
        if module in pairs:
            hooks.append(module.register_forward_pre_hook(take_target))
        elif not any(module.children()):
            hooks.append(module.register_forward_hook(watch))
    for convolution in pairs.values():
        hooks.append(convolution.register_forward_hook(give_nan))
    try:
        return _has_nan(_probe(model, with_head)) or bool(readers)
    except (AttributeError, ValueError):
        return True  # a norm received another tensor than its convolution's, or a layer rejected NaN
    finally:
        for hook in hooks:
            hook.remove()


def _has_nan(value: Any) -> bool:
    """Return whether a tensor, or any tensor in nested tuples and lists, contains NaN."""
    if isinstance(value, Tensor):
        return bool(value.isnan().any())
    return isinstance(value, (tuple, list)) and any(map(_has_nan, value))


def _probe(model: Model, with_head: bool) -> Any:
    """Run the network on an image of the mean colour; return the maps and the head's raw outputs."""
    size = (PROBE_SIDE, PROBE_SIDE) if model.fit.resize == "short_side" else model.fit.size
    images = model.mean.expand(1, 3, *size).contiguous(memory_format=torch.channels_last)
    features = model.backbone((images - model.mean) / model.std)
    if model.neck is not None:
        features = model.neck(features)
    outputs = None
    if with_head:
        whole = torch.tensor([[0.0, 0.0, size[1], size[0]]], device=images.device)
        proposals = (whole,) if "proposals" in model.head.needs else None
        outputs = model.head(features, Inputs(size, (size,), proposals))
        model.head.decode(outputs)
    return features, outputs


def _foldable(module: nn.Module) -> bool:
    """Return whether the module is a batch norm without hooks."""
    plain = type(module) is nn.BatchNorm2d or type(module).__name__ == TIMM_NORM
    return plain and not module._forward_hooks and not module._forward_pre_hooks


def _rest(norm: nn.Module) -> nn.Module:
    """Return the remaining layers of a folded norm."""
    return nn.Sequential(norm.drop, norm.act) if type(norm).__name__ == TIMM_NORM else nn.Identity()  # type: ignore


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    convolution.weight.data = convolution.weight.contiguous(memory_format=torch.channels_last)


def _halve_weights(model: Model, dtype: torch.dtype) -> None:
    """Convert weights once, instead of through autocast in each call."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            if isinstance(module, nn.Conv2d):
                module.weight.data = rounded(module.weight.data, dtype)
            module.to(dtype)


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Round convolution weights (O, I, h, w) to half precision, preserving the sum of each h x w kernel.

    The rounding error of each weight is carried over to the next one in its kernel. Rounded independently, errors add
    up in the kernel sums and shift whole uniform areas of the image: for a detector trained on blood cells this changed
    23 of 100 scores by more than 0.02, against 5 of 100 with error diffusion.
    """
    kernels = weight.flatten(2)
    out = torch.empty_like(kernels, dtype=dtype)
    error = torch.zeros_like(kernels[..., 0])
    for place in range(kernels.shape[2]):
        wanted = kernels[..., place] + error
        out[..., place] = wanted
        error = wanted - out[..., place]
    return out.view(weight.shape).to(memory_format=torch.channels_last)
