"""Shapes of a backbone's tensors, traced on fake tensors: no compute, no memory."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from visadapt.backbone.dataflow import Flow, record
from visadapt.backbone.modules import own_modules, parameter_count, plain_copy, unwrapped
from visadapt.backbone.site import Site
from visadapt.errors import VisadaptError


def guess_inputs(model: nn.Module) -> list[Any]:
    """Inputs that the model can probably take, the likeliest first: two images, a few tokens, two vectors.

    Returns:
        Tensors or dicts of keyword arguments, on the model's device, in its dtype.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) == "input_ids":
        return [_tokens(config, rows, device) | _pixels(config, rows, dtype, device) for rows in (2, 1)]
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    side = getattr(config, "image_size", getattr(model, "image_size", None))
    first = next((m for m in model.modules() if isinstance(m, _FIRST)), None)
    planes = getattr(config, "num_channels", first.in_channels if isinstance(first, nn.Conv2d) else 3)
    if size is not None:
        # timm's config describes the published weights; the model may have been built for another size
        built = getattr(getattr(model, "patch_embed", None), "img_size", None)
        sides = built or tuple(size)[1:]
        # the first convolution does not see the image itself where space is folded into channels before it
        sizes = list(dict.fromkeys([(planes, *sides), (size[0], *sides)]))
    elif side is not None:
        sizes = [(planes, side, side) if isinstance(side, int) else (planes, *side)]
    elif isinstance(first, nn.Embedding):
        return [torch.ones(2, 8, dtype=torch.long, device=device)]
    elif isinstance(first, nn.Linear):
        sizes = [(first.in_features,), (8, first.in_features)]
    else:
        sizes = [(planes, n, n) for n in (224, 64, 32, 28, 299, 512)]
    return [torch.zeros(2, *size, dtype=dtype, device=device) for size in sizes]


