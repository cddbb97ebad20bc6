"""Models by name: stock networks of torchvision, timm, this package or the user, and fused twins.

A name is one of

- a builder of torchvision (``resnet50``, ``fcn_resnet50``) or of this package (``plain18``,
  ``cifar_resnet20``),
- ``timm:NAME``,
- ``module:callable``, imported from the current folder or the environment, called without
  arguments.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import importlib
import inspect
import operator
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fused_resnet import checkpoints, functional
from fused_resnet.console import UserError
from fused_resnet.fuse import fuse
from fused_resnet.images import Transform, standard_transform
from fused_resnet.resnet import BUILDERS, cifar_resnet

_CIFAR = re.compile(r"cifar_resnet(\d+)")
#: Depths that the paper reports; others of the form 6 n + 2 are understood too.
_CIFAR_NAMES = tuple(f"cifar_resnet{n}" for n in (20, 32, 44, 56, 110, 1202))
_INPUT_SIZES = {"inception_v3": 299}


@dataclass(frozen=True)
class Network:
    """A stock network, ready to run.

    Attributes:
        name: what the user called it.
        model: the stock modules, in eval mode, fp32, on the CPU.
        weights: what its weights are, in words.
        random: whether they are random.
        size: of the images it is meant for.
        transform: from an image of PIL to [3, size, size].
        categories: names of its classes, in order; empty where they are not known.
    """

    name: str
    model: nn.Module
    weights: str
    random: bool
    size: int
    transform: Transform
    categories: tuple[str, ...] = ()


def names() -> list[str]:
    """Every name that needs no prefix."""
    return sorted({*BUILDERS, *_CIFAR_NAMES, *_torchvision_names()})


def load(
    name: str, *, weights: str | None = None, size: int | None = None, seed: int = 0
) -> Network:
    """Build a stock network.

    Args:
        name: see the module.
        weights: an entry of the model's own zoo (``DEFAULT``, ``IMAGENET1K_V2``), which torchvision
            or timm download, or the path of a checkpoint; None for random weights.
        size: of the images; None for what the network is made for.
        seed: of random weights. The global generator is left as it was.

    Raises:
        UserError: unknown model or weights, a missing package, a checkpoint that does not fit, or a
            download that fails; the message says what to do.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith("timm:"):
            network = _load_timm(name, weights, size)
        elif ":" in name:
            network = _load_callable(name, weights, size)
        else:
            network = _load_named(name, weights, size)
    network.model.eval()
    return network


def fused(name: str, stock: nn.Module) -> nn.Module:
    """The fused twin of a stock network; it shares the parameters, so dtype, device and layout too.

    Args:
        name: what ``stock`` was loaded by. The package's own builder is used where it has one,
            `fuse` for everything else.
        stock: as `load` made it, perhaps converted since.

    Raises:
        UserError: it cannot be fused; the message says why.
    """
    builder = _own_builder(name)
    if builder is None:
        try:
            return fuse(stock)
        except (TypeError, ValueError) as e:
            raise UserError(f"{name} cannot be fused: {e}") from None
    state = stock.state_dict(keep_vars=True)
    classes = state["fc.weight"].shape[0]
    with torch.device("meta"):
        model = builder(num_classes=classes)
    model.load_state_dict(state, assign=True)
    return model.eval()


def settle(network: Network, batch: Tensor) -> None:
    """Make a network ready for use: random weights are calibrated, and it is run once.

    Args:
        network: as `load` made it.
        batch: photos [N, 3, size, size] prepared for it.

    Raises:
        UserError: it cannot run on such a batch.
    """
    try:
        if network.random:
            calibrate(network.model, batch)
        with torch.no_grad():
            network.model(batch[:1])
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as e:
        reason = " ".join(str(e).split())
        raise UserError(
            f"{network.name} does not run on photos {list(batch.shape)}: {reason[:300]}"
        ) from None


