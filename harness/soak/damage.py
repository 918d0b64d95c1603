"""Ways to spoil a file, which know its structure. Each takes the random numbers and a path, and says what it did.

What is returned begins with ``!`` where nothing that was spoiled so may be accepted.
"""

from __future__ import annotations

import json
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[random.Random, Path], str]

NUMBERS: list[Any] = [
    -1, 0, 1, 2, 3, 7, 160, 2**31, 2**63, 10**30, -5, 0.5, -0.0, 1e-300, 1e308, "16", "", None, True, False, [], {},
    [1], [[1]], {"a": 1}, "NaN", 30_000_000, [0.1] * 5000, "x" * 5000,
]  # fmt: skip
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "1" * 25, "tru", "{", "[" * 100_000, '{"a":' * 50_000]
SIDES = [0, 1, 2, 3, 7, 64, 2**20, 2**31, 2**40, 2**62, 10**18, -1]


# Whole files


def cut(rng: random.Random, path: Path) -> str:
    """Cut the end off."""
    size = path.stat().st_size
    keep = rng.choice([0, 1, 7, 8, 9, rng.randrange(size + 1), size - 1, size // 2])
    with open(path, "r+b") as file:
        file.truncate(max(0, keep))
    return f"{'!' * (path.suffix != '.json' and keep < size)}cut to {keep} of {size} bytes"


def longer(rng: random.Random, path: Path) -> str:
    """Add bytes at the end."""
    with open(path, "ab") as file:
        file.write(rng.randbytes(rng.choice([1, 8, 4096])))
    return "!bytes added at the end" if path.suffix == ".safetensors" else "bytes added at the end"


def noise(rng: random.Random, path: Path) -> str:
    """Replace all of it by noise."""
    path.write_bytes(rng.randbytes(rng.choice([0, 8, 100, 10_000])))
    return "!noise"


def flips(rng: random.Random, path: Path) -> str:
    """Flip some bits."""
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 16])):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return "bits flipped anywhere"


# safetensors


class Safetensors:
    """A file taken apart, to be put together otherwise."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        self.path = path
        self.header: dict[str, Any] = json.loads(content[8 : 8 + length])
        self.data = content[8 + length :]

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return [name for name in self.header if name != "__metadata__"]

    def write(self, text: str | None = None, length: int | None = None) -> None:
        """Put the file together; ``text`` and ``length`` take the place of the header's own."""
        told = (text if text is not None else json.dumps(self.header)).encode("utf-8", "surrogatepass")
        self.path.write_bytes(struct.pack("<Q", len(told) if length is None else length) + told + self.data)

    def pack(self, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
        """Lay tensors out anew, so that the file is whole and only what it holds is odd."""
        start, self.data = 0, b""
        self.header = {key: value for key, value in self.header.items() if key == "__metadata__"}
        parts = []
        for name, (dtype, shape, content) in tensors.items():
            self.header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + len(content)]}
            start += len(content)
            parts.append(content)
        self.data = b"".join(parts)

    def tensors(self) -> dict[str, tuple[str, list[int], bytes]]:
        """Dtype, shape and bytes by name."""
        out = {}
        for name in self.names:
            entry = self.header[name]
            a, b = entry["data_offsets"]
            out[name] = (entry["dtype"], entry["shape"], self.data[a:b])
        return out


SIZE = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
}


def header_length(rng: random.Random, path: Path) -> str:
    """Say that the header has another length."""
    file = Safetensors(path)
    length = rng.choice([0, 1, 2, 2**20, 2**32, 2**63, 2**64 - 1, len(json.dumps(file.header)) + rng.choice([-1, 1])])
    file.write(length=length)
    return f"header length {length}"


def header_text(rng: random.Random, path: Path) -> str:
    """Change the header's JSON text."""
    file = Safetensors(path)
    text = json.dumps(file.header)
    kind = rng.randrange(5)
    if kind == 0:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice('{}[]",:0123456789 xé\x00') + text[at + 1 :]
    elif kind == 1:
        text = rng.choice(["[]", "null", "3", '"a"', "{}", *RAW[-2:]])
    elif kind == 2:
        name = json.dumps(rng.choice(file.names))
        text = text[:-1] + f", {name}: {json.dumps(file.header[json.loads(name)])}}}"
    elif kind == 3:
        text = text.replace('"shape": [', f'"shape": [{rng.choice(RAW)}, ', 1)
    else:
        text = text[: rng.randrange(len(text))]
    file.write(text)
    return f"header text, kind {kind}"


