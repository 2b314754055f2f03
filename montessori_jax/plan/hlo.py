"""What a compiled program says to other chips: collectives in XLA's text, and how often they run.

A computation runs as often as its callers do, times the trips of a loop whose body it is. The TPU
compiler writes no trip counts into its text: they are read off the loops' conditions
(``counter < constant``, from 0).

With several slices the program is that of one of them, its chips numbered from 0. What it says to
the others are ``send`` instructions to the runtime between slices (Megascale), which name the
collective that they are.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "s16": 16,
    "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64,
    "f64": 64, "c64": 64,
}  # fmt: skip
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*)$")
OPERATION = re.compile(r"([a-z][\w\-]*)\(")
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)")
BETWEEN = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind, over the same axes and of one dtype.

    Attributes:
        kind: one of `KINDS`.
        axes: axes of the mesh along which a group's chips differ.
        dtype: of the largest array.
        count: how many run in the program.
        sent: bytes that leave a chip in all of them, by the ring algorithm: with ``g`` chips a
            group ``(g - 1) / g`` of the array for a reduce-scatter or an all-to-all, of the result
            for an all-gather, twice that for an all-reduce, and all of it for a permute.
        between_slices: whether they go over the network between slices.
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    count: int
    sent: float
    between_slices: bool = False


@dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    operation: str
    text: str


def collectives(
    text: str,
    shape: dict[str, int],
    unknown_trips: Sequence[int] = (),
    across: tuple[str, int] | None = None,
) -> list[Collective]:
    """The collectives of a compiled program, by kind, axes and dtype; the most bytes first.

    Args:
        text: ``compiled.as_text()``.
        shape: the mesh, axis name to size, in the order of its devices.
        unknown_trips: of loops whose count is not in the program, the outermost first; those
            nested deeper run once.
        across: the axis along which slices differ, and how many slices there are.
    """
    if across is not None:
        shape = {n: size // across[1] if n == across[0] else size for n, size in shape.items()}
    computations = dict(_computations(text))
    runs = _runs(text, computations, unknown_trips)
    found: dict[tuple[str, tuple[str, ...], str, bool], list[float]] = defaultdict(lambda: [0, 0.0])
    homes: dict[tuple[str, ...], str] = {}
    for name, instructions in computations.items():
        types = {one.name: one.type for one in instructions}
        for one in instructions:
            kind = one.operation.removesuffix("-start")
            between = BETWEEN.search(one.text) if across and kind == "send" else None
            if between:
                kind = _named(between[1])
            if kind not in KINDS or not runs.get(name):
                continue
            # An asynchronous one is cut into steps: computations that have the whole instruction
            # each. A channel alone does not name it: those of a shard_map share one.
            channel = re.search(r"channel_id=(\d+)", one.text)
            written = re.search(r'op_name="([^"]*)"', one.text)
            known = (kind, channel[1] if channel else "", written[1] if written else "")
            if channel and homes.setdefault((*known, between[0] if between else ""), name) != name:
                continue
            operands = re.findall(r"%([\w.\-]+)", one.text[: one.text.index(")")])
            arrays = [array for operand in operands for array in _arrays(types.get(operand, ""))]
            if not arrays:
                continue
            axes: tuple[str, ...]
            if between and across:
                axes, size = (across[0],), across[1]
                arrays = arrays[:1]  # what is sent, without its context and token
            else:
                groups = _groups(kind, one.text, math.prod(shape.values()))
                size, axes = groups.shape[1], _axes(groups, shape)
            held = sum(bytes_ for _, bytes_ in arrays)
            dtype = max(arrays, key=lambda array: array[1])[0]
            if kind == "all-reduce" and "reduce-scatter" in name:
                kind = "reduce-scatter"  # how the TPU compiler writes one
            entry = found[kind, axes, dtype, between is not None]
            entry[0] += runs[name]
            entry[1] += runs[name] * held * _share_sent(kind, size)
    made = [
        Collective(kind, axes, dtype, int(count), sent, between)
        for (kind, axes, dtype, between), (count, sent) in found.items()
        if axes
    ]
    return sorted(made, key=lambda one: -one.sent)


def _named(transfer: str) -> str:
    """A transfer between slices as one of `KINDS`; what is none of them is sent once."""
    kind = transfer.lower().replace("_", "-")
    return kind if kind in KINDS else "collective-permute"


def _share_sent(kind: str, size: int) -> float:
    """Bytes sent by a chip for each byte of its operand."""
    if kind == "collective-permute":
        return 1.0
    if kind == "all-gather":
        return size - 1.0
    return (2.0 if kind == "all-reduce" else 1.0) * (size - 1) / size


def _computations(text: str) -> Iterator[tuple[str, list[_Instruction]]]:
    name = ""
    body: list[_Instruction] = []
    for line in text.splitlines():
        if start := COMPUTATION.match(line):
            name, body = start[2], []
        elif line.startswith("}"):
            yield name, body
        elif found := INSTRUCTION.match(line):
            rest = found[2]
            end = _type_end(rest)
            operation = OPERATION.match(rest[end:].lstrip())
            if operation:
                tail = rest[end:].lstrip()
                body.append(_Instruction(found[1], rest[:end], operation[1], tail))


def _type_end(text: str) -> int:
    """Where an instruction's type ends: at the first blank outside brackets."""
    depth = 0
    for at, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == " " and depth == 0:
            return at
    return len(text)