def calibrate(model: nn.Module, batch: Tensor) -> None:
    """Set every batch norm's statistics to those that ``batch`` gives.

    With random weights and the statistics of initialisation, activations grow without bound from
    block to block; with these they are of the size that trained networks have.

    Args:
        model: changed in place; its mode (train or eval) is kept.
        batch: [N, 3, H, W], more than one image.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [(m, m.momentum, m.training) for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # A plain average, here over one batch.
        m.train()
    try:
        with torch.no_grad():
            model(batch)
    finally:
        for m, momentum, training in kept:
            m.momentum = momentum
            m.train(training)


def unfused(model: nn.Module) -> fx.GraphModule:
    """The stock modules of one of our networks, called one after another as torchvision would.

    For networks that torchvision does not have. Parameters are shared, and keys are the same.

    Args:
        model: made of this package's modules.
    """
    graph = fx.Tracer().trace(model)
    for node in list(graph.nodes):
        if node.target not in (functional.conv_bn_act, functional.conv_bn_act_maxpool):
            continue
        call = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        call.apply_defaults()
        a = call.arguments
        with graph.inserting_before(node):
            y = _call_modules(graph, a["x"], a["conv"], a["bn"])
            if a.get("residual") is not None:
                if a["act_before_add"]:
                    y = _call_modules(graph, y, a["act"])
                y = graph.call_function(operator.iadd, (y, a["residual"]))
            y = _call_modules(graph, y, a["act"], a.get("pool"))
        node.replace_all_uses_with(y)
        graph.erase_node(node)
    module = fx.GraphModule(model, graph)
    module.graph.eliminate_dead_code()  # The references to modules that are now called.
    module.recompile()
    return module.train(model.training)


def _call_modules(graph: fx.Graph, x: fx.Node, *modules: fx.Node | None) -> fx.Node:
    for module in modules:
        if module is not None:
            x = graph.call_module(cast(str, module.target), (x,))
    return x


# --------------------------------------------------------------------------------------------------
# Where networks come from.
# --------------------------------------------------------------------------------------------------


def _load_named(name: str, weights: str | None, size: int | None) -> Network:
    own = _own_builder(name)
    zoo = _torchvision_names()
    if own is None and name not in zoo:
        raise UserError(_unknown(name, zoo))
    size = size or (32 if _CIFAR.fullmatch(name) else _INPUT_SIZES.get(name, 224))
    transform = standard_transform(size)
    state = None
    words = "random weights"
    categories: tuple[str, ...] = ()
    if weights is not None and not checkpoints.is_path(weights):
        with _explained(name, weights):
            entry = checkpoints.torchvision_entry(name, weights)
            state, words = entry.get_state_dict(progress=True, check_hash=True), str(entry)
        categories = tuple(entry.meta.get("categories", ()))
        if size == _INPUT_SIZES.get(name, 224):
            transform = entry.transforms()

    def build(**kwargs: Any) -> nn.Module:
        if name in zoo:
            return _torchvision_model(name, **kwargs)
        assert own is not None
        return unfused(own(**kwargs))

    if state is not None:
        model = build()
        model.load_state_dict(state)
    elif weights is not None:
        model, words = _load_file(build, name, weights), weights
    else:
        model = build()
    return Network(name, model, words, weights is None, size, transform, categories)


def _torchvision_model(name: str, **kwargs: Any) -> nn.Module:
    from torchvision.models import get_model, get_model_builder

    options: dict[str, Any] = {"weights": None, **kwargs}
    if "weights_backbone" in inspect.signature(get_model_builder(name)).parameters:
        options["weights_backbone"] = None  # It would be downloaded otherwise.
    return cast(nn.Module, get_model(name, **options))


def _load_timm(name: str, weights: str | None, size: int | None) -> Network:
    try:
        timm = importlib.import_module("timm")
        data = importlib.import_module("timm.data")
    except ImportError:
        raise UserError(f"{name} comes from timm: pip install timm") from None
    short = name.removeprefix("timm:")
    known = timm.list_models()
    if short.partition(".")[0] not in known:
        raise UserError(_unknown(short, known, "timm:"))
    pretrained = weights is not None and not checkpoints.is_path(weights)
    if pretrained and weights != "DEFAULT":
        short = f"{short}.{weights}"
    with _explained(name, weights):
        model = timm.create_model(short, pretrained=pretrained)
    if weights is not None and not pretrained:
        model = _load_file(functools.partial(timm.create_model, short), name, weights)
    config = data.resolve_model_data_config(model)
    if size is None:
        transform: Transform = data.create_transform(**config, is_training=False)
        size = config["input_size"][-1]
    else:
        transform = standard_transform(size)
    words = f"timm's {short}" if pretrained else weights or "random weights"
    categories: tuple[str, ...] = ()
    subset = data.infer_imagenet_subset(model) if pretrained else None
    if subset is not None:
        categories = tuple(data.ImageNetInfo(subset).label_descriptions())
    return Network(name, model, words, weights is None, cast(int, size), transform, categories)


def _load_callable(name: str, weights: str | None, size: int | None) -> Network:
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = operator.attrgetter(attribute)(importlib.import_module(module_name))
    except ModuleNotFoundError as e:
        raise UserError(
            f"cannot import {e.name} for {name}; module:callable is looked for in the current "
            "folder and among the installed packages"
        ) from None
    except AttributeError:
        raise UserError(f"{module_name} has no {attribute}, which {name} asks for") from None
    try:
        model = factory()
    except TypeError as e:
        raise UserError(f"{name} must be callable without arguments: {e}") from None
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} must return an nn.Module, it returned {type(model).__name__}")
    words = "weights as the callable made them"
    if weights is not None:
        loaded = model
        model, words = _load_file(lambda: loaded, name, weights), weights
    size = size or 224
    return Network(name, model, words, False, size, standard_transform(size))


def _load_file(build: Callable[..., nn.Module], name: str, path: str) -> nn.Module:
    """A model with the weights of a file, and with as many classes as they are for."""
    with _explained(name, path):
        state = checkpoints.load_file(path)
        model = build()
        classes = _other_classes(model, state)
        if classes is not None:
            # A builder that does not take the number keeps its own, which then does not fit.
            with contextlib.suppress(TypeError):
                model = build(num_classes=classes)
        model.load_state_dict(state)
    return model


def _other_classes(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """The number of classes in ``state`` if it differs from the model's in nothing else."""
    changes = {
        (mine.shape[0], state[key].shape[0])
        for key, mine in model.state_dict().items()
        if key in state and mine.shape != state[key].shape and mine.dim() and state[key].dim()
    }
    return changes.pop()[1] if len(changes) == 1 else None