def entry(rng: random.Random, path: Path) -> str:
    """One tensor's entry, with the data left as it is: mostly a file that contradicts itself."""
    file = Safetensors(path)
    name = rng.choice(file.names)
    part = rng.choice(["dtype", "shape", "data_offsets", "all"])
    if part == "all":
        file.header[name] = rng.choice(NUMBERS)
    elif part == "dtype":
        file.header[name]["dtype"] = rng.choice([*SIZE, "F4", "", 3, None, "x" * 100_000])
    elif part == "shape":
        file.header[name]["shape"] = rng.choice([[], [rng.choice(SIDES) for _ in range(rng.randrange(12))], "x", None])
    else:
        a, b = file.header[name]["data_offsets"]
        file.header[name]["data_offsets"] = rng.choice([[b, a], [a, b + 1], [0, len(file.data)], [-1, b], [a], 3])
    file.write()
    return f"entry: {part} of {name}"


def reshape(rng: random.Random, path: Path) -> str:
    """A whole file in which some tensors have another shape or dtype."""
    file = Safetensors(path)
    tensors = file.tensors()
    names = rng.sample(list(tensors), min(len(tensors), rng.choice([1, 1, 1, 2, len(tensors)])))
    for name in names:
        dtype, shape, _ = tensors[name]
        kind = rng.randrange(7)
        new = list(shape)
        if kind == 0:
            new = []
        elif kind == 1 and new:
            new[rng.randrange(len(new))] = rng.choice([0, 1, 2, 3, 5, 7, 33])
        elif kind == 2:
            new = new[::-1]
        elif kind == 3:
            new = [*new, 1]
        elif kind == 4 and new:
            new = [new[0] + 1, *new[1:]]
        elif kind == 5:
            new = [rng.choice([2**40 - 1, 10**9, 0]), 0]
        dtype = rng.choice(list(SIZE)) if kind == 6 else dtype
        count = 1
        for side in new:
            count *= side
        if count * SIZE.get(dtype, 4) > 2**24:
            continue
        tensors[name] = (dtype, new, bytes(count * SIZE.get(dtype, 4)))
    file.pack(tensors)
    file.write()
    return f"shapes or dtypes of {len(names)} tensors, {names[0]} first"


def names(rng: random.Random, path: Path) -> str:
    """Drop, rename, exchange or add tensors."""
    file = Safetensors(path)
    tensors = file.tensors()
    kind = rng.randrange(6)
    name = rng.choice(list(tensors))
    if kind == 0:
        for gone in rng.sample(list(tensors), min(len(tensors), rng.choice([1, 2, 10]))):
            del tensors[gone]
    elif kind == 1:
        tensors[name.replace("0", str(rng.choice([1, 99, 10**6, 10**30])))] = tensors.pop(name)
    elif kind == 2:
        for i in range(3000):
            stem = rng.choice(
                ["joint_blocks.{}.x_block.attn.qkv.weight", "encoder.down.{}.block.0.norm1.weight", "e{}"]
            )
            tensors[stem.format(i)] = ("F32", [0], b"")
    elif kind == 3:
        tensors["x" * rng.choice([1000, 10**6])] = tensors[name]
    elif kind == 4:
        other = rng.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    else:
        tensors[rng.choice(["", ".", "a.b", "\x00", "../x", "davae.x", "joint_blocks.-1.x", "a\ud800"])] = tensors[name]
    file.pack(tensors)
    file.write()
    return f"names, kind {kind}, {name}"


