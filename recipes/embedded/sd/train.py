"""Train `mini-sd`, the Stable Diffusion pipeline that ships: 64 px drawings from their names. Resumable, on CPU cores.

    PYTHONPATH=recipes python -m embedded.corpus --node-modules node_modules --out runs/corpus
    PYTHONPATH=recipes python -m embedded.sd.train decoder --corpus runs/corpus --out runs/mini-sd
    OMP_NUM_THREADS=1 PYTHONPATH=recipes python -m embedded.sd.train unet --corpus runs/corpus --out runs/mini-sd --steps 4200
    PYTHONPATH=recipes python -m embedded.sd.evaluate --corpus runs/corpus --run runs/mini-sd

The latents are fixed, so the autoencoder's decoder and the U-Net are trained independently of each other, in any
order. Every step draws its random numbers from (seed, step): a run killed at any moment and started again ends with
the same weights. The learning rate of the U-Net is constant and falls linearly over the last 30 % of the steps; until
then a run may be resumed with another `--steps`. Two threads make a step twice as fast on an idle machine and ten
times slower on a busy one, where they wait for each other thousands of times per step.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from embedded.checkpoints import load_checkpoint, save_checkpoint, starting_point
from embedded.sd.drawings import TEMPLATES, choose, describe_drawings, on_white
from embedded.training import keep_plan, optimise, progress_bar, small_attention, update_average
from mmhooks.data.sources.drawings import Corpus
from mmhooks.models.embedded import mini_sd
from mmhooks.utils.files import write_text

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@dataclass(frozen=True)
class Plan:
    drawings: int = 512
    steps: int = 4200
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 200
    decay: float = 0.3  # share of the steps over which the rate falls to nothing
    dropout: float = 0.1  # of captions, for guidance
    tilt: float = 0.75  # below 1: more steps at high noise, where an image depends only on its prompt
    ema: float = 0.999
    seed: int = 0

    @property
    def falls_from(self) -> int:
        return self.steps - round(self.decay * self.steps)

    def lr_at(self, step: int) -> float:
        ramp = min(1.0, (step + 1) / self.warmup)
        fall = min(1.0, (self.steps - step) / max(1, self.steps - self.falls_from))
        return self.lr * ramp * max(0.0, fall)


@dataclass(frozen=True)
class TrainingData:
    """The drawings, and everything computed from them that training does not change."""

    names: list[str]
    pixels: Float[Tensor, "n 3 64 64"]
    mean: Float[Tensor, " 192"]
    basis: Float[Tensor, "k 192"]
    latents: Float[Tensor, "n k 8 8"]

    @classmethod
    def of(cls, corpus: Path, out: Path, count: int) -> TrainingData:
        """Builds it from the corpus the first time and stores it in ``out``; later runs read it from there."""
        file, names = out / "material.safetensors", out / "drawings.json"
        if not file.exists():
            found = Corpus(corpus)
            chosen = choose(found, count)
            pixels = on_white(found.rgba[chosen])
            mean, basis = principal_patches(pixels)
            out.mkdir(parents=True, exist_ok=True)
            kept = {"pixels": pixels, "mean": mean, "basis": basis}
            save_file({k: v.contiguous() for k, v in kept.items()}, file)
            write_text(names, json.dumps(describe_drawings(found, chosen), indent=1) + "\n")
        tensors = load_file(file)
        if len(tensors["pixels"]) != count:
            raise typer.BadParameter(
                f"expected {count} drawings, as in the plan, got {len(tensors['pixels'])} drawings in {out}; choose another --out"
            )
        vae: Any = mini_sd.autoencoder(tensors["mean"], tensors["basis"])
        with torch.no_grad():
            latents = vae.encode(tensors["pixels"]).latents * mini_sd.SCALING
        return cls([row["name"] for row in json.loads(names.read_text())], latents=latents, **tensors)

    @torch.no_grad()
    def texts(self) -> Float[Tensor, "n_plus_1 templates t d"]:
        """Returns the hidden states of every name in every template, followed by those of the empty prompt."""
        tokenizer, tower = mini_sd.tokenizer(), mini_sd.text_encoder()
        filled = [template.format(name) for name in self.names for template in TEMPLATES]
        ids = tokenizer([*filled, *[""] * len(TEMPLATES)], padding="max_length", truncation=True,
                        max_length=tokenizer.model_max_length, return_tensors="pt").input_ids  # fmt: skip
        states = torch.cat([tower(part)[0] for part in ids.split(256)])
        return states.unflatten(0, (-1, len(TEMPLATES)))


def principal_patches(
    pixels: Float[Tensor, "n 3 64 64"],
) -> tuple[Float[Tensor, " 192"], Float[Tensor, "k 192"]]:
    """Returns mean and basis of the latents.

    Each component is divided by the square root of its standard deviation, which whitens it half: without whitening,
    noise hides all but the first components; fully whitened, the last ones cost as much as the first.
    """
    patches = F.unfold((pixels + 1) / 2, mini_sd.PATCH, stride=mini_sd.PATCH).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T).double())
    spread = values.flip(0)[: mini_sd.LATENTS].sqrt()
    basis = (vectors.flip(1).T[: mini_sd.LATENTS] / spread[:, None].sqrt()).float()
    rms = ((patches - mean) @ basis.T).square().mean().sqrt()
    return mean, basis / rms / mini_sd.SCALING


class UNetTrainer:
    """The U-Net with its running average and optimiser; trains it step by step."""

    def __init__(self, material: TrainingData, plan: Plan, out: Path) -> None:
        self.plan, self.out, self.step = plan, out, 0
        torch.manual_seed(plan.seed)
        self.model = mini_sd.unet().to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.latents, self.texts = material.latents, material.texts()
        self.keep = mini_sd.scheduler().alphas_cumprod
        weights = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": weights, "weight_decay": plan.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=plan.lr, betas=(0.9, 0.99), fused=True)  # fmt: skip
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        shape = {k: v for k, v in asdict(plan).items() if k != "steps"}  # may change: keep_unet_plan
        self.started = starting_point(shape, [self.model], self.latents, self.texts)

    def rows(self) -> Int[Tensor, " b"]:
        """Returns the rows of the next step: every drawing once per epoch, in an order of the epoch's own."""
        n, batch, seed = len(self.latents), self.plan.batch, self.plan.seed
        at = torch.arange(self.step * batch, (self.step + 1) * batch)
        return torch.cat([
            torch.randperm(n, generator=torch.Generator().manual_seed(seed * 7919 + epoch))[at[at // n == epoch] % n]
            for epoch in range(int(at[0]) // n, int(at[-1]) // n + 1)
        ])  # fmt: skip

    def run_step(self) -> Float[Tensor, "4"]:
        """Takes one step; returns the mean loss in each quarter of the noise levels, clean to noisy."""
        plan = self.plan
        g = torch.Generator().manual_seed(plan.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr_at(self.step)
        rows = self.rows()
        b = len(rows)
        spoken = torch.where(torch.rand(b, generator=g) < plan.dropout, len(self.latents), rows)
        plainly = torch.rand(b, generator=g) < 0.4
        template = torch.randint(len(TEMPLATES), (b,), generator=g).masked_fill(plainly, 0)
        text = self.texts[spoken, template]
        levels = (torch.randperm(b, generator=g) + torch.rand(b, generator=g)) / b
        times = (levels**plan.tilt * len(self.keep)).long().clamp_(max=len(self.keep) - 1)
        signal = self.keep[times].sqrt().view(b, 1, 1, 1)
        spread = (1 - self.keep[times]).sqrt().view(b, 1, 1, 1)
        noise = torch.randn(self.latents[rows].shape, generator=g)
        clean = self.latents[rows]
        noisy = (signal * clean + spread * noise).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = self.model(noisy, times, text).sample
        losses = (velocity.float() - (signal * noise - spread * clean)).square().mean((1, 2, 3))
        loss = losses.mean()
        optimise(loss, self.model.parameters(), self.optimizer, self.step)
        self.step += 1
        update_average(self.average, self.model.state_dict(), plan.ema, self.step)
        quarter = times * 4 // len(self.keep)
        return torch.stack([losses.detach()[quarter == q].mean() for q in range(4)])

    def save(self) -> None:
        parts = {"average": self.average, "model": self.model.state_dict()}
        save_checkpoint(self.out / "unet.safetensors", self.step, parts, self.optimizer, self.started)

    def resume(self) -> None:
        self.step, parts = load_checkpoint(self.out / "unet.safetensors", self.optimizer, self.started)
        self.model.load_state_dict(parts["model"])
        for name, value in parts["average"].items():
            self.average[name].copy_(value)

    def fit(self, every: int = 100, save_every: int = 600) -> None:
        with progress_bar() as bar, (self.out / "curve.jsonl").open("a") as curve:
            task = bar.add_task("U-Net", total=self.plan.steps, completed=self.step, note="")
            began, recent = time.perf_counter(), []
            while self.step < self.plan.steps:
                recent.append(self.run_step())
                bar.update(task, completed=self.step, note=f"loss {recent[-1].nanmean():.3f}")
                done = self.step == self.plan.steps
                if self.step % every == 0 or done:
                    quarters = torch.stack(recent).nanmean(0)
                    seconds = time.perf_counter() - began
                    row = {"step": self.step, "loss": quarters.mean().item(), "by_noise": quarters.tolist(),
                           "samples_per_second": len(recent) * self.plan.batch / seconds}  # fmt: skip
                    curve.write(json.dumps(row) + "\n")
                    curve.flush()
                    began, recent = time.perf_counter(), []
                if self.step % save_every == 0 or done:
                    self.save()


def keep_unet_plan(plan: Plan, trainer: UNetTrainer, path: Path) -> None:
    """Writes the plan of a run; only its number of steps may change, until the learning rate begins to fall."""
    found = Plan(**json.loads(path.read_text())) if path.exists() else plan
    falls = trainer.step > min(found.falls_from, plan.falls_from)
    keep_plan(plan, path, changeable=() if falls else ("steps",))


def train_decoder(
    material: TrainingData, out: Path, *, steps: int, batch: int = 16, noise: float = 0.1, seed: int = 0
) -> float:
    """Trains the decoder to invert the linear encoder; returns the PSNR in dB over all drawings.

    A little noise is added to the latents, because the U-Net's latents are never exact.
    """
    torch.manual_seed(seed)
    vae = mini_sd.autoencoder(material.mean, material.basis).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    decoder, latents = vae.decoder.train(), material.latents / mini_sd.SCALING
    average = {k: v.detach().clone() for k, v in decoder.state_dict().items()}
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    with progress_bar() as bar:
        task = bar.add_task("decoder", total=steps, note="")
        for step in range(steps):
            ramp = min(1.0, (step + 1) / 50)
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * ramp * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            rows = torch.randint(len(latents), (batch,))
            strength = noise / mini_sd.SCALING * torch.rand(batch, 1, 1, 1)
            shown = latents[rows] + strength * torch.randn(batch, *latents.shape[1:])
            with torch.autocast("cpu", torch.bfloat16):
                drawn = decoder(shown.to(memory_format=torch.channels_last))
            wanted = material.pixels[rows]
            loss = (drawn.float() - wanted).square().mean() + 0.2 * (drawn.float() - wanted).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            update_average(average, decoder.state_dict(), 0.995, step)
            bar.update(task, advance=1, note=f"loss {loss.item():.4f}")
    decoder.load_state_dict(average)
    vae.eval()
    with torch.no_grad():
        drawn = torch.cat([vae.decode(part).sample for part in latents.split(32)]).clamp(-1, 1)
    psnr = -10 * ((drawn - material.pixels) / 2).square().mean().log10().item()
    save_file(
        {k: v.contiguous() for k, v in vae.state_dict().items()},
        out / "vae.safetensors",
        {"psnr": f"{psnr:.2f}"},
    )
    return psnr


Folder = Annotated[Path, typer.Option(help="folder made by embedded.corpus")]
Out = Annotated[Path, typer.Option(help="checkpoints and curve")]


@app.command()
def decoder(
    corpus: Folder = Path("runs/corpus"),
    out: Out = Path("runs/mini-sd"),
    drawings: int = Plan.drawings,
    steps: int = 2500,
    seed: int = 0,
) -> None:
    """Trains the autoencoder's decoder: PYTHONPATH=recipes python -m embedded.sd.train decoder --corpus runs/corpus"""
    psnr = train_decoder(TrainingData.of(corpus, out, drawings), out, steps=steps, seed=seed)
    typer.echo(f"{psnr:.2f} dB over {drawings} drawings; {out / 'vae.safetensors'}")


@app.command()
def unet(
    corpus: Folder = Path("runs/corpus"),
    out: Out = Path("runs/mini-sd"),
    drawings: int = Plan.drawings,
    steps: int = Plan.steps,
    batch: int = Plan.batch,
    lr: float = Plan.lr,
    seed: int = Plan.seed,
    save_every: int = 600,
) -> None:
    """Trains the U-Net: PYTHONPATH=recipes python -m embedded.sd.train unet --corpus runs/corpus --steps 4200"""
    fast_on_cpu()
    plan = Plan(drawings=drawings, steps=steps, batch=batch, lr=lr, seed=seed)
    trainer = UNetTrainer(TrainingData.of(corpus, out, drawings), plan, out)
    if (out / "unet.safetensors").exists():
        trainer.resume()
        typer.echo(f"resumed at step {trainer.step}")
    keep_unet_plan(plan, trainer, out / "plan.json")
    trainer.fit(save_every=save_every)


def fast_on_cpu() -> None:
    """Replaces fused attention and group norm: they took a third of a step in bfloat16 at 8 x 8 (.60 s on one core,
    .39 s with attention by its formula and group norm in fp32)."""
    small_attention()
    exact = F.group_norm

    def group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
        return exact(input.float(), num_groups, weight, bias, eps)

    F.group_norm = group_norm


if __name__ == "__main__":
    app()
