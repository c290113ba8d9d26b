"""Pre-training: one loop that trains an encoder by any objectives on recorded transitions, without reward."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rlrep_envs import EnvSpec
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from rlrep import runs
from rlrep.dataset import Dataset
from rlrep.encoders import Encoder, load_encoder, make_encoder
from rlrep.evaluate.collapse import collapse, has_collapsed
from rlrep.objectives import Objective, make_objective
from rlrep.types import Batch, CollapseWarning, RunError, to_tensor

CHECKPOINT = "checkpoint.safetensors"
N_OBSERVED = 1024
"""Held-out observations on which the features are described."""

Precision = Literal["auto", "float32", "bfloat16"]


def pretrain(
    data: Dataset | str | Path | Sequence[str | Path],
    *,
    out: str | Path,
    objectives: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = ("ae",),
    encoder: str | Mapping[str, Any] = "auto",
    updates: int = 5_000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    warmup: int = 500,
    clip: float = 10.0,
    held_out: float = 0.1,
    seed: int = 0,
    frame_stack: int | None = None,
    precision: Precision = "auto",
    device: str = "auto",
    log_every: int = 250,
    checkpoint_every: int = 1_000,
    overwrite: bool = False,
) -> Encoder:
    """Trains an encoder on recorded transitions, without ever reading their reward.

    The same call on an unfinished folder resumes it, with the result of an unbroken run; on a finished one it returns
    the encoder that is there.

    Args:
        data: A dataset, its folder or URL, or several.
        out: Run folder: the encoder in `encoder/`, `metrics.jsonl`, TensorBoard logs, a checkpoint while it runs.
        objectives: Objective specs, summed: `["ae", "inverse:weight=0.01"]`. Their losses differ in size: that of
            `ae` on pictures is some hundred times smaller than the others.
        encoder: Encoder spec; `auto` picks by the kind of observation.
        updates: Gradient steps.
        batch_size: Segments in a batch.
        learning_rate: Peak rate of AdamW, reached after `warmup` updates, then a cosine down to zero.
        weight_decay: Of AdamW.
        warmup: Updates of linear warm-up; at most a tenth of all is used.
        clip: Largest norm of the gradient.
        held_out: Fraction of the episodes kept for the held-out loss and the description of the features; 0 uses all
            for training, and describes the features on training data.
        seed: Of initialisation, batches and augmentation.
        frame_stack: Frames in one observation; what the environment spec of the data says unless given.
        precision: `auto` is bfloat16 where the machine computes convolutions faster in it.
        device: `auto` is a GPU if there is one.
        log_every: Updates between rows of metrics.
        checkpoint_every: Updates between checkpoints.
        overwrite: Start again, throwing away what another run left in `out`.

    Returns:
        The trained encoder, in evaluation mode.

    Raises:
        SpecError: Unknown objective, encoder or option.
        DatasetError: The data is missing, damaged, empty, or has too few episodes to hold any out.
        RunError: `out` is taken by something else, or the loss is not finite.
    """
    for name, value in {"updates": updates, "batch_size": batch_size, "log_every": log_every}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is a fraction of the episodes, from 0 to below 1, not {held_out}")
    dataset = _open(data, frame_stack)
    torch_device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    objectives = [objectives] if isinstance(objectives, str | Mapping) else list(objectives)
    settings = {
        "objectives": objectives,
        "encoder": encoder,
        "updates": updates,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "clip": clip,
        "held_out": held_out,
        "seed": seed,
        "frame_stack": dataset.frame_stack,
        "precision": precision,
        "data_digest": dataset.digest,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Built before the folder is touched: a wrong spec costs nothing.
        built = make_encoder(encoder, dataset.observation_space)
        objective = make_objective(objectives, built, dataset.action_space).to(torch_device)
        train, held = (dataset, dataset) if held_out == 0 else dataset.split(held_out, np.random.default_rng([seed, 0]))
        with runs.lock(Path(out)):
            run = runs.RunFolder(out, "pretrain", settings, seed=seed, overwrite=overwrite)
            if run.finished:
                return load_encoder(run.path / "encoder")
            built.provenance = {
                "env_spec": dataset.env_spec,
                "data_digest": dataset.digest,
                "reward_free_steps": dataset.n_transitions,
                "objectives": objectives,
                "updates": updates,
                **run.record["provenance"],
            }
            loop = _Loop(run, objective, train, held, torch_device, log_every, checkpoint_every)
            seconds, last = loop.run()
            built.provenance["pretrain_seconds"] = seconds
            encoder_folder = run.path / "encoder"
            runs.write_atomically(encoder_folder, lambda path: built.to("cpu").save_pretrained(path))
            run.finish(**last, seconds=seconds, encoder_digest=built.digest())
            (run.path / CHECKPOINT).unlink(missing_ok=True)
    return built.eval()


def _open(data: Dataset | str | Path | Sequence[str | Path], frame_stack: int | None) -> Dataset:
    """Opens the data with the frame stack asked for, or that its environment spec names."""
    if isinstance(data, Dataset):
        paths = list(data.paths)
        if frame_stack is None and data.frame_stack > 1:
            return data
    else:
        data = Dataset(*([data] if isinstance(data, str | Path) else data))
        paths = list(data.paths)
    if frame_stack is None:
        frame_stack = EnvSpec.parse(data.env_spec).frame_stack if data.env_spec else 1
    return data if frame_stack == data.frame_stack else Dataset(*paths, frame_stack=frame_stack)


def bfloat16_pays(device: torch.device) -> bool:
    """Whether `device` has instructions that make bfloat16 convolutions faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class _Loop:
    """The training loop of one run, from wherever its last checkpoint left off.

    Every update draws its batch and its noise from a stream of its own, (seed, update), so that a resumed run needs no
    generator state to repeat an unbroken one.
    """

    def __init__(
        self,
        run: runs.RunFolder,
        objective: Objective,
        train: Dataset,
        held: Dataset,
        device: torch.device,
        log_every: int,
        checkpoint_every: int,
    ) -> None:
        self.run_folder, self.objective, self.train, self.held, self.device = run, objective, train, held, device
        self.log_every, self.checkpoint_every = log_every, checkpoint_every
        settings = run.settings
        self.seed, self.updates = settings["seed"], settings["updates"]
        self.batch_size, self.clip = settings["batch_size"], settings["clip"]
        precision = settings["precision"]
        self.bfloat16 = precision == "bfloat16" or (precision == "auto" and bfloat16_pays(device))
        self.parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
        )
        warmup = max(1, min(settings["warmup"], self.updates // 10))
        self.schedule = lambda u: min((u + 1) / warmup, 0.5 * (1 + math.cos(math.pi * u / self.updates)))
        self.learning_rate = settings["learning_rate"]
        self.update, self.seconds = 0, 0.0
        self._held_batch: Batch | None = None
        self._warned = False

    def run(self) -> tuple[float, dict[str, float]]:
        """Trains to the end; returns the seconds it took and the last metrics."""
        from torch.utils.tensorboard import SummaryWriter

        self._restore()
        last: dict[str, float] = {}
        started = time.perf_counter() - self.seconds
        writer = SummaryWriter(str(self.run_folder.path / "tensorboard"), purge_step=self.update)
        bar = tqdm(total=self.updates, initial=self.update, desc="pretrain", unit="update", mininterval=0.5)
        with ThreadPoolExecutor(1) as loader, writer, bar:
            following = loader.submit(self._sample, self.update)
            try:
                while self.update < self.updates:
                    batch = following.result()
                    if self.update + 1 < self.updates:
                        following = loader.submit(self._sample, self.update + 1)
                    metrics = self._step(batch.to(self.device))
                    self.update += 1
                    bar.update()
                    if self.update % self.log_every == 0 or self.update == self.updates:
                        self.seconds = time.perf_counter() - started
                        last = self._report(metrics, writer)
                        bar.set_postfix(loss=f"{last['loss']:.3f}", rank=f"{last['effective_rank']:.1f}")
                    if self.update % self.checkpoint_every == 0:
                        self._save()
            except KeyboardInterrupt:
                self.seconds = time.perf_counter() - started
                self._save()
                print(f"\nstopped at update {self.update}; the same command goes on from there")
                raise
        return self.seconds, last

    def _sample(self, update: int) -> Batch:
        return self.train.sample(self.batch_size, self.objective.span, np.random.default_rng([self.seed, 1, update]))

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        torch.manual_seed(int(np.random.SeedSequence([self.seed, 2, self.update]).generate_state(1)[0]))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * self.schedule(self.update)
        self.objective.train()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            loss, metrics = self.objective(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.clip)
        if not math.isfinite(float(loss.detach())) or not math.isfinite(float(norm)):
            terms = ", ".join(f"{name}={float(value):.4g}" for name, value in metrics.items())
            raise RunError(
                f"the loss is {float(loss.detach()):.4g} and its gradient's norm {float(norm):.4g} "
                f"at update {self.update} ({terms}). Nothing of this update was kept. Try a lower learning_rate than "
                f"{self.learning_rate}, or check the data: rlrep data verify"
            )
        self.optimizer.step()
        self.objective.after_step()
        return metrics | {"loss": loss.detach(), "gradient_norm": norm.detach()}

    @torch.no_grad()
    def _report(self, metrics: dict[str, Tensor], writer: Any) -> dict[str, float]:
        """Evaluates on held-out episodes, logs a row, and warns where the features have collapsed."""
        self.objective.eval()
        if self._held_batch is None:
            n = min(self.batch_size, self.held.n_transitions)
            self._held_batch = self.held.sample(n, self.objective.span, np.random.default_rng([self.seed, 3]))
            observed = self.held.observations(N_OBSERVED, np.random.default_rng([self.seed, 4]))
            self._observed = to_tensor(observed, self.device)
        held_loss, _ = self.objective(self._held_batch.to(self.device))
        found = collapse(self.objective.encoder(self._observed))
        row = {name: float(value) for name, value in metrics.items()} | {
            "held_out_loss": float(held_loss),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **found,
        }
        if has_collapsed(found) and not self._warned:
            self._warned = True
            warnings.warn(
                f"the features have collapsed at update {self.update}: effective rank {found['effective_rank']:.2f} of "
                f"{self.objective.encoder.features_dim}, mean deviation {found['feature_std']:.4f}. A policy will not "
                "learn from them. Add a reconstruction ('ae') or 'inverse' term, or lower the learning rate.",
                CollapseWarning,
                stacklevel=2,
            )
        self.run_folder.log({"update": self.update, **row, "seconds": round(self.seconds, 3)})
        for name, value in row.items():
            writer.add_scalar(name, value, self.update)
        return row

    def _save(self) -> None:
        """Writes weights, targets, statistics and optimiser state in one file, atomically."""
        tensors = {f"model/{k}": v for k, v in (*self.objective.named_parameters(), *self.objective.named_buffers())}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{key}/{name}"] = value
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        metadata = {"update": str(self.update), "seconds": str(self.seconds)}
        runs.write_atomically(self.run_folder.path / CHECKPOINT, lambda path: save_file(tensors, path, metadata))

    def _restore(self) -> None:
        """Goes back to the last checkpoint, if there is one, and drops rows logged after it."""
        path = self.run_folder.path / CHECKPOINT
        if path.exists():
            with safe_open(path, framework="pt", device=str(self.device)) as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
            named = dict(self.objective.named_parameters()) | dict(self.objective.named_buffers())
            with torch.no_grad():
                for name, mine in named.items():
                    mine.copy_(tensors[f"model/{name}"])
            for name, parameter in self.parameters.items():
                state = {k.split("/")[1]: v for k, v in tensors.items() if k.endswith(f"/{name}") and k[0] == "o"}
                self.optimizer.state[parameter] = state
            self.update, self.seconds = int(metadata["update"]), float(metadata["seconds"])
        if self.run_folder.resumed:
            runs.trim_jsonl(self.run_folder.path / "metrics.jsonl", lambda row: row["update"] <= self.update)
