"""Models that people have, and what is found out about each: the families of ``docs/models.md``.

The tests ``test_models_*.py`` and the generator of the table (``benchmarks/models_table.py``) judge
the same families by the same function, `judge`.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision.ops import FrozenBatchNorm2d

import fused_resnet
from benchmarks import models_table
from fused_resnet.explain import Explanation
from fused_resnet.problem import channels_last_format
from tests.helpers import randomise
from tests.unet import PlainUNet


@dataclass(frozen=True)
class Family:
    """A model and what `fused_resnet.fuse` must make of it.

    Attributes:
        name: library and model.
        make: builds it with random weights.
        counts: how many convolutions, norms, activations, sums and max-poolings are fused, of how
            many: ``20/20 20/20 17/17 8/8 1/1``.
        quick: whether it is part of ``make test``; the others are of ``make test-slow``.
        shape: of the input, batch first.
        part: path of the submodule that takes such an input, where the model takes a list of
            images.
    """

    name: str
    make: Callable[[], nn.Module]
    counts: str
    quick: bool = False
    shape: tuple[int, ...] = (2, 3, 64, 64)
    part: str = ""

    @property
    def library(self) -> str:
        """Where the model comes from."""
        return self.name.split()[0]

    def model(self) -> nn.Module:
        """In eval mode, with the norms of a model that was trained."""
        torch.manual_seed(0)
        return randomise(self.make()).eval()

    def input(self) -> Tensor:
        """Of `part`, the same at every call."""
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1))


# --------------------------------------------------------------------------------------------------
# What is found out about a family.
# --------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What became of a model.

    Attributes:
        name: of the family.
        counts: fused and all convolutions, norms, activations, sums and max-poolings.
        pairs: fused and all convolutions whose result only a norm takes, found by hooks on the
            stock model and not by the code that fuses.
        left: what stays stock and why, shortened, with how often.
        errors: (fused, stock) distance from float64 of each output.
        problems: what is wrong; nothing should be.
    """

    name: str
    counts: str
    pairs: tuple[int, int]
    left: dict[str, int]
    errors: list[tuple[float, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def error_ratio(self) -> float:
        """The fused model's error over stock's, of the worst output."""
        return max(fused / stock for fused, stock in self.errors if stock > 0)


def judge(family: Family, *, train: bool = True) -> Record:
    """Fuse a family's model and compare it with stock torch and with float64.

    Args:
        family: which.
        train: also compare a training step, which takes about half of the time.
    """
    model = family.model()
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fused_resnet.FusedResNetWarning)
        fused = fused_resnet.fuse(model)
    explanation = fused_resnet.explain(fused)
    part, fused_part = (m.get_submodule(family.part) for m in (model, fused))
    pairs = conv_norm_pairs(part, family.input())
    fused_pairs = _fused_pairs(explanation, family.part)
    record = Record(
        family.name,
        " ".join(f"{a}/{b}" for a, b in explanation.counts().values()),
        (len(pairs & fused_pairs), len(pairs)),
        left(explanation),
    )

    def claim(right: bool, what: str) -> None:
        if not right:
            record.problems.append(what)

    same_keys = [(k, id(v)) for k, v in fused.state_dict(keep_vars=True).items()] == [
        (k, id(v)) for k, v in model.state_dict(keep_vars=True).items()
    ]
    claim(same_keys, "another state_dict")
    for row in explanation.rows:
        claim(row.outcome != "stock" or bool(row.reason), f"no reason given for {row.path}")
    report = fused_resnet.check(fused_part, part, family.input())
    claim(report.passed, str(report))
    record.errors = [(o.fused.l2, o.stock.l2) for o in report.outputs if o.fused and o.stock]
    if family.part:
        _compare_whole(fused, model, claim)
    if train:
        _compare_training(fused_part, part, family.input(), claim)
    claim(state(model) == before, "the input model was changed")
    return record


def state(model: nn.Module) -> list[tuple[Any, ...]]:
    """What fuse must not change: names, classes, modes, hooks, tensors and their versions."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [
        *[
            (n, type(m), m.training, sorted(vars(m)), len(m._forward_hooks))
            for n, m in model.named_modules()
        ],
        *[(n, id(t), t._version, t.requires_grad) for n, t in tensors],
    ]


def conv_norm_pairs(model: nn.Module, x: Tensor) -> set[tuple[str, str]]:
    """(convolution, norm) whose modules hand a tensor over when the stock model runs."""
    made: dict[int, tuple[str, Tensor]] = {}
    pairs: set[tuple[str, str]] = set()

    def keep(path: str) -> Callable[..., None]:
        # The tensor is kept too, lest another one gets its id.
        return lambda m, args, out: made.update({id(out): (path, out)})

    def take(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if id(args[0]) in made:
                pairs.add((made[id(args[0])][0], path))

        return hook

    handles = []
    for path, m in model.named_modules():
        if isinstance(m, nn.Conv2d | nn.Conv3d):
            handles.append(m.register_forward_hook(keep(path)))
        elif isinstance(m, nn.modules.batchnorm._BatchNorm | FrozenBatchNorm2d):
            handles.append(m.register_forward_pre_hook(take(path)))
    with torch.no_grad():
        model(x.clone())
    for handle in handles:
        handle.remove()
    return pairs


def _fused_pairs(explanation: Explanation, part: str) -> set[tuple[str, str]]:
    """(convolution, norm) that stand in one op, by their paths within ``part``."""
    prefix = f"{part}." if part else ""
    rows = {row.path: row for row in explanation.rows if row.outcome == "fused"}
    return {
        (row.parts[0].removeprefix(prefix), path.removeprefix(prefix))
        for path, row in rows.items()
        if row.kind == "norm"
    }


def left(explanation: Explanation) -> dict[str, int]:
    """What stays stock: type and reason without names of modules, with how often."""
    found = Counter(
        f"{row.type}: {_brief(row.reason or '')}"
        for row in explanation.rows
        if row.outcome == "stock"
    )
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _brief(reason: str) -> str:
    if "cannot be traced" in reason:
        return "called in a forward that cannot be traced"
    reason = re.sub(r" \(.*", "", reason.removeprefix("alone: "))
    reason = re.sub(r"used \d+ times", "used several times", reason)
    return re.sub(r"\b([A-Z]\w+) [\w.-]+(?=$| is used)", r"\1", reason)


def _compare_whole(fused: nn.Module, model: nn.Module, claim: Callable[[bool, str], None]) -> None:
    """A model that takes a list of images, in float64, where no rounding changes what is found."""
    images = [torch.rand(3, 64, 80, dtype=torch.float64)]
    ours, theirs = (copy.deepcopy(m).double() for m in (fused, model))
    with torch.no_grad():
        actual, wanted = ours(images), theirs(images)
    claim(all(len(t) > 0 for t in tensors(wanted)), "nothing was detected, so nothing is compared")
    claim(_close(actual, wanted, 1e-8), "detections differ in float64")


def _compare_training(
    fused: nn.Module, model: nn.Module, x: Tensor, claim: Callable[[bool, str], None]
) -> None:
    """Results, gradients and running statistics of one step in float64."""
    if x.dim() in (4, 5):
        # The layout of fused ops, which convolutions without a norm become in train mode, too: in
        # another one dropout would draw its mask in another order, as it does in stock torch.
        x = x.contiguous(memory_format=channels_last_format(x))
    results = []
    for m in (model, fused):
        mine = copy.deepcopy(m).double().train()
        torch.manual_seed(2)
        out = tensors(mine(x.double()))
        torch.stack([o.square().mean() for o in out]).sum().backward()
        results.append((out, [p.grad for p in mine.parameters()], list(mine.buffers())))
    for what, wanted, actual in zip(
        ("results", "gradients", "running statistics"), *results, strict=True
    ):
        claim(_close(actual, wanted, 1e-7), f"{what} differ in train mode")


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a nest of containers."""
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _close(actual: Any, wanted: Any, tolerance: float) -> bool:
    """Whether tensors are the same but for float64 roundings, relative to their largest value."""
    pairs = list(zip(tensors(actual), tensors(wanted), strict=True))
    return all(
        a.shape == w.shape
        and a.dtype == w.dtype
        and (a.numel() == 0 or bool((a - w).abs().max() <= tolerance * w.abs().max()))
        for a, w in pairs
    )


# --------------------------------------------------------------------------------------------------
# torchvision.
# --------------------------------------------------------------------------------------------------


def _vision(name: str, counts: str, quick: bool = False, **options: Any) -> Family:
    family = {k: options.pop(k) for k in ("shape", "part") if k in options}
    options.setdefault("num_classes", 5)
    return Family(
        f"torchvision {name}",
        lambda: torchvision.models.get_model(name, weights=None, **options),
        counts,
        quick,
        **family,
    )


def _vgg(name: str, counts: str, quick: bool = False) -> Family:
    def make() -> nn.Module:
        model = torchvision.models.get_model(name, weights=None)
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 5)
        return model

    return Family(f"torchvision {name}", make, counts, quick)


