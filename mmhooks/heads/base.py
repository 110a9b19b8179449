"""What every sparse head is: an encoder of vectors into named features, a file format and a content id.

A head never touches a model. The splice (``mmhooks.hooks``) needs only ``pre``, ``encode``, ``decode`` and
``W_dec``; training and measures add ``prepare`` and the files below.
"""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmhooks.errors import MissingWeights, MMHooksError, NoDecoder, NotFinite, ShapeMismatch

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
KINDS: dict[str, type[Head]] = {}
H = TypeVar("H", bound="Head")


class Head(nn.Module):
    """Base of all heads: ``x [*b d_in] -> features [*b n_features]``, and back where there is a decoder.

    Subclasses set ``kind`` (registered for :func:`load_head_dir`), build their parameters and implement
    ``pre`` and ``encode``. A head whose ``normalize_input`` is true expects rows of unit norm, with
    ``"layer_norm"`` (foreign heads) rows of mean 0 and standard deviation 1: :meth:`prepare` makes them; the
    splice, training and measures call it (or do the same) themselves.

    Attributes:
        d_in, n_features: widths of the input and of the latent space.
        name: what its sites are called, ``<site>.<name>.latents``.
        info: free JSON (training data, seed, measures), kept in ``config.json``; not part of the id.
    """

    kind: ClassVar[str] = ""
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
            raise ShapeMismatch(f"a head needs d_in >= 1 and n_features >= 1, came {d_in} and {n_features}")
        self.d_in, self.n_features = d_in, n_features
        self.name = name or self.kind
        self.normalize_input = normalize_input
        self.info: dict[str, Any] = {}
        self._id: tuple[Any, str] | None = None

    # -- the interface of the splice -------------------------------------------------------------------

    def pre(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b n"]:
        """Pre-activations: what the features are before the sparsifying non-linearity."""
        raise NotImplementedError

    def encode(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b n"]:
        """Features of ``x``, never negative; differentiable to ``x``."""
        raise NotImplementedError

    def decode(self, f: Float[Tensor, "*b n"]) -> Float[Tensor, "*b d"]:
        """The vector that the features ``f`` stand for. Raises :class:`NoDecoder` where there is none."""
        raise NoDecoder(
            f"head {self.name!r} ({self.kind}) has no decoder: its features can be read and edited "
            "in its own latent space, not spliced back"
        )

    def forward(self, x: Float[Tensor, "*b d"]) -> Tensor:
        """``decode(encode(x))``, or the features themselves where there is no decoder."""
        f = self.encode(x)
        return self.decode(f) if self.has_decoder else f

    # -- input -----------------------------------------------------------------------------------------

    def prepare(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Checks width and finiteness of raw vectors and gives them unit norm if the head expects it.

        Raises:
            ShapeMismatch: the last dimension is not ``d_in``.
            NotFinite: NaN, infinity, or (with ``normalize_input``) a row of zeros.
        """
        self.check_width(x)
        check_finite(x, "input of head " + repr(self.name))
        rows, scale, _ = self.scaled(x)
        if scale is not None and bool((scale == 0).any()):
            fault, aim = (
                ("all zero", "unit norm") if self.normalize_input is True else ("constant", "layer norm")
            )
            raise NotFinite(
                f"{int((scale == 0).sum())} of {scale.numel()} input rows are {fault} and cannot be "
                f"given {aim}; drop them or build the head with normalize_input=False"
            )
        return rows

    def scaled(
        self, x: Float[Tensor, "*b d"]
    ) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*b 1"] | None, Float[Tensor, "*b 1"] | None]:
        """Rows as the head expects them, and the scale and shift of each that lead back (None: 1 and 0).

        A vector ``v`` that the head decodes stands for ``v * scale + shift``. Nothing is checked.
        """
        if not self.normalize_input:
            return x, None, None
        if self.normalize_input == "layer_norm":  # as SAELens and ViT-Prisma have it, 1e-5 on the way in only
            shift = x.mean(dim=-1, keepdim=True)
            scale = (x - shift).std(dim=-1, keepdim=True)
            return (x - shift) / (scale + 1e-5), scale, shift
        scale = x.norm(dim=-1, keepdim=True)
        return x / scale.clamp_min(torch.finfo(x.dtype).tiny), scale, None

    def check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.d_in:
            raise ShapeMismatch(
                f"head {self.name!r} reads vectors of width {self.d_in}, came shape "
                f"{tuple(x.shape)}; attach it where it was trained, or load the head of this site"
            )

    def check_features(self, f: Tensor) -> None:
        if f.shape[-1] != self.n_features:
            raise ShapeMismatch(
                f"head {self.name!r} decodes {self.n_features} features, came shape {tuple(f.shape)}"
            )

    # -- identity and files ----------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """Constructor arguments, as JSON values."""
        return {"d_in": self.d_in, "n_features": self.n_features, "normalize_input": self.normalize_input}

    @property
    def id(self) -> str:
        """``kind-<hash>`` of the configuration and the weights rounded to half precision.

        The rounding makes a head and its fp16 file one and the same head; moving it to another device,
        renaming it or adding to ``info`` changes nothing.
        """
        state = self.state_dict()
        try:
            key = tuple((t.data_ptr(), t._version) for t in state.values())
        except RuntimeError:  # inference tensors keep no version
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
        """Writes ``config.json`` and ``model.safetensors`` into the directory ``path`` and returns it."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        target = {"fp32": torch.float32, "fp16": torch.float16}[dtype]
        state = {k: v.detach().to("cpu", target).contiguous() for k, v in self.state_dict().items()}
        meta = {
            "format": FORMAT,
            "kind": self.kind,
            "name": self.name,
            "id": self.id,
            "config": self.config(),
        }
        save_file(state, path / WEIGHTS, metadata={"format": "pt", "id": self.id})
        (path / CONFIG).write_text(json.dumps(meta | {"info": self.info}, indent=1, sort_keys=True) + "\n")
        return path

    @classmethod
    def load(cls: type[H], path: str | Path, *, device: str | torch.device = "cpu") -> H:
        """Reads a directory written by :meth:`save`; :func:`load_head_dir` does so for any kind.

        Raises:
            MissingWeights: no head in ``path``.
            MMHooksError: another kind of head, or weights that disagree with the configuration.
        """
        head = load_head_dir(path, device=device)
        if not isinstance(head, cls):
            raise MMHooksError(
                f"{path} holds a {type(head).__name__}, not a {cls.__name__}; load_head_dir reads any kind"
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
        """A head of this class from a folder or a Hub repository ``owner/name``, in any format that is read.

        Args:
            subfolder: folder or file inside it. options: what the file leaves open
                (:class:`mmhooks.heads.formats.Options`).

        Raises:
            MissingWeights: nothing there, or no network and nothing cached.
            MMHooksError: another kind of head than this class, or contents that do not fit.
        """
        from mmhooks.heads.formats import Options, read_head
        from mmhooks.heads.hub import fetch

        path = Path(source)
        if path.exists():
            path = path / subfolder if subfolder else path
        else:
            path = fetch(str(source), inside=subfolder, revision=revision, cache_dir=cache_dir, token=token)
        head = read_head(path, Options(**options))
        if not isinstance(head, cls):
            raise MMHooksError(f"{source} holds a {type(head).__name__}, not a {cls.__name__}")
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
    ) -> str:
        """Publishes the head as ``owner/name`` with a model card; returns the address of the commit.

        Raises:
            MMHooksError: a bad name, no token or no network; the Hub's own words are in the message.
        """
        from mmhooks.heads.hub import push

        return push(
            self,
            repo,
            private=private,
            format=format,
            dtype=dtype,
            inside=subfolder,
            message=message,
            token=token,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.config().items())


def load_head_dir(path: str | Path, *, device: str | torch.device = "cpu") -> Head:
    """The head, of whatever kind, that :meth:`Head.save` wrote into the directory ``path``; in fp32.

    >>> import tempfile; from mmhooks.heads import TopKSAE, load_head_dir
    >>> sae = TopKSAE(8, 32, 4)
    >>> load_head_dir(sae.save(tempfile.mkdtemp())).id == sae.id
    True
    """
    import mmhooks.heads  # noqa: F401 - registers every kind

    path = Path(path)
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise MissingWeights(f"no head in {path}: expected {CONFIG} and {WEIGHTS}, as Head.save writes them")
    meta = json.loads((path / CONFIG).read_text())
    if meta.get("kind") not in KINDS:
        raise MMHooksError(
            f"{path / CONFIG}: unknown kind of head {meta.get('kind')!r}; known: {', '.join(sorted(KINDS))}"
        )
    if meta.get("format", 0) > FORMAT:
        raise MMHooksError(
            f"{path / CONFIG} has format {meta['format']}, this mmhooks reads up to {FORMAT}; upgrade it"
        )
    head = KINDS[meta["kind"]](**meta["config"], name=meta.get("name"))
    load_strictly(head, load_file(path / WEIGHTS), str(path / WEIGHTS))
    head.info = meta.get("info", {})
    return head.to(device).eval()


def load_strictly(head: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Loads ``state`` into ``head``; a missing, surplus or misshapen tensor raises, naming it."""
    own = head.state_dict()
    faults = [f"missing {k}" for k in own.keys() - state.keys()]
    faults += [f"unexpected {k}" for k in state.keys() - own.keys()]
    faults += [
        f"{k} is {list(state[k].shape)}, not {list(own[k].shape)}"
        for k in own.keys() & state.keys()
        if state[k].shape != own[k].shape
    ]
    if faults:
        raise MMHooksError(f"{where} does not fit a {type(head).__name__}: {'; '.join(sorted(faults))}")
    head.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()})


def check_finite(x: Tensor, what: str) -> None:
    """Raises :class:`NotFinite` with the number of bad rows and the first of them."""
    # The sum is finite for ordinary data and costs one pass without a temporary of x's size.
    if bool(torch.isfinite(x.sum())):
        return
    bad = ~torch.isfinite(x).reshape(-1, x.shape[-1]).all(dim=-1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise NotFinite(
            f"{what}: NaN or infinity in {int(bad.sum())} of {bad.numel()} rows, the first is row {first}; "
            "drop these rows or look at what made them"
        )
