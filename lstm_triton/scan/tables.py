"""Tables of measured plans: files in plans/, one for each device. `python -m bench tune` writes them.

A table is a JSON object. Its keys are those of `ScanShape`, and its values are the fields of a `Plan`. One more key,
`ABOUT`, says with what the plans were measured. A wrong plan gives wrong values, or overwrites memory. So nothing in a
table is believed unseen: each plan must be one that the planner itself makes for its key.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..target import Device
from .cost import DATA_CENTRE
from .plan import Plan, ScanShape, tf32_rounding

ABOUT = "about"
SCHEMA = 1
NUMBER = r"[1-9]\d{0,8}"
KEY = re.compile(
    r"(?P<kind>forward|backward) (?P<dtype>float32|tf32|float16|bfloat16) "
    rf"B=(?P<batch>{NUMBER})(?: I=(?P<input>{NUMBER}))? H=(?P<hidden>{NUMBER})"
    rf"(?: (?P<lanes>{NUMBER}) (?P<how>layers|directions))?"
)


class BadTable(ValueError):
    """A table that must not be used, and why."""


@cache
def kernels_hash() -> str:
    """A hash of the kernels."""
    return hash_of(sorted((Path(__file__).parent.parent / "kernels").glob("*.py")))


def hash_of(files: Iterable[Path]) -> str:
    """A hash of the names and the contents of files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def about(device: Device) -> dict[str, object]:
    """What a table must say of itself to be used on a device. A table that says nothing was written by hand."""
    return {"schema": SCHEMA, "kernels": kernels_hash(), "multiprocessors": device.multiprocessors}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        BadTable: there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadTable(f"it cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadTable(f"it is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadTable(f"it must be a JSON object, not {type(found).__name__}")
    return found


def read_plans(path: Path, device: Device, candidates: Callable[[ScanShape], list[Plan]]) -> dict[str, Plan]:
    """The plans of a table.

    Args:
        candidates: the planner's function.

    Raises:
        BadTable: something in the table is wrong.
    """
    table = read_object(path)
    measured = table.pop(ABOUT, about(device))
    if not isinstance(measured, dict):
        raise BadTable(f"{ABOUT!r} must be an object, got {measured!r}")
    for name, expected in about(device).items():
        if measured.get(name) != expected:
            raise BadTable(f"its plans were measured with {name} {measured.get(name)!r}, and here it is {expected!r}")
    return {key: _checked(key, entry, device, candidates) for key, entry in table.items()}


def _checked(key: str, entry: Any, device: Device, candidates: Callable[[ScanShape], list[Plan]]) -> Plan:
    shape = _shape(key, device)
    if not isinstance(entry, dict):
        raise BadTable(f"the plan of {key!r} must be an object, got {entry!r}")
    names = [field.name for field in fields(Plan)]
    given = {name: entry[name] for name in names if name in entry}
    # The rounding does not change the speed. Tables of earlier versions lack it.
    given["tf32_rounding"] = tf32_rounding(shape.dot_precision, device)
    try:
        plan = Plan(**given)
    except TypeError as error:
        raise BadTable(f"the plan of {key!r} is not complete: {error}") from error
    tiles = (plan.block_batch, plan.block_hidden, plan.fuse_input)
    own = [each for each in candidates(shape) if (each.block_batch, each.block_hidden, each.fuse_input) == tiles]
    if not own:
        what = "block_batch {}, block_hidden {} and fuse_input {}".format(*map(repr, tiles))
        raise BadTable(f"the plan of {key!r} has {what}, which do not fit the layer and the device")
    for name, right in asdict(_with_free_fields(own[0], plan)).items():
        found = getattr(plan, name)
        if type(found) is not type(right) or found != right:
            raise BadTable(f"the plan of {key!r} has {name} {found!r}, but {right!r} is right")
    return plan


def _with_free_fields(right: Plan, plan: Plan) -> Plan:
    """The right plan, with those fields of `plan` that change only its speed, if their values are possible."""
    if type(plan.predicted_cycles) is int and plan.predicted_cycles >= 0:
        right = replace(right, predicted_cycles=plan.predicted_cycles)
    if type(plan.hold) is int and 0 <= plan.hold <= DATA_CENTRE.most_hold and (right.hold or plan.hold == 0):
        right = replace(right, hold=plan.hold)
    return replace(right, thread_elements=0) if plan.thread_elements == 0 else right


def _shape(key: str, device: Device) -> ScanShape:
    """The shape that a key names."""
    found = KEY.fullmatch(key)
    if found is None or (found["input"] is None) != (found["kind"] == "backward"):
        raise BadTable(f"{key!r} is no key of a plan")
    name = found["dtype"]
    dtype: torch.dtype = torch.float32 if name == "tf32" else getattr(torch, name)
    kind: Any = found["kind"]
    hidden_size = int(found["hidden"])
    return ScanShape(
        kind,
        int(found["batch"]),
        int(found["input"] or hidden_size),
        hidden_size,
        dtype,
        device,
        allow_tf32=name == "tf32",
        lanes=int(found["lanes"] or 1),
        chained=found["how"] == "layers",
    )