def freeze(model: nn.Module) -> nn.Module:
    """Every BatchNorm2d as the FrozenBatchNorm2d that pretrained detectors have in its place."""
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            frozen.load_state_dict(child.state_dict())
            setattr(model, name, frozen)
        else:
            freeze(child)
    return model


def _detection(name: str, counts: str, quick: bool = False, **options: Any) -> Family:
    def make() -> nn.Module:
        builder = getattr(torchvision.models.detection, name)
        sizes = {"min_size": 64, "max_size": 96}
        return freeze(builder(weights=None, weights_backbone=None, **sizes, **options))

    return Family(f"torchvision {name}", make, counts, quick, part="backbone")


TORCHVISION = [
    _vision("resnet18", "20/20 20/20 17/17 8/8 1/1", True),
    _vision("resnet34", "36/36 36/36 33/33 16/16 1/1"),
    _vision("resnet50", "53/53 53/53 49/49 16/16 1/1"),
    _vision("resnet101", "104/104 104/104 100/100 33/33 1/1"),
    _vision("resnet152", "155/155 155/155 151/151 50/50 1/1"),
    _vision("wide_resnet50_2", "53/53 53/53 49/49 16/16 1/1"),
    _vision("resnext50_32x4d", "53/53 53/53 49/49 16/16 1/1"),
    _vgg("vgg11_bn", "8/8 8/8 8/8 0/0 5/5", True),
    _vgg("vgg16_bn", "13/13 13/13 13/13 0/0 5/5"),
    _vision("densenet121", "59/120 59/121 59/121 0/0 1/1", True),
    _vision("googlenet", "59/59 59/59 59/61 0/0 0/13", init_weights=False),
    _vision(
        "inception_v3",
        "94/94 94/94 94/94 0/0 2/4",
        init_weights=False,
        aux_logits=False,
        shape=(2, 3, 96, 96),
    ),
    _vision("mobilenet_v2", "52/52 52/52 0/35 10/10 0/0", True),
    _vision("mobilenet_v3_small", "43/52 34/34 14/33 6/6 0/0", True),
    _vision("mobilenet_v3_large", "54/62 46/46 19/40 10/10 0/0"),
    _vision("regnet_y_400mf", "69/85 53/53 65/81 16/16 0/0", True),
    _vision("regnet_x_400mf", "71/71 71/71 67/67 22/22 0/0"),
    _vision("shufflenet_v2_x0_5", "56/56 56/56 37/37 0/0 1/1", True),
    _vision("mnasnet0_5", "52/52 52/52 35/35 10/10 0/0"),
    _vision("squeezenet1_1", "26/26 0/0 26/26 0/0 0/3"),
    _vision("efficientnet_b0", "49/81 49/49 0/65 0/9 0/0"),
    _vision("convnext_tiny", "0/22 0/23 0/18 0/18 0/0"),
    _vision("fcn_resnet50", "54/55 54/54 50/50 16/16 1/1", weights_backbone=None),
    _vision("fcn_resnet101", "105/106 105/105 101/101 33/33 1/1", weights_backbone=None),
    _vision("deeplabv3_resnet50", "60/61 60/60 56/56 16/16 1/1", weights_backbone=None),
    _vision("deeplabv3_resnet101", "111/112 111/111 107/107 33/33 1/1", weights_backbone=None),
    _vision(
        "lraspp_mobilenet_v3_large", "56/67 47/47 20/41 11/11 0/0", True, weights_backbone=None
    ),
    _detection("fasterrcnn_resnet50_fpn", "54/64 53/53 50/52 16/19 1/3", True, num_classes=3),
    _detection("fasterrcnn_resnet50_fpn_v2", "67/69 65/65 55/56 16/19 1/3", num_classes=3),
    _detection("maskrcnn_resnet50_fpn", "58/70 53/53 54/57 16/19 1/3", num_classes=3),
    _detection(
        "retinanet_resnet50_fpn", "61/72 53/53 57/59 16/18 1/1", num_classes=3, score_thresh=0.0
    ),
    _detection(
        "keypointrcnn_resnet50_fpn", "62/73 53/53 58/60 16/19 1/3", num_classes=2, num_keypoints=3
    ),
    _vision("r3d_18", "20/20 20/20 17/17 8/8 0/0", True, shape=(2, 3, 4, 32, 32)),
    _vision("mc3_18", "20/20 20/20 17/17 8/8 0/0", shape=(1, 3, 4, 32, 32)),
    _vision("r2plus1d_18", "37/37 37/37 34/34 8/8 0/0", shape=(2, 3, 4, 32, 32)),
]

