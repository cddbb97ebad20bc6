"""Plans in files: the graph, the chosen kernels and the weights, with no code.

A file is in the format of safetensors: tensors by name, and a header in which one entry is JSON
that describes everything else. Reading it executes nothing: operators are looked up by name among
those that torch has registered, and only such as compute from tensors are admitted. Weights are
stored as the model has them and packed anew, so that a file fits other machines with the same kind
of device; kernels that are not there are replaced, with a warning. They are the very weights that
the kernels were compared with float64 on: other ones are neither written nor read.
"""

from __future__ import annotations

import json
import operator
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fused_resnet import backends
from fused_resnet.backends.kernel import Kernel
from fused_resnet.chain_planner import ChainOutcome
from fused_resnet.chaining import chained, find
from fused_resnet.fold import Recipe
from fused_resnet.footprint import give_back
from fused_resnet.graph import Call, Graph, Literal, Meta, Named, Origin, Ref
from fused_resnet.layers import Chained, Layers, Span, Tunable, lower
from fused_resnet.plan import Plan, Policy
from fused_resnet.planner import Decision, Outcome, Settings
from fused_resnet.proving import tunable
from fused_resnet.source import converted_state
from fused_resnet.stored import Renamed, StoredTensors
from fused_resnet.tuned_table import environment_of, table
from fused_resnet.version import __version__
from fused_resnet.warn import warn
from fused_resnet.weights import Weights, fingerprint

#: Name and version of the format; a reader refuses another.
SCHEMA = "fused_resnet.plan/3"

#: Entry of the header that holds the description.
_ENTRY = "fused_resnet"

#: Namespaces of operators that a file may name.
_NAMESPACES = ("aten", "fused_resnet", "torchvision")

_DTYPES = {
    str(d): d
    for d in vars(torch).values()
    if isinstance(d, torch.dtype)
}  # fmt: skip
_FORMATS = {str(f): f for f in vars(torch).values() if isinstance(f, torch.memory_format)}
_LAYOUTS = {str(torch.strided): torch.strided}


class PlanFileError(ValueError):
    """A file is no plan that can be used here; the message says why."""


# --------------------------------------------------------------------------------------------------
# Writing.
# --------------------------------------------------------------------------------------------------


