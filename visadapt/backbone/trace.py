"""Shapes of a backbone's tensors, traced on fake tensors: no compute, no memory."""

from __future__ import annotations

import logging
import numbers
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map_only

from visadapt.arguments import readable
from visadapt.backbone.axes import channel_axis
from visadapt.backbone.caches import NotedFakes, drop_caches, forget_fakes
from visadapt.backbone.compact import Compact
from visadapt.backbone.dataflow import Call, Flow, Value, record
from visadapt.backbone.modules import own_modules, parameter_count, plain_copy, unwrapped
from visadapt.backbone.norms import is_norm, norm_axis
from visadapt.backbone.operators import CONVS, is_operator, operator_of
from visadapt.backbone.site import Site, layout_named
from visadapt.errors import VisadaptError, first_line
from visadapt.printable import shown


def guess_inputs(model: nn.Module) -> list[Any]:
    """Inputs that the model can probably take, the likeliest first: two images, clips, series, vectors, a few tokens.

    Returns:
        Tensors or dicts of keyword arguments, on the model's device, in its dtype.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    config = getattr(model, "config", None)
    name = str(getattr(model, "main_input_name", ""))
    if name == "input_ids":
        return [_tokens(config, rows, device) | _pixels(config, rows, dtype, device) for rows in (2, 1)]
    spectra = [{name: torch.zeros(2, *size, dtype=dtype, device=device)} for size in _spectra(config)]
    if spectra:
        decoder = _tokens(config, 2, device).get("decoder_input_ids")
        return [given if decoder is None else given | {"decoder_input_ids": decoder} for given in spectra]
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    side = getattr(config, "image_size", getattr(model, "image_size", None))
    first = next((m for m in model.modules() if isinstance(m, _FIRST)), None)
    planes = getattr(config, "num_channels", first.in_channels if isinstance(first, _ConvNd) else 3)
    sizes: list[tuple[int, ...]]
    if size is not None:
        # timm's config describes the published weights; the model may have been built for another size
        built = getattr(getattr(model, "patch_embed", None), "img_size", None)
        sides = built or tuple(size)[1:]
        # the first convolution does not see the image itself where space is folded into channels before it
        sizes = list(dict.fromkeys([(planes, *sides), (size[0], *sides)]))
    elif side is not None:
        sizes = [(planes, side, side) if isinstance(side, int) else (planes, *side)]
        frames = getattr(config, "num_frames", None)
        sizes = [(frames, *sizes[0]), *sizes] if isinstance(frames, int) else sizes
    elif isinstance(first, nn.Embedding):
        return [_rows_of_tokens(device)]
    elif isinstance(first, nn.Conv1d):
        # a series of one channel may be passed without that axis
        sizes = [(planes, n) for n in (1024, 16000)] + [(n,) for n in (1024, 16000) if planes == 1]
    elif isinstance(first, nn.Conv3d):
        sizes = [(planes, *clip) for clip in ((8, 112, 112), (16, 224, 224), (32, 32, 32), (64, 64, 64))]
    elif isinstance(first, nn.Linear):
        sizes = [(first.in_features,), (8, first.in_features)]
    else:
        sizes = [(planes, n, n) for n in (224, 64, 32, 28, 299, 512)]
    guesses = [torch.zeros(2, *size, dtype=dtype, device=device) for size in sizes]
    if isinstance(first, nn.Embedding):
        # Perceiver's config has the size of images, whatever its preprocessor takes
        guesses.append(_rows_of_tokens(device))
    return guesses


def _rows_of_tokens(device: torch.device) -> Tensor:
    return torch.ones(2, 8, dtype=torch.long, device=device)


def _pixels(config: Any, rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The images of a model that holds a text and an image encoder; none for another."""
    vision = getattr(config, "vision_config", None)
    side = getattr(vision, "image_size", None)
    if not isinstance(side, int):
        return {}
    return {
        "pixel_values": torch.zeros(rows, getattr(vision, "num_channels", 3), side, side, dtype=dtype, device=device)
    }


