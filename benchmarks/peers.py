"""The other libraries' TopK training steps, each by its own public code, behind one interface.

overcomplete and sparsify are imported where they are installed (``pip install "mmhooks[bench]"``). SAELens asks for
a TransformerLens below 4 and may live in an environment of its own, whose interpreter ``MMHOOKS_SAELENS_PYTHON``
names; it is served from a child process, one step a request:

    python -m venv peers-saelens && peers-saelens/bin/pip install sae-lens
    export MMHOOKS_SAELENS_PYTHON=peers-saelens/bin/python

What a library leaves to its user (optimiser, rate) is Adam at the rate of everyone else; whatever else belongs to
its step (gradient clipping, decoder norm, counters of dead features) is as its own trainer has it, logging off.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from typing import IO, Any, Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")


class Peer(Protocol):
    """A head under training: ``step`` trains on a batch, ``run`` gives reconstruction and activations."""

    name: str

    def step(self, x: Tensor) -> None: ...
    def run(self, x: Tensor) -> tuple[Tensor, Tensor]: ...
    def set_lr(self, lr: float) -> None: ...


class _Local:
    """What the three have in common: a module and its Adam."""

    def adam(self, parameters: Any, lr: float) -> torch.optim.Adam:
        self.optimizer = torch.optim.Adam(parameters, lr=lr)
        return self.optimizer

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr


class Overcomplete(_Local):
    """``overcomplete.sae.train_sae`` on one batch (it clips gradients and tracks dead codes)."""

    name = "overcomplete"

    def __init__(self, d: int, n: int, k: int, lr: float, data: Tensor, dead_steps: int) -> None:
        from overcomplete.sae import TopKSAE, train_sae

        self.sae, self.train = TopKSAE(d, nb_concepts=n, top_k=k), train_sae
        self.adam(self.sae.parameters(), lr)

    def step(self, x: Tensor) -> None:
        self.train(self.sae, [x], _mse, self.optimizer, nb_epochs=1, monitoring=0)

    @torch.no_grad()
    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.sae.eval()
        _, codes, back = self.sae(x)
        return back, codes > 0


def _mse(x: Tensor, back: Tensor, pre: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
    return (x - back).square().mean()


class Sparsify(_Local):
    """The inner loop of ``sparsify.Trainer``: unit decoder rows, FVU, projection, Adam, counters; AuxK on."""

    name = "sparsify"
    auxk_alpha = 1 / 32

    def __init__(self, d: int, n: int, k: int, lr: float, data: Tensor, dead_steps: int) -> None:
        from sparsify import SparseCoder
        from sparsify.config import SparseCoderConfig

        self.sae = SparseCoder(d, SparseCoderConfig(num_latents=n, k=k))
        self.sae.b_dec.data = data.mean(dim=0)
        self.adam(self.sae.parameters(), lr)
        self.silent, self.dead_steps = torch.zeros(n, dtype=torch.long), dead_steps

    def step(self, x: Tensor) -> None:
        self.sae.set_decoder_norm_to_unit_norm()
        out = self.sae(x, dead_mask=self.silent > self.dead_steps)
        (out.fvu + self.auxk_alpha * out.auxk_loss).backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.silent += 1
        self.silent[out.latent_indices.flatten()] = 0

    @torch.no_grad()
    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.sae(x)
        codes = x.new_zeros(len(x), self.sae.num_latents).scatter(1, out.latent_indices, out.latent_acts)
        return out.sae_out, codes > 0


class SAELens(_Local):
    """``TopKTrainingSAE.training_forward_pass`` and the rest of ``SAETrainer._train_step``."""

    name = "SAELens"

    def __init__(
        self, d: int, n: int, k: int, lr: float, data: Tensor, dead_steps: int, sparse: bool = False
    ) -> None:
        from sae_lens.saes.sae import TrainStepInput
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

        self.input = TrainStepInput
        self.sae = TopKTrainingSAE(
            TopKTrainingSAEConfig(
                d_in=d, d_sae=n, k=k, use_sparse_activations=sparse, rescale_acts_by_decoder_norm=not sparse
            )
        )
        self.adam(self.sae.parameters(), lr)
        self.silent, self.dead_steps, self.steps = torch.zeros(n), dead_steps, 0

    def step(self, x: Tensor) -> None:
        self.sae.train()
        out = self.sae.training_forward_pass(
            self.input(
                sae_in=x,
                dead_neuron_mask=(self.silent > self.dead_steps).bool(),
                coefficients={},
                n_training_steps=self.steps,
                is_logging_step=False,
            )
        )
        with torch.no_grad():
            fired = out.feature_acts.bool().float().sum(-2).bool()
            self.silent += 1
            self.silent[fired.to_dense() if fired.is_sparse else fired] = 0
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    @torch.no_grad()
    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.sae.eval()
        codes = self.sae.encode(x)
        return self.sae.decode(codes), codes.to_dense() > 0


class SAELensSparse(SAELens):
    """The same with its option ``use_sparse_activations`` (which fails beside its rescaling by decoder norm)."""

    name = "SAELens, sparse activations"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, sparse=True)


class Remote:
    """A peer in a child process of another environment; requests and answers are safetensors over pipes."""

    def __init__(self, python: str, kind: type[Any], *args: Any) -> None:
        self.name = kind.name
        *numbers, data, dead_steps = args
        self.child = subprocess.Popen(
            [
                python,
                __file__,
                kind.__name__,
                str(torch.get_num_threads()),
                *map(str, numbers),
                str(dead_steps),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": ""},
        )
        self._ask("start", data)

    def _ask(self, command: str, argument: Tensor) -> dict[str, Tensor]:
        assert self.child.stdin is not None and self.child.stdout is not None
        _write(self.child.stdin, {command: argument})
        answer = _read(self.child.stdout)
        if answer is None:
            raise RuntimeError(f"{self.name} ended; what it said stands above")
        return answer

    def step(self, x: Tensor) -> float:
        """Returns the seconds that the step itself took over there."""
        return float(self._ask("step", x)["seconds"])

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        answer = self._ask("run", x)
        return answer["back"], answer["active"]

    def set_lr(self, lr: float) -> None:
        self._ask("lr", torch.tensor(lr, dtype=torch.float64))

    def close(self) -> None:
        self.child.kill()
        self.child.wait()


def _write(pipe: IO[bytes], tensors: dict[str, Tensor]) -> None:
    payload = save({k: v.contiguous() for k, v in tensors.items()})
    pipe.write(len(payload).to_bytes(8, "big") + payload)
    pipe.flush()


def _read(pipe: IO[bytes]) -> dict[str, Tensor] | None:
    size = pipe.read(8)
    return load(pipe.read(int.from_bytes(size, "big"))) if size else None


KINDS: dict[str, type[Any]] = {k.__name__: k for k in (Overcomplete, Sparsify, SAELens, SAELensSparse)}


class _Remotely:
    """Builds a :class:`Remote` as a class of this environment would be built."""

    def __init__(self, python: str, kind: type[Any]) -> None:
        self.python, self.kind, self.name = python, kind, kind.name

    def __call__(self, *args: Any) -> Remote:
        return Remote(self.python, self.kind, *args)


def available() -> tuple[list[Any], list[str]]:
    """How each peer is built here, and a sentence for each that cannot be."""
    found: list[Any] = []
    missing: list[str] = []
    for kind, module, package in (
        (Overcomplete, "overcomplete", "overcomplete"),
        (Sparsify, "sparsify", "eai-sparsify"),
    ):
        if find_spec(module):
            found.append(kind)
        else:
            missing.append(f"{kind.name} left out: pip install {package}")
    if python := os.environ.get("MMHOOKS_SAELENS_PYTHON"):
        found += [_Remotely(python, kind) for kind in (SAELens, SAELensSparse)]
    else:
        missing.append(
            "SAELens left out: MMHOOKS_SAELENS_PYTHON names no interpreter (see benchmarks/peers.py)"
        )
    return found, missing


def _serve(kind: str, threads: str, d: str, n: str, k: str, lr: str, dead_steps: str) -> None:
    """The child's side of :class:`Remote`."""
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the library prints must not land among the answers
    peer: Any = None
    while (request := _read(sys.stdin.buffer)) is not None:
        ((command, argument),) = request.items()
        answer = {"done": torch.ones(1)}
        if command == "start":
            peer = KINDS[kind](int(d), int(n), int(k), float(lr), argument, int(dead_steps))
        elif command == "lr":
            peer.set_lr(float(argument))
        elif command == "step":
            begin = time.perf_counter()
            peer.step(argument)
            answer = {"seconds": torch.tensor(time.perf_counter() - begin, dtype=torch.float64)}
        else:
            answer = dict(zip(("back", "active"), peer.run(argument), strict=True))
        _write(answers, answer)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