def save(plan: Plan, path: str | Path, state: Mapping[str, Tensor] | None) -> None:
    """See `Plan.save`."""
    content = plan.content()
    if not content.specialisations:
        raise ValueError(f"this plan is not specialised, so there is nothing to save: {plan}")
    known = content.weights.state if state is None else state
    if not known and content.like:
        raise ValueError(
            "this plan keeps no weights but packed ones: give them, plan.save(path, "
            "model.state_dict())"
        )
    like = {n: torch.empty_like(t, device="cpu") for n, t in content.like.items()}
    converted = converted_state(known, like)
    if state is not None and not content.weights.made_of(converted):
        raise ValueError(
            "these are not the weights that this plan was made of, and its kernels were compared "
            "with float64 on those: call plan.refit(state) first, which compares them again, then "
            "save"
        )
    tensors = {f"state.{n}": t.contiguous() for n, t in converted.items()}
    parts = []
    for number, s in enumerate(content.specialisations.values()):
        graph = s.program.layers.source
        literals = {i: o.tensor for i, o in graph.origins.items() if isinstance(o, Literal)}
        for i, tensor in literals.items():
            tensors[f"literal.{number}.{i}"] = tensor.detach().cpu().contiguous()
        outcomes = [
            {
                "result": o.layer.result,
                "kernel": o.kernel.full_name,
                "error": o.error,
                "stock_error": o.stock_error,
            }
            for o in s.decision.outcomes
        ]
        parts.append(
            {
                "inputs": _encode(s.arguments),
                "graph": _encode_graph(graph),
                "layers": outcomes,
                "notes": s.decision.notes,
                "seconds": s.decision.seconds,
                "join": s.decision.join,
                "spans": [asdict(span) for span in s.program.layers.spans],
                "chains": [asdict(outcome) for outcome in s.decision.chains],
            }
        )
    description = {
        "schema": SCHEMA,
        "package": __version__,
        "torch": str(torch.__version__),
        "environment": environment_of(content.device),
        "device": content.device.type,
        "model": content.name,
        "settings": asdict(content.settings),
        "cuda_graph": content.policy.cuda_graph,
        "tensors": fingerprint(tensors),
        "parts": parts,
    }
    save_file(_unshared(tensors), str(path), metadata={_ENTRY: json.dumps(description)})


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share memory, as tied weights do, each with its own: the format wants it so."""
    seen: set[int] = set()
    found = {}
    for name, t in tensors.items():
        address = t.untyped_storage().data_ptr()
        found[name] = t.clone() if address in seen else t
        seen.add(address)
    return found


def _encode_graph(graph: Graph) -> dict[str, Any]:
    return {
        "inputs": list(graph.inputs),
        "calls": [
            {
                "op": _name_of(call.op),
                "args": _encode(call.args),
                "kwargs": _encode(call.kwargs),
                "result": call.result,
            }
            for call in graph.calls
        ],
        "outputs": _encode(pytree.tree_unflatten(list(graph.outputs), graph.structure)),
        "origins": [[i, _encode_origin(o)] for i, o in graph.origins.items()],
        "meta": [[i, list(m.shape), str(m.dtype), m.channels_last] for i, m in graph.meta.items()],
    }


def _encode_origin(origin: Origin) -> dict[str, Any]:
    if isinstance(origin, Named):
        return {"name": origin.name}
    if isinstance(origin, Recipe):
        return {"recipe": asdict(origin)}
    return {"literal": True}


def _name_of(op: Any) -> str:
    if op is operator.getitem:
        return "getitem"
    name = str(op)
    _operator(name)  # Raises for one that a reader would refuse.
    return name


def _encode(value: Any) -> Any:
    """A value as JSON: what JSON has not is a list of one kind's name and its content."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return ["float", repr(value)]
    if isinstance(value, Ref):
        return ["ref", value.id]
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return [type(value).__name__, str(value)]
    if isinstance(value, torch.device):
        return ["device"]
    if isinstance(value, Meta):
        return ["meta", list(value.shape), str(value.dtype), value.channels_last]
    if type(value) in (list, tuple, torch.Size):
        kind = "list" if type(value) is list else "tuple"
        return [kind, [_encode(v) for v in value]]
    if type(value) in (dict, OrderedDict) and all(isinstance(k, str) for k in value):
        return [type(value).__name__, [[k, _encode(v)] for k, v in value.items()]]
    if isinstance(value, list):  # Those of torch.fx cannot be changed; they mean the same.
        return ["list", [_encode(v) for v in value]]
    if isinstance(value, dict):
        return ["dict", [[k, _encode(v)] for k, v in value.items()]]
    raise ValueError(f"a plan with a {type(value).__name__} in its graph cannot be saved")


# --------------------------------------------------------------------------------------------------
# Reading.
# --------------------------------------------------------------------------------------------------


