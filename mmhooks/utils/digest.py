"""Content digests: equal values have equal digests in every process, different values have different ones.

Stored results (stores, caches, checkpoints) are keyed by what produced them, so everything that determines a result
must be distinguishable: two functions of one name, two objects of one class, two tensors of one shape. What has no
hashable content (a generator, a file, a lock) raises :class:`~mmhooks.errors.NoDigest`; the caller then names it with
``key=``.

Every value is hashed as a type tag, the length of its content, and the content, so no two values share an encoding.
The order of dictionaries counts, since code may depend on it; that of sets does not. Code counts too: functions and
classes of installed packages are hashed by name (versions are stored beside results); the user's own by bytecode,
defaults, closure, and the globals they read; user modules that they read, by source.
"""

from __future__ import annotations

import copyreg
import enum
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from hashlib import file_digest, sha256
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmhooks.errors import NoDigest
from mmhooks.utils.code import full_name, globals_read, is_library, resolves_by_name, written_in

Content = Callable[[Any], Any]
# Content functions of library classes whose objects change in use (caches), by qualified name: see `content_of`.
_CONTENT: dict[str, Content] = {}


def digest(*values: Any, what: str = "value", key: str | None = None) -> str:
    """The SHA-256, in hex, of the content of ``values``.

    Supports plain values, sequences, mappings, sets, dataclasses, paths (by name), numpy and torch tensors (type,
    shape and bits, regardless of device and strides), torch modules (classes, attributes, hooks, parameters, buffers
    and extra state: everything that runs), functions and classes (code, defaults, closure, the globals they read),
    and every object whose state Python can copy.

    Args:
        what: the name of the first value in error messages.
        key: stands in for each part without content; the caller guarantees that it is unique to that part.

    Raises:
        NoDigest: a part has no hashable content, and there is no ``key``.

    >>> digest({"size": 224}) == digest({"size": 224}), digest(1) == digest(True)
    (True, False)
    """
    hasher = _Hasher(what, key)
    try:
        for value in values:
            hasher.add(value)
    except RecursionError:
        raise NoDigest(f"{what} is nested too deeply to have a digest; pass something flatter") from None
    return hasher.sha.hexdigest()


def content_of(name: str) -> Callable[[Content], Content]:
    """Registers the content of a library class ``module.Class`` and its subclasses, to be hashed in place of their state.

    For objects with internal caches: calling them must not change their digest.
    """

    def register(content: Content) -> Content:
        _CONTENT[name] = content
        return content

    return register