# --------------------------------------------------------------------------------------------------
# timm.
# --------------------------------------------------------------------------------------------------


def _timm(model: str, counts: str, quick: bool = False, **options: Any) -> Family:
    shape = {"shape": options.pop("shape")} if "shape" in options else {}
    name = options.pop("name", f"timm {model}")
    if not options.get("features_only"):
        options["num_classes"] = 5
    return Family(
        name,
        lambda: timm.create_model(model, **options),
        counts,
        quick,
        **shape,
    )


def _timm_vgg() -> nn.Module:
    # Without its 7x7 convolution to 4096 channels, which is most of its weights.
    model = timm.create_model("vgg19_bn")
    model.pre_logits = nn.Identity()
    model.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 5))
    return model


TIMM = [
    _timm("resnet18", "20/20 20/20 17/17 8/8 1/1"),
    _timm("resnet50", "53/53 53/53 49/49 16/16 1/1"),
    _timm("resnet26d", "31/31 31/31 27/27 8/8 1/1", True),
    _timm("resnet50d", "55/55 55/55 51/51 16/16 1/1"),
    _timm("resnetrs50", "72/88 56/56 68/68 16/16 0/0"),
    _timm("resnetblur50", "53/57 53/53 49/49 16/16 1/1"),
    _timm("seresnet50", "69/85 53/53 65/65 16/16 1/1"),
    _timm("ecaresnet26t", "31/39 31/31 27/27 8/8 1/1"),
    _timm("ecaresnet50d", "55/71 55/55 51/51 16/16 1/1"),
    _timm("skresnet18", "36/44 36/36 33/33 8/8 1/1", True),
    _timm("res2net50_26w_4s", "85/85 85/85 81/81 16/40 1/1"),
    _timm("resnest14d", "23/27 23/23 19/19 4/4 1/1"),
    _timm("resnext50_32x4d", "53/53 53/53 49/49 16/16 1/1"),
    _timm("resnetv2_50", "48/54 32/49 32/49 16/16 0/1"),
    _timm("inception_v4", "149/149 149/149 149/149 0/0 0/4", shape=(2, 3, 96, 96)),
    _timm("inception_resnet_v2", "204/244 204/204 243/243 39/40 2/4", shape=(2, 3, 96, 96)),
    Family("timm vgg19_bn", _timm_vgg, "16/16 16/16 16/16 0/0 5/5"),
    _timm("densenet121", "59/120 59/121 59/121 0/0 1/1"),
    _timm("cspresnet50", "55/55 55/55 0/51 13/13 0/1"),
    _timm("regnety_002", "57/70 44/44 53/53 13/13 0/0", True),
    _timm("regnetx_002", "44/44 44/44 40/40 13/13 0/0"),
    _timm("efficientnet_b0", "49/81 49/49 0/65 9/9 0/0", True),
    _timm("mobilenetv3_small_050", "43/53 34/34 14/33 7/7 0/0"),
    _timm("repvgg_a0", "44/44 44/61 22/22 39/39 0/0"),
    _timm("ese_vovnet19b_dw", "23/41 23/23 23/23 0/0 0/3"),
    _timm("xception41", "84/84 84/84 32/44 12/12 0/0"),
    _timm("hrnet_w18_small", "94/94 94/94 78/78 38/46 0/0"),
    _timm(
        "vgg11_bn", "8/8 8/8 8/8 0/0 0/5", name="timm vgg11_bn (features_only)", features_only=True
    ),
    _timm("dla34", "37/38 37/37 33/33 12/12 0/6"),
    _timm("convnext_atto", "0/40 0/17 0/12 0/12 0/0"),
]

