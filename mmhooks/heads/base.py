"""The base class of sparse heads: encoders of vectors into features, with files and a content id.

A head never accesses a model. The splice (``mmhooks.hooks``) needs only ``pre``, ``encode``, ``decode`` and
``W_dec``; training and measures also use ``prepare`` and the files.
"""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmhooks.errors import DamagedFile, MMHooksError, NoDecoder, NotFinite, ShapeMismatch
from mmhooks.heads.fields import faults_of_fields
from mmhooks.heads.files import CONFIG, FORMAT, WEIGHTS, check_about, read_head_files, write_head
from mmhooks.heads.weights import check_finite_rows, check_fit, load_strictly
from mmhooks.utils.faults import first_line
from mmhooks.utils.tensors import metadata_of

KINDS: dict[str, type[Head]] = {}
H = TypeVar("H", bound="Head")


class Head(nn.Module):
    """Base of all heads: ``x [*b d_in] -> features [*b n_features]``, and back if there is a decoder.

    Subclasses set ``kind`` (registered for :func:`load_head_dir`), create their parameters and implement ``pre`` and
    ``encode``. A head with ``normalize_input=True`` works on rows of unit norm, with ``"layer_norm"`` (heads of other
    libraries) on rows of mean 0 and standard deviation 1. ``pre``, ``encode`` and the head itself take raw vectors of a
    site and normalise them; rows returned by :meth:`prepare` are left unchanged. ``decode`` returns vectors in the
    head's own space: multiplied by the scale and shifted as in :meth:`scaled` they are those of the site, which is what
    ``head(x)`` returns.

    Attributes:
        d_in, n_features: widths of the input and of the latent space.
        name: the name of its sites, ``<site>.<name>.latents``.
        info: free JSON (training data, seed, measures), stored in ``config.json``; not part of the id.
    """

    kind: ClassVar[str] = ""
    reconstructs: ClassVar[bool] = True
    """Whether ``decode(encode(x))`` is meant to be ``x``; false for a head that predicts another site."""
    has_decoder: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("kind"):
            KINDS[cls.kind] = cls

    def __init__(
        self,
        d_in: int,
        n_features: int,
        *,
        name: str | None = None,
        normalize_input: bool | Literal["layer_norm"] = True,
    ) -> None:
        super().__init__()
        if d_in < 1 or n_features < 1:
            raise ShapeMismatch(f"expected d_in >= 1 and n_features >= 1, got {d_in} and {n_features}")
        self.d_in, self.n_features = d_in, n_features
        self.name = name or self.kind
        self.normalize_input = normalize_input
        self.info: dict[str, Any] = {}
        self._id: tuple[Any, str] | None = None

    # -- the interface of the splice -------------------------------------------------------------------

    def pre(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b n"]:
        """Pre-activations: the features before the sparsifying non-linearity."""
        raise NotImplementedError

    def encode(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b n"]:
        """Features of ``x``, never negative; differentiable with respect to ``x``."""
        raise NotImplementedError

    def decode(self, f: Float[Tensor, "*b n"]) -> Float[Tensor, "*b d"]:
        """The vector encoded by the features ``f``. Raises :class:`NoDecoder` if there is no decoder."""
        raise NoDecoder(
            f"head {self.name!r} ({self.kind}) has no decoder: its features can be read and edited "
            "in its own latent space, but not spliced back"
        )

    def forward(self, x: Float[Tensor, "*b d"]) -> Tensor:
        """The reconstruction of ``x`` at its original scale, or its features if there is no decoder.

        Equals ``sae(x)`` in the library of a foreign file: the input is normalised, the output scaled back.
        """
        rows, scale, shift = self.scaled_once(x)
        bare = self.bare()
        f = bare.encode(rows)
        if not self.has_decoder:
            return f
        recon = bare.decode(f)
        recon = recon if scale is None else recon * scale
        return recon if shift is None else recon + shift

    # -- input -----------------------------------------------------------------------------------------

    def prepare(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Checks width and finiteness of raw vectors, and normalises them as the head expects.

        Raises:
            ShapeMismatch: the last dimension is not ``d_in``.
            NotFinite: NaN, infinity, or (with ``normalize_input``) a row of zeros.
        """
        self.check_width(x)
        check_finite_rows(x, "input of head " + repr(self.name))
        rows, scale, _ = self.scaled(x)
        if scale is not None and bool((scale == 0).any()):
            fault, aim = (
                ("all zero", "unit norm") if self.normalize_input is True else ("constant", "layer norm")
            )
            raise NotFinite(
                f"expected input rows that can be given {aim}, got {int((scale == 0).sum())} of {scale.numel()} that are "
                f"{fault}; drop them or build the head with normalize_input=False"
            )
        return rows

    def scaled(
        self, x: Float[Tensor, "*b d"]
    ) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*b 1"] | None, Float[Tensor, "*b 1"] | None]:
        """Normalised rows, and the scale and shift of each that undo it (None: 1 and 0).

        A decoded vector ``v`` corresponds to ``v * scale + shift`` at the site. Nothing is checked.
        """
        if not self.normalize_input:
            return x, None, None
        if (
            self.normalize_input == "layer_norm"
        ):  # as in SAELens and ViT-Prisma, with 1e-5 only when normalising
            shift = x.mean(dim=-1, keepdim=True)
            scale = (x - shift).std(dim=-1, keepdim=True)
            return (x - shift) / (scale + 1e-5), scale, shift
        scale = x.norm(dim=-1, keepdim=True)
        return x / scale.clamp_min(torch.finfo(x.dtype).tiny), scale, None

    def scaled_once(
        self, x: Float[Tensor, "*b d"]
    ) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*b 1"] | None, Float[Tensor, "*b 1"] | None]:
        """Like :meth:`scaled`, but leaves rows that are already normalised unchanged, bit by bit.

        So :meth:`encode` gives the same features for raw vectors and for those returned by :meth:`prepare`.
        """
        rows, scale, shift = self.scaled(x)
        if scale is None:
            return x, None, None
        if shift is None:
            # Measured: x / |x| has a length within 8 eps of 1, in half precision within one.
            slack = (16 if x.dtype.itemsize > 2 else 1) * torch.finfo(x.dtype).eps
            there = (scale - 1).abs() <= slack
            return torch.where(there, x, rows), torch.where(there, 1, scale), None
        # scaled() leaves a deviation of s / (s + 1e-5), slightly below 1. A LayerNorm's own output has one above 1.
        there = (shift.abs() <= 1e-6) & (scale >= 1 - 1e-3) & (scale <= 1 + 1e-6)
        return torch.where(there, x, rows), torch.where(there, 1, scale), torch.where(there, 0, shift)

    def bare(self: H) -> H:
        """The same head, sharing all tensors, for rows that are already normalised."""
        twin = copy.copy(self)
        twin.normalize_input = False
        return twin

    def check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.d_in:
            raise ShapeMismatch(
                f"head {self.name!r}: expected vectors of width {self.d_in}, got shape "
                f"{tuple(x.shape)}; attach it where it was trained, or load the head of this site"
            )

    def check_reconstructs(self, what: str) -> None:
        """Raises for a head that predicts another site than it reads, whose prediction ``what`` would compare with its input."""
        if not self.reconstructs:
            raise MMHooksError(
                f"{what}: expected a head that reconstructs what it reads, got {self.name!r} ({self.kind}), which predicts "
                "another site; use mmhooks.heads.reconstruction.prediction(head, x, y)"
            )

    def check_features(self, f: Tensor) -> None:
        if f.shape[-1] != self.n_features:
            raise ShapeMismatch(
                f"head {self.name!r}: expected {self.n_features} features to decode, got shape {tuple(f.shape)}"
            )

    # -- identity and files ----------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """Constructor arguments, as JSON values."""
        return {"d_in": self.d_in, "n_features": self.n_features, "normalize_input": self.normalize_input}

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that ``info["sites"]`` (or ``"site"``) names: where a model attaches it without ``at=``."""
        named = self.info.get("sites") or self.info.get("site") or ()
        return (named,) if isinstance(named, str) else tuple(str(name) for name in named)

    @property
    def id(self) -> str:
        """``kind-<hash>`` of the configuration and the weights, rounded to half precision.

        Because of the rounding, a head and its fp16 file have the same id; moving it to another device, renaming it or
        adding to ``info`` does not change it.
        """
        state = self.state_dict()
        try:
            key = tuple((t.data_ptr(), t._version) for t in state.values())
        except RuntimeError:  # inference tensors have no version counter
            key = None
        if key is not None and self._id is not None and self._id[0] == key:
            return self._id[1]
        digest = blake2b(json.dumps([self.kind, self.config()], sort_keys=True).encode(), digest_size=6)
        for name in sorted(state):
            half = state[name].detach().to("cpu", torch.float16).contiguous()
            digest.update(f"{name}{tuple(half.shape)}".encode())
            digest.update(half.numpy().tobytes())
        self._id = (key, f"{self.kind}-{digest.hexdigest()}")
        return self._id[1]

    def save(self, path: str | Path, *, dtype: Literal["fp32", "fp16"] = "fp32") -> Path:
        """Writes ``config.json`` and ``model.safetensors`` into the directory ``path`` and returns it.

        Both contain digests that loading verifies (:mod:`mmhooks.heads.files`); a kill leaves the old head or the new.

        Raises:
            CannotWrite: a full disk, a read-only folder. MMHooksError: ``info`` is not JSON.
        """
        path = Path(path)
        target = {"fp32": torch.float32, "fp16": torch.float16}[dtype]
        state = {k: v.detach().to("cpu", target).contiguous() for k, v in self.state_dict().items()}
        about = {
            "format": FORMAT,
            "kind": self.kind,
            "name": self.name,
            "id": self.id,
            "config": self.config(),
        }
        write_head(path, about | {"info": self.info}, state)
        return path

    @classmethod
    def load(cls: type[H], path: str | Path, *, device: str | torch.device = "cpu") -> H:
        """Reads a head of this class from a directory written by :meth:`save`; :func:`load_head_dir` reads any kind.

        Raises:
            MissingWeights: no head in ``path``.
            MMHooksError: another kind of head, or weights that do not match the configuration.
        """
        head = load_head_dir(path, device=device)
        if not isinstance(head, cls):
            raise MMHooksError(
                f"{path}: expected a {cls.__name__}, got a {type(head).__name__}; load_head_dir reads any kind"
            )
        return head

    from_dir = load

    @classmethod
    def from_pretrained(
        cls: type[H],
        source: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> H:
        """A head of this class from a folder or a Hub repository ``owner/name``, in any supported format.

        Args:
            subfolder: folder or file inside it. options: what the file does not specify
                (:class:`mmhooks.heads.formats.Options`).

        Raises:
            MissingWeights: no head there, or no network and nothing cached.
            MMHooksError: a head of another class, or contents that do not fit.
        """
        from mmhooks.heads.hub import read_pretrained

        head = read_pretrained(
            source, inside=subfolder, revision=revision, cache_dir=cache_dir, token=token, options=options
        )
        if not isinstance(head, cls):
            raise MMHooksError(f"{source}: expected a {cls.__name__}, got a {type(head).__name__}")
        return head.to(device)

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool = False,
        format: Literal["mmhooks", "saelens"] = "mmhooks",
        dtype: Literal["fp32", "fp16"] = "fp16",
        subfolder: str | None = None,
        message: str | None = None,
        token: str | bool | None = None,
        licence: str | None = None,
        base_model: str | None = None,
        data: str | None = None,
    ) -> str:
        """Publishes the head as ``owner/name`` with a model card; returns the URL of the commit.

        Args:
            licence: of the weights, as the Hub calls it: ``"apache-2.0"``, ``"cc-by-4.0"``.
            base_model: whose vectors it reads: ``owner/name`` on the Hub. data: what it was trained on.
                Each is read from ``head.info`` by default, and a warning names those that are stated nowhere.

        Raises:
            MMHooksError: an invalid name, no token or no network; the message includes the Hub's own.
        """
        from mmhooks.heads.hub import push

        return push(
            self, repo, private=private, format=format, dtype=dtype, inside=subfolder, message=message, token=token,
            licence=licence, base_model=base_model, data=data,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.config().items())


def load_head_dir(path: str | Path, *, device: str | torch.device = "cpu") -> Head:
    """The head of any kind that :meth:`Head.save` wrote into the directory ``path``, in fp32.

    >>> import tempfile; from mmhooks.heads import TopKSAE, load_head_dir
    >>> sae = TopKSAE(8, 32, 4)
    >>> load_head_dir(sae.save(tempfile.mkdtemp())).id == sae.id
    True
    """
    path = Path(path)
    about, state, fault = read_head_files(path)
    where = path / CONFIG
    if about.get("kind") not in KINDS:
        raise MMHooksError(
            f"{where}: expected a kind of head among {', '.join(sorted(KINDS))}, got {about.get('kind')!r}"
        )
    if isinstance(about.get("format"), int) and about["format"] > FORMAT:
        raise MMHooksError(
            f"{where}: expected a format up to {FORMAT}, got {about['format']}; upgrade mmhooks"
        )
    check_about(about, where)
    head = build_without_weights(about["kind"], about["config"], where, name=about.get("name"))
    check_fit(head, state, str(path / WEIGHTS))
    if fault is not None:
        raise DamagedFile(fault)
    load_strictly(head, state, str(path / WEIGHTS))
    head.info = about.get("info") or {}
    if "digest" not in about:
        _check_id(head, about, state, path)
    return head.to(device).eval()


def _check_id(head: Head, about: dict[str, Any], state: dict[str, Tensor], path: Path) -> None:
    """Checks a file written before digests were stored by its id, which covers the weights in half precision."""
    for where, said in ((CONFIG, about.get("id")), (WEIGHTS, metadata_of(path / WEIGHTS).get("id"))):
        if said is not None and said != head.id:
            raise DamagedFile(
                f"{path} is not the head that was saved: {where} says {said}, but its weights and configuration have the "
                f"id {head.id}; download it again, or save it again with head.save(path)"
            )
    if any(t.dtype != torch.float16 for t in state.values()):
        warnings.warn(
            f"{path} was saved before heads stored digests: its weights were verified in half precision only. Save it "
            "again to have every bit verified",
            stacklevel=3,
        )


def build_without_weights(kind: str, config: dict[str, Any], where: str | Path, **options: Any) -> Head:
    """A head on torch's meta device, with shapes but without allocated weights.

    Raises:
        DamagedFile: ``config`` does not fit a head of this kind.
    """
    faults = faults_of_fields(config)
    known = {
        p for c in KINDS[kind].__mro__ if c is not object for p in inspect.signature(c.__init__).parameters
    }
    faults += [f"unknown field {name!r}" for name in config.keys() - known]
    faults += [f"no {name!r}" for name in ("d_in", "n_features") if name not in config]
    if not faults:
        try:
            with torch.device("meta"):
                return KINDS[kind](**config, **options)
        except Exception as error:
            faults = [first_line(error)]
    raise DamagedFile(f"{where} does not describe a {kind} head: {'; '.join(sorted(faults))}")