def _pixels(config: Any, rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The images of a model that holds a text and an image encoder; none for another."""
    vision = getattr(config, "vision_config", None)
    side = getattr(vision, "image_size", None)
    if not isinstance(side, int):
        return {}
    return {
        "pixel_values": torch.zeros(rows, getattr(vision, "num_channels", 3), side, side, dtype=dtype, device=device)
    }


def _tokens(config: Any, rows: int, device: torch.device) -> dict[str, Tensor]:
    """Keyword arguments for a language model: a few tokens per row, which end where its config says that texts end.

    Some models find their answer at the end-of-text token (BART, T5), and some take a batch of one row only where no
    padding token is known (GPT-2).
    """
    special = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "decoder_start")]
    ordinary = next(token for token in range(1, 6) if token not in special)
    ids = torch.full((rows, 8), ordinary, dtype=torch.long, device=device)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < getattr(config, "vocab_size", 0):
        ids[:, -1] = end
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        tokens["decoder_input_ids"] = ids.clone()
    return tokens


def guess_input(model: nn.Module) -> Any:
    """The likeliest of :func:`guess_inputs`."""
    return guess_inputs(model)[0]


_FIRST = (nn.Conv2d, nn.Linear, nn.Embedding)


def call(model: nn.Module, example: Any) -> Any:
    """Calls a model with an example as :func:`visadapt.sites` takes it: a tensor, a tuple, or a dict of keywords."""
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, tuple | list):
        return model(*example)
    return model(example)


def shadow(model: nn.Module, fake: FakeTensorMode | None) -> nn.Module:
    """A plain copy of a backbone, in eval mode, to run once and throw away.

    What a forward leaves behind in a module (a cached table of positions, say) is left in the copy.

    Args:
        model: the backbone.
        fake: the mode whose tensors stand for the weights, which take no memory; None to copy these too.
    """
    memo: dict[int, Any] = {}
    modules = own_modules(model).values()
    if fake is not None:
        for module in modules:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    memo[id(tensor)] = fake.from_tensor(tensor)
    for module in modules:
        for held in tree_leaves(
            [v for k, v in module.__dict__.items() if k not in ("_parameters", "_buffers", "_modules")]
        ):
            if isinstance(held, Tensor) and not held.is_leaf:
                # torch does not copy what is part of a graph
                memo[id(held)] = held.detach()
    return plain_copy(model, memo).eval()


def rehearse(model: nn.Module, example: Any, watch: Callable[[nn.Module, Any], Any]) -> tuple[Any, Any]:
    """Run a shadow of the model once: on fake tensors, or on real ones where it does not run on fake ones.

    A forward that reads values (``.item()``, ``.numpy()``, a loop over a length, an operator without a fake kernel)
    fails on fake tensors in many ways, so any failure is tried again on real ones.

    Args:
        model: the backbone.
        example: an input, of which shapes and dtypes are used; None to guess.
        watch: runs the shadow it is given on the input it is given and returns what it saw.

    Returns:
        What ``watch`` saw, and the input that the model ran on.

    Raises:
        VisadaptError: the model cannot run on the example, or on any input that was guessed.
    """
    backbone = unwrapped(model)
    candidates = guess_inputs(backbone) if example is None else [example]
    failure: Exception | None = None
    for faked in (True, False):
        failure = None
        for given in candidates:
            fake = FakeTensorMode(allow_non_fake_inputs=True) if faked else None
            try:
                # copied outside of the mode, which would balk at a table that an earlier forward left in a module
                copied = shadow(backbone, fake)
                with torch.no_grad(), torch.random.fork_rng(devices=[]), quiet(), fake or nullcontext():
                    inputs = tree_map_only(Tensor, fake.from_tensor if fake else torch.clone, given)
                    return watch(copied, inputs), given
            except Exception as error:
                failure = failure or error
    what = "a guessed input" if example is None else "the given example"
    raise VisadaptError(
        f"{type(backbone).__name__} does not run on {what} ({_told(failure)}); pass example= with an input it takes"
    ) from failure


def _told(error: Exception | None) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and torch's log while a model runs on a guessed input."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


def trace_outputs(model: nn.Module, names: Sequence[str], example: Any = None) -> dict[str, Any]:
    """What modules give out when the model runs on an example: fake tensors with true shapes.

    Args:
        model: the backbone.
        names: paths of modules.
        example: an input; guessed if None.

    Returns:
        Outputs by path, without the modules that were never called.

    Raises:
        VisadaptError: the model cannot run on the example.
    """

    def watch(copied: nn.Module, given: Any) -> dict[str, Any]:
        outputs: dict[str, Any] = {}

        def keep(name: str) -> Any:
            return lambda module, args, out: outputs.setdefault(name, out)

        for name in names:
            copied.get_submodule(name).register_forward_hook(keep(name))
        call(copied, given)
        return outputs

    outputs: dict[str, Any] = rehearse(model, example, watch)[0]
    return outputs


def trace_flow(model: nn.Module, example: Any = None) -> tuple[Flow, Any]:
    """The dataflow of one forward, and the input that it ran on.

    Raises:
        VisadaptError: the model cannot run on the example.
    """
    return rehearse(model, example, lambda copied, given: record(copied, own_modules(copied), call, given))


def trace_sites(model: nn.Module, names: Sequence[str], example: Any = None) -> list[Site]:
    """Sites of kind ``module`` at modules that the user names, with widths read off fake tensors.

    Raises:
        VisadaptError: the model does not run; a module is never called or its output is not a feature map or sequence.
    """
    outputs = trace_outputs(model, names, example)
    found = []
    for depth, name in enumerate(names):
        module = model.get_submodule(name)
        out: Any = outputs.get(name)
        if isinstance(out, tuple | list) and out:
            out = out[0]
        if out is None:
            raise VisadaptError(f"{name} is never called as a module when the model runs, so nothing can be put there")
        layout = layout_of(module, out)
        if layout is None:
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise VisadaptError(f"{name} gives {shape}: neither a feature map (4-D) nor a token sequence (2-D, 3-D)")
        channels = out.shape[1 if layout == "NCHW" else -1]
        found.append(
            Site(name, "module", int(channels), layout, depth, block=name, adapts=parameter_count(module), traced=True)
        )
    return found


def layout_of(module: nn.Module, out: Any) -> str | None:
    """Where the channels of a module's output are: last in sequences, and in maps if the module itself says so."""
    if not isinstance(out, Tensor) or out.ndim not in (2, 3, 4):
        return None
    if out.ndim < 4:
        return "NLC"
    last = (nn.LayerNorm, nn.Linear)
    inner = [m for m in module.modules() if isinstance(m, (*last, nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm))]
    channels_last = bool(inner) and isinstance(inner[-1], last) and out.shape[-1] == _width(inner[-1])
    return "NHWC" if channels_last and out.shape[1] != _width(inner[-1]) else "NCHW"


def _width(module: nn.Module) -> int:
    shape = getattr(module, "normalized_shape", None)
    return int(shape[-1]) if shape else int(getattr(module, "out_features", 0))