def _arrays(type_: str) -> list[tuple[str, float]]:
    """Dtype and bytes of every array in a type, without its layouts."""
    plain = re.sub(r"\{[^}]*\}", "", type_)
    return [
        (dtype, math.prod(int(n) for n in sizes.split(",") if n) * BITS[dtype] / 8)
        for dtype, sizes in ARRAY.findall(plain)
        if dtype in BITS
    ]


def _runs(
    text: str, computations: dict[str, list[_Instruction]], unknown_trips: Sequence[int]
) -> dict[str, int]:
    """How often each computation runs; one that several call, their sum."""
    entry = next((m[2] for m in map(COMPUTATION.match, text.splitlines()) if m and m[1]), "")
    runs: dict[str, int] = defaultdict(int)

    def visit(name: str, times: int, depth: int) -> None:
        runs[name] += times
        for one in computations.get(name, ()):
            called = CALLED.findall(one.text)
            if branches := BRANCHES.search(one.text):
                called += re.findall(r"%([\w.\-]+)", branches[1])
            inner, level = times, depth
            if one.operation == "while":
                trips = _trips(one, computations)
                if trips is None:
                    trips = unknown_trips[depth] if depth < len(unknown_trips) else 1
                    level = depth + 1
                inner = times * trips
            for child in called:
                if child in computations:
                    visit(child, inner, level)

    visit(entry, 1, 0)
    return runs


def _trips(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int | None:
    """Trips of a while loop; None where the program does not say."""
    if known := re.search(r'known_trip_count[^\d]*"?n"?[^\d]*(\d+)', loop.text):
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", loop.text)
    body = computations.get(condition[1], []) if condition else []
    values = {one.name: one for one in body}
    for one in body:
        if one.operation != "compare" or "direction=LT" not in one.text:
            continue
        _, bound = re.findall(r"%([\w.\-]+)", one.text)[:2]
        if bound in values and values[bound].operation == "constant":
            return int(re.findall(r"constant\((-?\d+)\)", values[bound].text)[0])
    return None


def _groups(kind: str, text: str, chips: int) -> np.ndarray:
    """Chips that talk to each other, a group a row."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
        return np.array(
            [_numbers(one) for one in re.findall(r"\{([\d,]+)", pairs[1] if pairs else "")]
        )
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return np.array([_numbers(one) for one in re.findall(r"\{([\d,]+)\}", listed[1])])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
        r" \{([^}]*)\}",
        text,
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        ids = np.arange(chips) if named[2] is None else _iota(named[2], named[3])
        inside = re.findall(r"'([^']+)'", named[4])
        order = [name for name in sizes if name not in inside] + inside
        places = ids.reshape(tuple(sizes.values())).transpose([list(sizes).index(n) for n in order])
        return places.reshape(-1, math.prod(sizes[name] for name in inside))
    return np.arange(chips).reshape(1, chips)


def _iota(shape: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",") if one]


def _axes(groups: np.ndarray, shape: dict[str, int]) -> tuple[str, ...]:
    """The axes along which the members of any group differ."""
    if groups.size == 0:
        return ()
    places = np.stack(np.unravel_index(groups, tuple(shape.values())), axis=-1)
    differ = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(name for name, apart in zip(shape, differ, strict=True) if apart)