class _Hasher:
    """A SHA-256 that values are written into."""

    def __init__(self, what: str, key: str | None) -> None:
        self.sha = sha256()
        self._key = key
        self._path = [what]
        self._open: dict[int, int] = {}  # the objects being written, by id: their depth
        self._ambient = False  # in globals and attributes, opaque objects are hashed by type

    def add(self, value: Any) -> None:
        """Writes one value."""
        kind = type(value)
        leaf = _LEAVES.get(kind)
        if leaf is not None:
            self._tagged(kind.__name__, leaf(value))
        elif id(value) in self._open:
            self._tagged("cycle", str(len(self._open) - self._open[id(value)]).encode())
        else:
            self._open[id(value)] = len(self._open)
            self._add(value)
            del self._open[id(value)]

    def _add(self, value: Any) -> None:
        kind = type(value)
        registered = next((_CONTENT[n] for c in kind.__mro__ if (n := full_name(c)) in _CONTENT), None)
        if registered is not None:
            self._tagged("registered")
            self._class(kind)
            self.add(registered(value))
        elif kind in (list, tuple):
            self._many(kind.__name__, value)
        elif kind in (dict, types.MappingProxyType):
            self._items(kind.__name__, value.items())
        elif kind in (set, frozenset):
            self._set(value)
        elif isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, np.generic):
            self._tagged("scalar")
            self._array(np.asarray(value))
        elif kind in (
            np.ndarray,
            np.memmap,
        ):  # other kinds, such as masked arrays, hold more than their numbers
            self._array(value)
        elif isinstance(value, PurePath):
            self._tagged("path", value.as_posix().encode())
        elif isinstance(value, enum.Enum):
            self._tagged("enum", f"{full_name(kind)}.{value.name}".encode())
            with self._at("value"):
                self.add(value.value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.ModuleType):
            self._python_module(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.CodeType):
            self._code(value)
        elif isinstance(value, types.MethodType):
            self._tagged("method")
            self.add(value.__func__)
            self.add(value.__self__)
        elif isinstance(value, torch.Generator):
            self._tagged("generator", str(value.device.type).encode())
            self.add(value.get_state())
        else:
            self._object(value)

    # -- writing ---------------------------------------------------------------------------------------

    def _tagged(self, tag: str, content: bytes | memoryview = b"") -> None:
        self.sha.update(b"%s %d:" % (tag.encode(), len(content)))
        self.sha.update(content)

    def _many(self, tag: str, values: Any) -> None:
        self._tagged(tag, str(len(values)).encode())
        for i, value in enumerate(values):
            with self._at(f"[{i}]"):
                self.add(value)

    def _items(self, tag: str, items: Iterable[tuple[Any, Any]]) -> None:
        pairs = list(items)
        self._tagged(tag, str(len(pairs)).encode())
        for key, value in pairs:
            with self._at(f"[{key!r:.60}]"):
                self.add(key)
                self.add(value)

    def _set(self, values: Iterable[Any]) -> None:
        outer, parts = self.sha, []
        for value in values:
            self.sha = sha256()
            self.add(value)
            parts.append(self.sha.digest())
        self.sha = outer
        self._tagged("set", b"".join(sorted(parts)))

    @contextmanager
    def _at(self, part: str) -> Iterator[None]:
        self._path.append(part)
        yield
        self._path.pop()

    @contextmanager
    def _inside(self, part: str, *, ambient: bool) -> Iterator[None]:
        before, self._ambient = self._ambient, ambient
        with self._at(part):
            yield
        self._ambient = before

    def _where(self) -> str:
        return "".join(
            part if part[:1] in "[.(" or not i else f".{part}" for i, part in enumerate(self._path)
        )

    def _opaque(self, value: Any, why: str) -> None:
        if self._ambient and not callable(value):
            self._tagged("opaque", full_name(type(value)).encode())
        elif self._key is not None:
            self._tagged("key", self._key.encode())
        else:
            raise NoDigest(
                f"{self._where()} ({full_name(type(value))}) has no content to tell it from another object ({why}), so "
                'results stored for it could be confused with those of another: pass key="a name for exactly this one"'
            )

    # -- numbers ---------------------------------------------------------------------------------------

    def _tensor(self, value: Tensor) -> None:
        value = value.detach()
        flatten = getattr(value, "__tensor_flatten__", None)
        if flatten is not None:  # quantised and distributed tensors consist of plain ones
            names, context = flatten()
            self._tagged(
                "tensor of tensors", f"{full_name(type(value))} {tuple(value.shape)} {value.dtype}".encode()
            )
            self.add(context)
            for name in names:
                with self._at(name):
                    self.add(name)
                    self.add(getattr(value, name))
            return
        if value.is_meta:
            self._opaque(value, "it is on the meta device: its values are elsewhere")
            return
        head = f"{value.dtype} {tuple(value.shape)} {value.layout}".encode()
        if value.is_quantized:
            self._tagged("quantised", head)
            scheme = value.qscheme()
            per_tensor = scheme in (torch.per_tensor_affine, torch.per_tensor_symmetric)
            self.add(str(scheme))
            self.add((value.q_scale(), value.q_zero_point()) if per_tensor else (
                value.q_per_channel_scales(), value.q_per_channel_zero_points(), value.q_per_channel_axis()
            ))  # fmt: skip
            self._tensor(value.int_repr())
        elif value.layout == torch.strided:
            self._tagged("tensor", head)
            flat = value.resolve_conj().resolve_neg().cpu().contiguous().flatten()
            self._tagged("bits", flat.view(torch.uint8).numpy().data)
        elif value.layout == torch.sparse_coo:
            self._tagged("tensor", head)
            whole = value.coalesce()
            self._tensor(whole.indices())
            self._tensor(whole.values())
        else:
            self._tagged("tensor", head)
            self._tensor(value.to_sparse_coo())

    def _array(self, value: np.ndarray) -> None:
        self._tagged("array", f"{value.dtype.descr} {value.shape}".encode())
        if value.dtype.hasobject:
            self._many("objects", value.ravel().tolist())
        else:
            self._tagged("bits", value.tobytes())

    # -- torch modules -----------------------------------------------------------------------------------

    def _module(self, root: nn.Module) -> None:
        """Everything that runs, and its numbers; not devices, training modes or hooks of our own open contexts."""
        self._tagged("module", str(sum(1 for _ in root.named_modules())).encode())
        state: dict[str, Any] = dict(root.named_buffers())
        for path, module in root.named_modules():
            with self._at(path or "root"):
                self.add(path)
                kind = type(module).__dict__.get("_mmhooks_base", type(module))
                self._class(kind)
                if full_name(kind) == "torch._dynamo.eval_frame.OptimizedModule":
                    continue  # its only child is what runs
                with self._inside("", ambient=True):
                    own = {k: v for k, v in vars(module).items() if k not in _BOOKKEEPING}
                    self._items("attributes", sorted(own.items()))
                    hooks = [
                        hook
                        for table in ("_forward_pre_hooks", "_forward_hooks")
                        for hook in getattr(module, table).values()
                        if not str(getattr(hook, "__module__", "")).startswith(_READERS)
                    ]
                    self._many("hooks", hooks)
                    if isinstance(module, torch.jit.ScriptModule):
                        self.add(getattr(module, "code", ""))
        state |= root.state_dict()  # extra state and packed weights too
        self._items("state", sorted(state.items()))

    # -- code ------------------------------------------------------------------------------------------

    def _class(self, kind: type) -> None:
        self._tagged("class", full_name(kind).encode())
        if is_library(kind.__module__):
            return
        with self._inside(f"({kind.__qualname__})", ambient=True):
            self._many("bases", kind.__bases__)
            self._items("attributes", written_in(kind).items())

    def _function(self, function: types.FunctionType) -> None:
        self._tagged("function", full_name(function).encode())
        library = is_library(function.__module__)
        if library and resolves_by_name(function):
            return
        with self._inside(f"({function.__qualname__})", ambient=library and self._ambient):
            self._code(function.__code__)
            with self._at("defaults"):
                self.add(function.__defaults__)
                self.add(function.__kwdefaults__)
            for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
                with self._at(name):
                    try:
                        content = cell.cell_contents
                    except ValueError:
                        self._tagged("empty cell")
                    else:
                        self.add(content)
        known = {} if library else function.__globals__
        with self._inside(f"({function.__qualname__})", ambient=True):
            read = sorted(globals_read(function.__code__) & known.keys())
            self._items("globals", [(name, known[name]) for name in read])

    def _code(self, code: types.CodeType) -> None:
        self._tagged("code", code.co_code)
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        self.add((code.co_flags, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, *names))
        self.add(code.co_consts)

    def _python_module(self, module: types.ModuleType) -> None:
        self._tagged("python module", module.__name__.encode())
        source = getattr(module, "__file__", None)
        if source is not None and not is_library(module.__name__):
            try:
                with Path(source).open("rb") as file:
                    self._tagged("source", file_digest(file, "sha256").digest())
            except OSError as fault:
                self._opaque(module, str(fault))

    # -- objects ---------------------------------------------------------------------------------------

    def _object(self, value: Any) -> None:
        """Hashes what Python would copy: class, arguments, attributes, items."""
        try:
            listed = copyreg.dispatch_table.get(type(value))  # e.g. regular expressions
            reduced = listed(value) if listed is not None else value.__reduce_ex__(4)
        except Exception as fault:
            self._opaque(value, str(fault) or type(fault).__name__)
            return
        if isinstance(reduced, str):
            self._tagged("global", f"{getattr(value, '__module__', '')}.{reduced}".encode())
            self.add(getattr(value, "__wrapped__", None))  # the function behind functools.cache
            return
        parts: tuple[Any, ...] = (*reduced, None, None, None)
        make, args, state, items, pairs, *_ = parts
        self._tagged("object")
        kind = type(value).__dict__.get("_mmhooks_base", type(value))
        self._class(kind)
        if make not in (copyreg.__newobj__, copyreg.__newobj_ex__, copyreg._reconstructor):  # type: ignore[attr-defined]
            self.add(make)
        with self._at("(arguments)"):
            self.add(tuple(a for a in args if a is not kind and a is not type(value)))
        slots = None
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            state, slots = state
        for part in (state, slots):
            if isinstance(part, dict):
                own = {
                    k: v
                    for k, v in part.items()
                    if not isinstance(getattr(kind, str(k), None), cached_property)
                }
                self._items("attributes", sorted(own.items(), key=lambda item: str(item[0])))
            else:
                self.add(part)
        self._many("items", list(items or ()))
        self._items("pairs", pairs or ())