def _spectra(config: Any) -> list[tuple[int, int]]:
    """Sizes of the spectrogram that an audio model's config tells of: bands × time as in Whisper, or time × bands."""
    bands = getattr(config, "num_mel_bins", getattr(config, "input_feat_per_channel", None))
    if not isinstance(bands, int):
        return []
    steps, most = getattr(config, "max_source_positions", None), getattr(config, "max_length", None)
    whole = [(bands, 2 * steps)] if isinstance(steps, int) else []
    return [*whole, (most if isinstance(most, int) and most > bands else 64, bands)]


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
    """The likeliest of `guess_inputs`."""
    return guess_inputs(model)[0]


_FIRST = (*CONVS, nn.Linear, nn.Embedding)


_NO_INPUT = (str, bytes, numbers.Number, type(None), type, nn.Module)


def check_input(example: Any, what: str) -> None:
    """Refuse what cannot be the input of a model.

    Raises:
        VisadaptError: it is neither a tensor, nor a tuple of a model's arguments, nor a mapping of its keywords.
    """
    hint = Mapping[str, Any] if isinstance(example, Mapping) else Any
    if isinstance(example, _NO_INPUT) or not readable(example, hint):
        raise VisadaptError(
            f"{what} must be a tensor, a tuple of the model's arguments or a dict of its keywords, got "
            f"{shown(example, 80)}"
        )