def load(path: str | Path, *, device: torch.device | str | None = None) -> Plan:
    """A plan from a file that `Plan.save` wrote. No code in the file is executed: there is none.

    The plan is strict: it takes the shapes that it was made for. Kernels and their order were
    measured where the file was written; on another machine it works, and a warning says that it may
    be slower than one made there.

    Args:
        path: of the file.
        device: where to run, of the kind that the plan was made for; by default its first.

    Raises:
        FileNotFoundError: there is no such file.
        PlanFileError: it is no plan, of another version of the format, made for a device that is
            not here, or names operators that this torch does not have.

    Example:
        >>> plan.save("resnet50.plan")
        >>> plan = fused_resnet.load("resnet50.plan")
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        stored = StoredTensors(path)
    except SafetensorError as e:
        raise PlanFileError(f"{path} is no plan, it cannot be read: {e}") from None
    with stored:
        description = _description(path, stored.metadata)
        stored.device = _device(path, description, device)
        try:
            if fingerprint(stored) != description["tensors"]:
                raise PlanFileError(
                    f"{path} is damaged: its weights are not those that its kernels were compared "
                    "with float64 on"
                )
            plan = _plan(path, description, stored, stored.device)
        except PlanFileError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
            raise PlanFileError(f"{path} is damaged ({type(e).__name__}: {e})") from e
    give_back()
    return plan


def _description(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if _ENTRY not in metadata:
        raise PlanFileError(f"{path} holds tensors, but no plan; Plan.save writes one")
    try:
        description = json.loads(metadata[_ENTRY])
        schema = description["schema"]
    except (KeyError, TypeError, ValueError) as e:
        raise PlanFileError(f"{path} is damaged ({type(e).__name__}: {e})") from None
    if schema != SCHEMA:
        raise PlanFileError(
            f"{path} is a plan of format {schema!r}, and this version reads {SCHEMA!r}: optimize "
            "the model again"
        )
    checked: dict[str, Any] = description
    return checked


def _device(
    path: Path, description: Mapping[str, Any], wanted: torch.device | str | None
) -> torch.device:
    kind = str(description["device"])
    where = torch.device(kind if wanted is None else wanted)
    if where.type != kind:
        raise PlanFileError(f"{path} was made for {kind}, it does not run on {where}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise PlanFileError(f"{path} was made for CUDA, and torch finds no GPU here")
    return where


def _plan(
    path: Path, description: dict[str, Any], stored: StoredTensors, device: torch.device
) -> Plan:
    like = Renamed(stored.like, "state.")
    settings = Settings(**description["settings"])
    weights = Weights(Renamed(stored, "state."), copied=True)
    policy = Policy(strict=True, cuda_graph=bool(description["cuda_graph"]))
    plan = Plan(str(description["model"]), weights, like, settings, policy, table(), device=device)
    replaced: list[str] = []
    for number, part in enumerate(description["parts"]):
        literals = {
            int(name): tensor for name, tensor in Renamed(stored, f"literal.{number}.").items()
        }
        graph = _decode_graph(part["graph"], literals, device)
        layers, missing = _layers(lower(graph), part, device)
        replaced += missing
        outcomes, missing = _outcomes(layers, part["layers"], device)
        replaced += missing
        decision = Decision(
            layers,
            outcomes,
            list(map(str, part["notes"])),
            part["seconds"],
            bool(part["join"]),
            tuple(_decode_chain(c) for c in part["chains"]),
        )
        arguments = _decode(part["inputs"], device)
        plan.add(arguments, decision.program(weights), decision)
    weights.release()
    here = environment_of(device)
    if replaced:
        warn(
            f"{path}: kernels that are not usable here were replaced by what is chosen without "
            f"measuring: {', '.join(dict.fromkeys(replaced))}"
        )
    elif description["environment"] != here:
        warn(
            f"{path} was measured elsewhere ({description['environment']}); here ({here}) other "
            "kernels may be faster: optimize the model on this machine"
        )
    return plan


def _layers(
    layers: Layers, part: Mapping[str, Any], device: torch.device
) -> tuple[Layers, list[str]]:
    """The layers with what is chained in the file, as far as its kernels are there; what is not."""
    spans = [
        Span(int(s["block"]), bool(s["following"]), bool(s["projection"]), str(s["store"]))
        for s in part["spans"]
    ]
    blocks = find(layers).blocks if spans else ()
    names = {int(data["result"]): str(data["kernel"]) for data in part["layers"]}
    missing: list[str] = []
    while True:
        found = chained(layers, blocks, spans)
        if not missing and len(tunable(found)) != len(part["layers"]):
            raise ValueError("another number of layers than kernels")
        calls = [layer for layer in found.layers if isinstance(layer, Chained)]
        broken = {c.block for c in calls if _usable(c, names.get(c.result, ""), device) is None}
        if not broken:
            return found, missing
        # Stock operations in a chain gain nothing: the bottleneck's own layers are better.
        missing += [names.get(c.result, "") for c in calls if c.block in broken]
        spans = [span for span in spans if span.block not in broken]


def _usable(layer: Tunable, name: str, device: torch.device) -> Kernel | None:
    """The kernel of that name, if it is there and right."""
    kernel = backends.named(layer.op, name, layer.problem, device)
    if kernel is None or backends.verdict(kernel, device, layer.problem.dtype) is not None:
        return None
    return kernel


def _outcomes(
    layers: Layers, stored: list[dict[str, Any]], device: torch.device
) -> tuple[list[Outcome], list[str]]:
    known = {int(data["result"]): data for data in stored}
    found: list[Outcome] = []
    missing: list[str] = []
    for layer in tunable(layers):
        data = known.get(layer.result, {})
        name = str(data.get("kernel", ""))
        kernel = _usable(layer, name, device)
        error, stock_error = data.get("error"), data.get("stock_error")
        if kernel is None:
            missing += [name] if name else []
            kernel = _instead(layer.op, layer.problem, device)
            error = stock_error = None
        found.append(Outcome(layer, kernel, error, stock_error))
    return found, missing


def _decode_chain(data: Mapping[str, Any]) -> ChainOutcome:
    chosen = data["chosen"]
    alternatives = tuple((str(what), str(why)) for what, why in data["alternatives"])
    return ChainOutcome(
        str(data["name"]), None if chosen is None else str(chosen), str(data["why"]), alternatives
    )


def _instead(op: str, problem: Any, device: torch.device) -> Kernel:
    return backends.choose(op, problem, device).kernel


def _decode_graph(
    data: Mapping[str, Any], literals: Mapping[int, Tensor], device: torch.device
) -> Graph:
    calls = tuple(
        Call(
            _operator(str(c["op"])),
            _decode(c["args"], device),
            _decode(c["kwargs"], device),
            int(c["result"]),
        )
        for c in data["calls"]
    )
    outputs, structure = pytree.tree_flatten(_decode(data["outputs"], device))
    origins = {int(i): _decode_origin(int(i), o, literals) for i, o in data["origins"]}
    meta = {
        int(i): Meta(tuple(map(int, shape)), _DTYPES[dtype], device, bool(last))
        for i, shape, dtype, last in data["meta"]
    }
    inputs = tuple(map(int, data["inputs"]))
    return Graph(inputs, calls, tuple(outputs), structure, origins, meta)


def _decode_origin(i: int, data: Mapping[str, Any], literals: Mapping[int, Tensor]) -> Origin:
    if "name" in data:
        return Named(str(data["name"]))
    if "recipe" in data:
        known = {f.name for f in fields(Recipe)}
        return Recipe(**{k: v for k, v in data["recipe"].items() if k in known})
    return Literal(literals[i])


def _decode(value: Any, device: torch.device) -> Any:
    if not isinstance(value, list):
        return value
    kind, *content = value
    if kind == "device":
        return device
    if kind == "meta":
        shape, dtype, last = content
        return Meta(tuple(map(int, shape)), _DTYPES[dtype], device, bool(last))
    (inner,) = content
    if kind == "float":
        return float(inner)
    if kind == "ref":
        return Ref(int(inner))
    if kind in ("list", "tuple"):
        values = [_decode(v, device) for v in inner]
        return values if kind == "list" else tuple(values)
    if kind in ("dict", "OrderedDict"):
        pairs = [(str(k), _decode(v, device)) for k, v in inner]
        return dict(pairs) if kind == "dict" else OrderedDict(pairs)
    constants: dict[str, Mapping[str, Any]] = {
        "dtype": _DTYPES,
        "memory_format": _FORMATS,
        "layout": _LAYOUTS,
    }
    return constants[kind][inner]


def _operator(name: str) -> Any:
    """The operator of that name.

    Raises:
        PlanFileError: torch has none, or a plan may not name it.
    """
    if name == "getitem":
        return operator.getitem
    namespace, _, rest = name.partition(".")
    op_name, _, overload = rest.partition(".")
    found: Any = None
    if namespace in _NAMESPACES:
        packet = getattr(getattr(torch.ops, namespace), op_name, None)
        found = getattr(packet, overload or "default", None)
    if not isinstance(found, OpOverload):
        raise PlanFileError(f"this torch has no operator {name}, which the plan needs")
    takes = [str(a.type) for a in found._schema.arguments]
    if any(t in ("str", "Optional[str]") and found.namespace == "aten" for t in takes) and not any(
        "Tensor" in t for t in takes
    ):
        # Such as aten::from_file, which opens what the file names.
        raise PlanFileError(f"a plan may not use the operator {name}")
    return found


__all__ = ["SCHEMA", "PlanFileError", "load", "save"]