def data(rng: random.Random, path: Path) -> str:
    """Bits in the tensors: a file that says its hash must be refused."""
    file = Safetensors(path)
    content = bytearray(file.data)
    for _ in range(rng.choice([1, 8, 1000])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    if content == file.data:
        return "nothing"
    file.data = bytes(content)
    told = file.header.get("__metadata__", {})
    file.write()
    return ("!" if "modelspec.hash_sha256" in told and "davae.kind" in told else "") + "bits of the data"


def not_numbers(rng: random.Random, path: Path) -> str:
    """Put NaN or infinity into a tensor."""
    file = Safetensors(path)
    tensors = file.tensors()
    wide = [name for name, (dtype, _, content) in tensors.items() if dtype in ("F32", "F16", "BF16") and content]
    if not wide:
        return "nothing"
    name = rng.choice(wide)
    dtype, shape, content = tensors[name]
    bad = {"F32": struct.pack("<f", float("nan")), "F16": b"\x00\x7c", "BF16": b"\x80\x7f"}[dtype]
    tensors[name] = (dtype, shape, bad + content[len(bad) :])
    file.pack(tensors)
    if rng.random() < 0.5:
        file.header.get("__metadata__", {}).pop("modelspec.hash_sha256", None)
    file.write()
    return f"no number in {name}"


def settings(rng: random.Random, path: Path) -> str:
    """The metadata, and the configuration in it."""
    file = Safetensors(path)
    told = file.header.get("__metadata__", {})
    if not told:
        return "nothing"
    key = rng.choice([key for key in told if key.startswith("davae.")] or list(told))
    kind = rng.randrange(6)
    if key in ("davae.config", "davae.history") and kind > 1:
        told[key] = spoiled_json(rng, told[key])
    elif kind == 0:
        del told[key]
    else:
        told[key] = rng.choice(["", "2", "model", "adapter", "autoencoder", "x" * 100_000, *RAW])
    file.write()
    return f"metadata {key}"


SAFETENSORS: list[Damage] = [
    cut, longer, noise, flips, header_length, header_text, entry, reshape, reshape, names, names, data, not_numbers,
    settings, settings, settings,
]  # fmt: skip


# JSON


def spoiled_json(rng: random.Random, text: str) -> str:
    """A JSON text with something in it changed, down in its structure."""
    if rng.random() < 0.15:
        return rng.choice([*RAW, "[]", "{}", "null", "3", '"a"', text + text, text[: rng.randrange(len(text))]])
    value = json.loads(text)
    places = list(_places(value))
    if not places:
        return "null"
    holder, key = rng.choice(places)
    kind = rng.randrange(4)
    mark = "\ue000mark"
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[key] = mark
        return json.dumps(value).replace(json.dumps(mark), rng.choice(RAW[:7]))
    elif kind == 2 and isinstance(holder, dict):
        holder[rng.choice(["colour", "", "x" * 10_000])] = holder[key]
        return json.dumps(value).replace("}", f', "latent": {rng.choice(["1", "[]", "null"])}}}', 1)
    else:
        holder[key] = rng.choice(NUMBERS)
    return json.dumps(value)


def _places(value: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list) and depth < 5:
        keys = list(value)[:40] if isinstance(value, dict) else range(min(3, len(value)))
        for key in keys:
            found += [(value, key), *_places(value[key], depth + 1)]
    return found


def json_text(rng: random.Random, path: Path) -> str:
    """Change something in the structure."""
    path.write_text(spoiled_json(rng, path.read_text()), encoding="utf-8", errors="surrogatepass")
    return "JSON"


def json_names(rng: random.Random, path: Path) -> str:
    """Names of files and modules that lead elsewhere, and patterns that never end."""
    told = json.loads(path.read_text())
    away = [
        "../x.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b.safetensors",
        "c:\\x",
        "x" * 5000,
        "\x00",
        "model.bin",
    ]
    patterns = [
        "(a+)+b",
        "(.*)*x",
        "(",
        "[",
        "(?P<a>",
        ".*",
        "transformer_blocks.0.attn.to_q",
        "a{1000}{1000}",
        "\\d+$",
    ]
    if "weight_map" in told:
        told["weight_map"][rng.choice(list(told["weight_map"]))] = rng.choice([*away, 3, None, []])
    elif "alpha_pattern" in told:
        told["alpha_pattern"] = {rng.choice(patterns): rng.choice([1, *NUMBERS]) for _ in range(3)}
    path.write_text(json.dumps(told))
    return "names in JSON"


JSON: list[Damage] = [cut, noise, flips, json_text, json_text, json_text, json_names]


# Pickles


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code was run')",))


def pickle_code(rng: random.Random, path: Path) -> str:
    """A pickle that runs code, or holds no names."""
    path.write_bytes(pickle.dumps(rng.choice([_Code(), {"state_dict": _Code()}, [1], {1: 2}, 3, None])))
    return "!a pickle with code or without names"


def pickle_content(rng: random.Random, path: Path) -> str:
    """A state with odd values and odd tensors."""
    import torch

    content = torch.load(path, weights_only=True)
    inner = content.get("model_state_dict", content)
    name = rng.choice(list(inner))
    odd: list[Any] = [
        3, None, "x", [], {}, torch.zeros(()), torch.zeros(0), torch.zeros(3, dtype=torch.int32),
        torch.zeros(1).expand(2**34), torch.zeros(2, 2).to_sparse(), torch.zeros(2, dtype=torch.complex64),
        torch.full((2,), float("nan")), inner[name].half() if isinstance(inner[name], torch.Tensor) else 1,
        torch.zeros(1, device="meta"), torch.zeros(4, 4).t(),
    ]  # fmt: skip
    kind = rng.randrange(3)
    if kind == 0:
        inner[name] = rng.choice(odd)
    elif kind == 1:
        del inner[name]
    else:
        inner[rng.choice(["x", "vae.x", "dc_up.y", 3])] = rng.choice(odd)
    torch.save(content, path)
    return f"pickled content, kind {kind}, {name}"


PICKLES: list[Damage] = [cut, noise, flips, pickle_code, pickle_content, pickle_content, pickle_content]


def of(path: Path) -> list[Damage]:
    """What can be done to a file."""
    if path.suffix == ".safetensors":
        return SAFETENSORS
    return JSON if path.suffix == ".json" else PICKLES