@contextmanager
def _explained(name: str, weights: str | None) -> Iterator[None]:
    """Turn what goes wrong with weights into one line for the user."""
    try:
        yield
    except UserError:
        raise
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as e:
        raise UserError(str(e)) from None
    except OSError as e:  # urllib's URLError among them
        raise UserError(
            f"cannot download weights {weights} of {name} ({e}); give the path of a checkpoint, or "
            "leave --weights out for random ones"
        ) from None
    except RuntimeError as e:
        reason = " ".join(str(e).split())
        raise UserError(f"weights {weights} do not fit {name}: {reason[:300]}") from None


def _own_builder(name: str) -> Callable[..., nn.Module] | None:
    match = _CIFAR.fullmatch(name)
    if match is None:
        return BUILDERS.get(name)
    depth = int(match[1])

    def build(**kwargs: Any) -> nn.Module:
        try:
            return cifar_resnet(depth, **kwargs)
        except ValueError as e:
            raise UserError(f"{name}: {e}") from None

    return build


def _torchvision_names() -> list[str]:
    try:
        from torchvision.models import list_models
    except ImportError:
        return []
    return [n for n in list_models() if not n.startswith("quantized_")]


def _unknown(name: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, [*known, *BUILDERS, *_CIFAR_NAMES], 4, 0.5)
    hint = f"did you mean {' or '.join(prefix + c for c in close)}?" if close else ""
    if not known:
        hint += ' torchvision\'s models need: pip install "fused-resnet[bench]".'
    others = "" if prefix else " (module:callable and timm:NAME work too)"
    return f"unknown model {prefix}{name}: {hint or 'see torchvision.models'}{others}"


def converted(
    network: Network, dtype: torch.dtype, device: torch.device, channels_last: bool
) -> nn.Module:
    """A copy of the stock network in this dtype and memory layout, on this device."""
    model = copy.deepcopy(network.model).to(device, dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(memory_format=layout)
