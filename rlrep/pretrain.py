"""Pre-training: one loop that trains an encoder by any objectives on recorded transitions, without reward."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import shutil
import sysconfig
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save, save_file
from torch import Tensor
from tqdm import tqdm

from rlrep import distributed, runs
from rlrep.dataset import Dataset, open_dataset, split
from rlrep.encoders import Encoder, load_encoder, make_encoder
from rlrep.evaluate.collapse import collapse, has_collapsed
from rlrep.evaluate.probes import Prober
from rlrep.objectives import Objective, make_objective
from rlrep.registry import SpecError
from rlrep.types import Batch, CollapseWarning, DatasetError, Metrics, RunError, to_tensor

CHECKPOINT = "checkpoint.safetensors"
N_OBSERVED = 1024
"""Held-out observations on which the features are described."""

Precision = Literal["auto", "float32", "bfloat16"]


def pretrain(
    data: Dataset | str | Path | Sequence[str | Path],
    *,
    out: str | Path,
    objectives: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] = ("cpc",),
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
    compile: bool | Literal["auto"] = "auto",
    device: str = "auto",
    budget: str | int = "auto",
    log_every: int = 250,
    checkpoint_every: int = 1_000,
    probe_every: int = 0,
    overwrite: bool = False,
) -> Encoder:
    """Trains an encoder on recorded transitions, without ever reading their reward.

    The same call on an unfinished folder resumes it, with the result of an unbroken run; on a finished one it returns
    the encoder that is there.

    Called by every process that `torchrun` started, it shares each batch among them, with the losses and the encoder
    of one process that has the whole batch. The first process writes; each gets the encoder.

    Args:
        data: A dataset, its folder or URL, or several.
        out: Run folder: the encoder in `encoder/`, a recurrent one in `belief/` where an objective trains one,
            `metrics.jsonl`, TensorBoard logs, a checkpoint while it runs.
        objectives: Objective specs, summed: `["ae", "inverse:weight=0.01"]`. Their losses differ in size: that of
            `ae` on pictures is some hundred times smaller than the others. The default is what did best of all in
            `runs/objectives`.
        encoder: Encoder spec; `auto` picks by the kind of observation.
        updates: Gradient steps.
        batch_size: Segments in a batch, shared equally where there are several processes.
        learning_rate: Peak rate of AdamW, reached after `warmup` updates, then a cosine down to zero.
        weight_decay: Of AdamW.
        warmup: Updates of linear warm-up; at most a tenth of all is used.
        clip: Largest norm of the gradient.
        held_out: Fraction of the episodes kept for the held-out loss and the description of the features; 0 uses all
            for training, and describes the features on training data.
        seed: Of initialisation, batches and augmentation.
        frame_stack: Frames in one observation; what the environment spec of the data says unless given.
        precision: `auto` is bfloat16 where the machine has instructions for it, and recorded in `run.json`.
        compile: Let `torch.compile` rewrite the objective, which takes it some seconds to minutes; the losses are the
            same but for rounding. `auto` does where that pays for itself, and it is recorded in `run.json`.
        device: `auto` is a GPU if there is one.
        budget: Memory for rows of data in each process: `auto` (half of what is available), `2GB`, or a number of
            bytes. A `Dataset` brings its own.
        log_every: Updates between rows of metrics.
        checkpoint_every: Updates between checkpoints.
        probe_every: Updates, a multiple of `log_every`, between linear probes of every ground-truth factor and of the
            next action, as `rlrep.probe` makes them; they are logged and change nothing. 0 for none.
        overwrite: Start again, throwing away what another run left in `out`.

    Returns:
        The trained encoder, in evaluation mode.

    Raises:
        SpecError: Unknown objective, encoder or option.
        DatasetError: The data is missing, damaged, empty, has too few episodes to hold any out, or `budget` is too
            small for the batches.
        RunError: `out` is taken by something else, the loss is not finite, or processes were started with other
            settings or data than the first.
    """
    counts = {"updates": updates, "batch_size": batch_size}
    for name, count in (counts | {"log_every": log_every, "checkpoint_every": checkpoint_every}).items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")
    for name, size in {"learning_rate": learning_rate, "clip": clip}.items():
        if not 0 < size < math.inf:
            raise ValueError(f"{name} must be positive and finite, not {size}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must not be negative, nor infinite, and it is {weight_decay}")
    if probe_every < 0 or probe_every % log_every:
        raise ValueError(f"probe_every must be a multiple of log_every={log_every}, or 0, not {probe_every}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is a fraction of the episodes, from 0 to below 1, not {held_out}")
    torch_device = distributed.local_device(device)
    distributed.join(torch_device)
    with torch.random.fork_rng(devices=[]):
        if batch_size % distributed.world_size():
            raise ValueError(
                f"a batch_size of {batch_size} cannot be shared equally by {distributed.world_size()} processes"
            )
        dataset = open_dataset(data, frame_stack, budget)
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
        if compile is True and (lacking := _cannot_compile(torch_device)):
            raise RunError(f"compile=True needs {lacking}, which is not so here: leave it at 'auto'")
        bfloat16 = precision == "bfloat16" or (precision == "auto" and bfloat16_pays(torch_device))
        chosen = {
            "precision": "bfloat16" if bfloat16 else "float32",
            "compiled": compiling_pays(torch_device, updates) if compile == "auto" else compile,
            "device": torch_device.type,
            "processes": distributed.world_size(),
        }
        torch.manual_seed(seed)
        # Built before the folder is touched: a wrong spec costs nothing.
        built = make_encoder(encoder, dataset.observation_space, dataset.action_space)
        if built.recurrent:
            raise SpecError(
                f"encoder {built.name!r} has a memory, and pretrain shapes the encoder of one observation: name that "
                "one, and an objective such as 'gru', which trains a recurrent encoder on it and saves it as belief/"
            )
        objective = make_objective(objectives, built, dataset.action_space).to(torch_device)
        train, held = split(dataset, held_out, seed)
        prober = Prober(dataset, seed=seed) if probe_every and distributed.rank() == 0 else None
        if (longest := int(dataset.table["length"].max())) <= objective.burn_in:
            raise DatasetError(
                f"nothing is learnt from the first burn_in={objective.burn_in} steps of a segment, and the longest "
                f"episode of {dataset} has {longest}: lower burn_in"
            )
        dataset.check_room(batch_size // distributed.world_size(), objective.span)
        if torch_device.type == "cuda":
            train = train.on(torch_device, budget=torch.cuda.mem_get_info(torch_device)[0] // 2)
        distributed.check_agreement({**settings, **chosen, "log_every": log_every})
        first = distributed.rank() == 0
        with runs.lock(Path(out)) if first else contextlib.nullcontext():
            # Only the first process writes; the others wait to hear whether there is anything to do.
            run = runs.RunFolder(out, "pretrain", settings, seed=seed, overwrite=overwrite) if first else None
            if distributed.broadcast(b"finished" if run and run.finished else b""):
                trained = load_encoder(run.path / "encoder") if run else built
                trained.load_state_dict(load_safetensors(distributed.broadcast(save(trained.state_dict()))))
                return trained.eval()
            loop = _Loop(run, settings, objective, train, held, torch_device, bfloat16, log_every, checkpoint_every)
            if chosen["compiled"]:
                # Random numbers are drawn as without it.
                loop.loss = torch.compile(objective, options={"fallback_random": True})
            loop.prober, loop.probe_every = prober, probe_every
            if run:
                built.provenance = {
                    "env_spec": dataset.env_specs if len(dataset.env_specs) > 1 else dataset.env_spec,
                    "data_digest": dataset.digest,
                    "reward_free_steps": dataset.n_transitions,
                    "objectives": objectives,
                    "updates": updates,
                    **run.record["provenance"],
                    **chosen,
                }
            seconds, last = loop.run()
            objective.to("cpu")
            if run:
                built.provenance["pretrain_seconds"] = seconds
                for name, made in {**objective.exports(), "encoder": built}.items():
                    made.provenance = built.provenance
                    runs.write_atomically(run.path / name, made.save_pretrained)
                run.finish(**last, **chosen, seconds=seconds, encoder_digest=built.digest())
                (run.path / CHECKPOINT).unlink(missing_ok=True)
            # Nobody returns before the encoder is on disk.
            distributed.broadcast(b"")
    return built.eval()


def bfloat16_pays(device: torch.device) -> bool:
    """Whether `device` has instructions for bfloat16: without them it takes twice as long as float32.

    A rule, and not a trial of both: what a run learns must not depend on how busy the machine was when it began.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def compiling_pays(device: torch.device, updates: int) -> bool:
    """Whether `torch.compile` saves more time than it takes: on a GPU, in a long run.

    There it takes 16 s to two minutes, and most objectives have got that back after 5,000 to 17,000 updates. On a CPU
    it gains a tenth, or nothing (`runs/speed`).
    """
    return device.type == "cuda" and updates >= 20_000 and not _cannot_compile(device)