@contextmanager
def input_errors(what: str) -> Iterator[None]:
    """Raise what a model raises in this block, on an input that it cannot take, as a `VisadaptError` that names it."""
    try:
        yield
    except (VisadaptError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise VisadaptError(
            f"the model does not run on {what} ({type(error).__name__}: {first_line(error):.300})"
        ) from error


def call(model: nn.Module, example: Any) -> Any:
    """Call a model with an example as `visadapt.sites` takes it: a tensor, a tuple, or a dict of keywords."""
    check_input(example, "inputs")
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
                    memo[id(tensor)] = _fake(tensor, fake)
    for module in modules:
        for held in tree_leaves(
            [v for k, v in module.__dict__.items() if k not in ("_parameters", "_buffers", "_modules")]
        ):
            if isinstance(held, Tensor) and not held.is_leaf:
                # torch does not copy a tensor that is part of an autograd graph
                memo[id(held)] = held.detach()
    copied = plain_copy(model, memo).eval()
    drop_caches(copied)
    return copied


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    if not isinstance(tensor, Compact):
        return mode.from_tensor(tensor)
    with mode:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(made, requires_grad=False)


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
            fake = NotedFakes() if faked else None
            copied = inputs = None
            try:
                # copied outside of the mode, which fails on a tensor that an earlier forward stored in a module
                copied = shadow(backbone, fake)
                with torch.no_grad(), torch.random.fork_rng(devices=[]), quiet(), fake or nullcontext():
                    inputs = tree_map_only(Tensor, fake.from_tensor if fake else torch.clone, given)
                    return watch(copied, inputs), given
            except Exception as error:
                if fake is None:
                    # that of a run on fake tensors is not told, and would hold them
                    failure = failure or error
            finally:
                # with what a forward leaves in the copy
                copied = inputs = None
                if fake is not None and fake.are_held():
                    forget_fakes()
    _check_same_memory(backbone, example)
    what = "a guessed input" if example is None else "the given example"
    raise VisadaptError(
        f"{type(backbone).__name__} does not run on {what} ({first_line(failure):.300}); pass example= with an input "
        "it takes"
    ) from failure


def _check_same_memory(backbone: nn.Module, example: Any) -> None:
    """Refuse an example with values for a model without any, or the other way round."""
    model = {tensor.is_meta for tensor in (*backbone.parameters(), *backbone.buffers())}
    given = {leaf.is_meta for leaf in tree_leaves(example) if isinstance(leaf, Tensor)}
    if given and model and given.isdisjoint(model):
        states = ["has values", "is on the meta device"][:: -1 if True in given else 1]
        raise VisadaptError(
            f"the example {states[0]}, and {type(backbone).__name__} {states[1]}: pass an example that is on the same "
            "device; of one on the meta device, example.to('meta'), the shapes and dtypes are used"
        )


_QUIET = threading.Lock()
_quiet: tuple[int, ExitStack] = (0, ExitStack())
"""Number of open `quiet` blocks in all threads, and what restores the settings from before the first."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and torch's log while a model runs on a guessed input.

    Both settings are of the whole process. The first block sets them and the last one puts them back: if each block put
    back what it had found, two that overlap in two threads would leave warnings off for good.
    """
    global _quiet
    with _QUIET:
        blocks, restore = _quiet
        if not blocks:
            restore = ExitStack()
            restore.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            logger = logging.getLogger("torch._subclasses.fake_tensor")
            restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        _quiet = blocks + 1, restore
    try:
        yield
    finally:
        with _QUIET:
            blocks, restore = _quiet
            _quiet = blocks - 1, restore
            if blocks == 1:
                restore.close()


def trace_flow(model: nn.Module, example: Any = None, training: bool = False) -> tuple[Flow, Any]:
    """The dataflow of one forward, and the input that it ran on.

    Args:
        model: the backbone.
        example: an input; guessed if None.
        training: whether it runs in train mode.

    Raises:
        VisadaptError: the model cannot run on the example.
    """

    def watch(copied: nn.Module, given: Any) -> Flow:
        return record(copied.train(training), own_modules(copied), call, given).forget()

    return rehearse(model, example, watch)


_LAST = ("NLC", "NHWC", "NDHWC")
"""Layouts whose channels are the last axis."""


def module_site(name: str, module: nn.Module, depth: int, calls: Sequence[Call]) -> Site:
    """The site at the output of one module.

    Args:
        name: its path.
        module: the module.
        depth: its place among the sites.
        calls: its calls in one forward.

    Raises:
        VisadaptError: it is never called, or the channel axis of its output is not established or is neither axis 1
            nor the last.
    """
    if not calls:
        raise VisadaptError(f"{name} is never called as a module when the model runs, so no adapter can stand there")
    shapes = [call.shape for call in calls if call.shape is not None]
    if len(shapes) < len(calls):
        raise VisadaptError(f"{name} does not give a tensor: it has no channels to adapt")
    found = {(output_layout(module, call), channels_of(module, call)) for call in calls}
    if len(found) > 1 and all(layout in _LAST for layout, _ in found):
        # however many axes come before the channels
        found = {("NLC", channels) for _, channels in found}
    layout, channels = next(iter(found))
    if len(found) > 1 or layout is None:
        raise VisadaptError(unknown_axis(name, shapes[0], calls[0].output, several=len(found) > 1))
    size = parameter_count(module)
    return Site(name, "module", channels, layout, depth, block=name, adapts=size, traced=True)


def output_layout(module: nn.Module, call: Call) -> str | None:
    """The layout of a module's output in one call; None if it is not established.

    Of an output that was not computed from the input, such as a table of positions, only the module's weight tells:
    that of a layer, an embedding or a norm.
    """
    axis = _output_axis(module, call)
    return None if axis is None or call.shape is None else layout_named(axis, len(call.shape))


def channels_of(module: nn.Module, call: Call) -> int:
    """Number of channels of a module's output in one call; 0 if their axis is not established."""
    axis = _output_axis(module, call)
    return 0 if axis is None or call.shape is None else int(call.shape[axis])


def _output_axis(module: nn.Module, call: Call) -> int | None:
    found = None if call.output is None else channel_axis(call.output.axes)
    if found is not None or call.shape is None:
        return found
    if is_operator(module):
        operator = operator_of(module, call.path)
        axis, channels = 1 if operator.conv else len(call.shape) - 1, operator.outputs
    elif isinstance(module, nn.Embedding):
        axis, channels = len(call.shape) - 1, module.embedding_dim
    else:
        return norm_axis(module, call.shape) if is_norm(module) else None
    return axis if call.shape[axis] == channels else None


def unknown_axis(name: str, shape: Sequence[int], value: Value | None, several: bool = False) -> str:
    """Why no adapter can stand at a module: its channel axis is not known, or not supported."""
    axis = None if value is None else channel_axis(value.axes)
    if several:
        reason = "differs from call to call"
    elif axis is None:
        reason = f"is not known: no operator with a weight shows it in its output of shape {tuple(shape)}"
    else:
        reason = f"is axis {axis} of {tuple(shape)}, and adapters stand where it is axis 1 or the last"
    return f"the channel axis of {name} {reason}; choose other modules with where="