# --------------------------------------------------------------------------------------------------
# Segmentation, and models written by hand.
# --------------------------------------------------------------------------------------------------


def _smp(name: str, counts: str, quick: bool = False, encoder: str = "resnet18") -> Family:
    return Family(
        f"segmentation_models_pytorch {name} ({encoder})",
        lambda: getattr(smp, name)(encoder, encoder_weights=None, classes=3),
        counts,
        quick,
    )


SEGMENTATION = [
    _smp("Unet", "30/31 30/30 27/27 8/8 0/1", True),
    _smp("Unet", "63/64 63/63 59/59 16/16 0/1", encoder="resnet50"),
    _smp("UnetPlusPlus", "42/43 42/42 39/39 8/8 0/1"),
    _smp("FPN", "23/32 20/27 17/24 11/11 0/1", True),
    _smp("DeepLabV3", "27/28 27/27 24/24 8/8 0/1"),
    _smp("DeepLabV3Plus", "29/35 29/29 26/26 8/8 0/1", True),
    _smp("PSPNet", "25/26 24/24 22/22 8/8 0/1"),
    _smp("Linknet", "30/36 30/35 27/32 8/8 0/1"),
    _smp("MAnet", "46/59 38/38 43/51 8/9 0/1"),
    Family("own PlainUNet", lambda: PlainUNet(3, 3, 8), "10/13 10/10 10/10 0/0 0/2", True),
]

FAMILIES = [*TORCHVISION, *TIMM, *SEGMENTATION]


def of(*libraries: str) -> list[Any]:
    """The families of some libraries, as parameters of a test; most of them are slow."""
    return [
        pytest.param(family, id=family.name, marks=() if family.quick else pytest.mark.slow)
        for family in FAMILIES
        if family.library in libraries
    ]


def verify(family: Family) -> None:
    """Assert that all is right with a family, and that the table in the docs says so."""
    record = judge(family)
    assert not record.problems, "\n".join(record.problems)
    assert record.counts == family.counts
    assert record.pairs[0] == record.pairs[1], "a convolution and its norm stay stock"
    committed = models_table.read().get(family.name)
    assert committed is not None, f"{models_table.PATH} lacks it; {models_table.COMMAND}"
    # The last column is measured, and differs a little from machine to machine.
    assert models_table.row(record)[:-1] == committed[:-1], models_table.COMMAND