def _number(value: float | complex) -> bytes:
    if isinstance(value, complex):
        return f"{float.hex(value.real)} {float.hex(value.imag)}".encode()
    return float.hex(value).encode()


_LEAVES: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda value: b"",
    type(Ellipsis): lambda value: b"",
    type(NotImplemented): lambda value: b"",
    bool: lambda value: b"1" if value else b"0",
    int: lambda value: f"{value:x}".encode(),
    float: lambda value: value.hex().encode(),
    complex: lambda value: f"{value.real.hex()} {value.imag.hex()}".encode(),
    str: lambda value: value.encode("utf-8", "surrogatepass"),
    bytes: lambda value: value,
    bytearray: bytes,
    range: lambda value: f"{value.start} {value.stop} {value.step}".encode(),
    torch.dtype: lambda value: str(value).encode(),
    torch.layout: lambda value: str(value).encode(),
    torch.memory_format: lambda value: str(value).encode(),
    torch.device: lambda value: value.type.encode(),  # without the index: moving between GPUs changes nothing
    torch.Size: lambda value: str(tuple(value)).encode(),
}
# Hooks of our open contexts, and those that transformers leaves in place after the first call with hidden states.
_READERS = ("mmhooks.hooks.", "transformers.")
_BOOKKEEPING = frozenset(vars(nn.Module())) | {"_compiled_call_impl", "_is_hf_initialized"}