def _cannot_compile(device: torch.device) -> str:
    """What `torch.compile` lacks; empty if nothing."""
    if distributed.world_size() > 1:
        return "a single process"
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "a C++ compiler such as g++"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers (the package python3-dev)"
    if device.type == "cuda" and not importlib.util.find_spec("triton"):
        return "the package triton"
    # What Triton asks for.
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return "a GPU of compute capability 7.0 or above"
    return ""


class _Loop:
    """The training loop of one run, from wherever its last checkpoint left off.

    Every update draws its batch and its noise from a stream of its own, (seed, update), so that a resumed run needs no
    generator state to repeat an unbroken one, and every process takes its rows of the same batch.
    """

    def __init__(
        self,
        run: runs.RunFolder | None,
        settings: Mapping[str, Any],
        objective: Objective,
        train: Dataset,
        held: Dataset,
        device: torch.device,
        bfloat16: bool,
        log_every: int,
        checkpoint_every: int,
    ) -> None:
        self.run_folder, self.objective, self.train, self.held, self.device = run, objective, train, held, device
        self.bfloat16, self.log_every, self.checkpoint_every = bfloat16, log_every, checkpoint_every
        self.seed, self.updates = settings["seed"], settings["updates"]
        self.batch_size, self.clip = settings["batch_size"], settings["clip"]
        self.parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
        )
        warmup = max(1, min(settings["warmup"], self.updates // 10))
        self.schedule = lambda u: min((u + 1) / warmup, 0.5 * (1 + math.cos(math.pi * u / self.updates)))
        self.learning_rate = settings["learning_rate"]
        self.update, self.seconds = 0, 0.0
        self.loss: Callable[[Batch], tuple[Tensor, Metrics]] = objective
        self.prober: Prober | None = None
        self.probe_every = 0
        self._held_batch: Batch | None = None
        self._warned = False

    def run(self) -> tuple[float, dict[str, float]]:
        """Trains to the end; returns the seconds it took and the last metrics."""
        self._restore()
        last: dict[str, float] = {}
        started = time.perf_counter() - self.seconds
        bar = tqdm(
            total=self.updates,
            initial=self.update,
            desc="pretrain",
            unit="update",
            mininterval=0.5,
            disable=self.run_folder is None,
        )
        with ThreadPoolExecutor(1) as loader, self._writer() as writer, bar, runs.deferred_interrupt() as interrupted:
            following = loader.submit(self._sample, self.update)
            while self.update < self.updates:
                batch = following.result()
                if self.update + 1 < self.updates:
                    following = loader.submit(self._sample, self.update + 1)
                metrics = self._step(batch)
                self.update += 1
                bar.update()
                self.seconds = time.perf_counter() - started
                if self.update % self.log_every == 0 or self.update == self.updates:
                    last = self._report(metrics, writer)
                    bar.set_postfix({k: f"{last[k]:.3g}" for k in ("loss", "effective_rank") if k in last})
                # A signal reaches the processes at different moments, and they must stop at the same update.
                stop = distributed.anywhere(interrupted.is_set()) and self.update < self.updates
                if stop or self.update % self.checkpoint_every == 0:
                    self._save()
                if stop:
                    if self.run_folder:
                        print(f"\nstopped at update {self.update}; the same command goes on from there")
                    raise KeyboardInterrupt
        return self.seconds, last

    def _writer(self) -> contextlib.AbstractContextManager[Any]:
        from torch.utils.tensorboard import SummaryWriter

        if self.run_folder is None:
            return contextlib.nullcontext()
        return SummaryWriter(str(self.run_folder.path / "tensorboard"), purge_step=self.update)

    def _sample(self, update: int) -> Batch:
        rng = np.random.default_rng([self.seed, 1, update])
        share = distributed.rank(), distributed.world_size()
        return self.train.sample(self.batch_size, self.objective.span, rng, share).to(self.device)

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        torch.manual_seed(int(np.random.SeedSequence([self.seed, 2, self.update]).generate_state(1)[0]))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * self.schedule(self.update)
        self.objective.train()
        with distributed.sharing():
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
                loss, metrics = self.loss(batch)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            distributed.average_([p.grad for p in self.parameters.values() if p.grad is not None])
            mean_loss = distributed.mean(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.clip)
        if not math.isfinite(float(mean_loss)) or not math.isfinite(float(norm)):
            terms = ", ".join(f"{name}={float(value):.4g}" for name, value in metrics.items())
            raise RunError(
                f"the loss is {float(mean_loss):.4g} and its gradient's norm {float(norm):.4g} "
                f"at update {self.update} ({terms}). Nothing of this update was kept. Try a lower learning_rate than "
                f"{self.learning_rate}, or check the data: rlrep data verify"
            )
        self.optimizer.step()
        self.objective.after_step()
        return metrics | {"loss": mean_loss, "gradient_norm": norm.detach()}

    @torch.no_grad()
    def _report(self, metrics: dict[str, Tensor], writer: Any) -> dict[str, float]:
        """Evaluates on held-out episodes, logs a row, and warns where the features have collapsed."""
        with distributed.sharing():
            values = distributed.mean(torch.stack([value.float() for value in metrics.values()]))
        if self.run_folder is None:
            return {}
        self.objective.eval()
        if self._held_batch is None:
            n = min(self.batch_size, self.held.n_transitions)
            self._held_batch = self.held.sample(n, self.objective.span, np.random.default_rng([self.seed, 3]))
            observed = self.held.observations(N_OBSERVED, np.random.default_rng([self.seed, 4]))
            self._observed = to_tensor(observed, self.device)
        held_loss, _ = self.objective(self._held_batch.to(self.device))
        found = collapse(self.objective.encoder(self._observed))
        row = dict(zip(metrics, values.tolist(), strict=True)) | {
            "held_out_loss": float(held_loss),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **found,
        }
        if self.prober and (self.update % self.probe_every == 0 or self.update == self.updates):
            scores = self.prober.linear(self.objective.encoder)
            row |= {f"probe/{name}": score for name, score in scores.items()}
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
        if self.run_folder is None:
            return
        tensors = {f"model/{k}": v for k, v in (*self.objective.named_parameters(), *self.objective.named_buffers())}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{key}/{name}"] = value
        tensors["update"] = torch.tensor(self.update)
        tensors["seconds"] = torch.tensor(self.seconds, dtype=torch.float64)
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        runs.write_atomically(self.run_folder.path / CHECKPOINT, lambda path: save_file(tensors, path))

    def _restore(self) -> None:
        """Goes back to the last checkpoint, if there is one, and drops rows logged after it."""
        path = self.run_folder.path / CHECKPOINT if self.run_folder else None
        if saved := distributed.broadcast(path.read_bytes() if path and path.exists() else b""):
            tensors = load_safetensors(saved)
            named = dict(self.objective.named_parameters()) | dict(self.objective.named_buffers())
            with torch.no_grad():
                for name, mine in named.items():
                    mine.copy_(tensors[f"model/{name}"])
            for name, parameter in self.parameters.items():
                state = {k.split("/")[1]: v for k, v in tensors.items() if k.endswith(f"/{name}") and k[0] == "o"}
                # AdamW keeps the count of its steps on the CPU.
                self.optimizer.state[parameter] = {
                    k: v if k == "step" else v.to(parameter.device) for k, v in state.items()
                }
            self.update, self.seconds = int(tensors["update"]), float(tensors["seconds"])
        if self.run_folder and self.run_folder.resumed:
            runs.trim_jsonl(self.run_folder.path / "metrics.jsonl", lambda row: row["update"] <= self.update)
