"""Collecting: an explorer acts in N environments, without their reward, and everything they say goes to disk.

    environments -> Recorder -> [FrameStack] -> [LatentVecEnv] -> explorer                                 policy
    environments -> Recorder -> [FrameStack] -> [LatentVecEnv] -> IntrinsicReward(bonus) -> SB3 algorithm  rnd, e3b, ...
    environments -> Recorder -> [FrameStack] -> IntrinsicReward(bonus) -> [LatentVecEnv] -> SB3 algorithm  count, cbet

The recorder lies below everything else, so the disk holds raw environment data whatever the explorer saw.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, Space
from rlrep_envs import EnvSpec, FrameStack, make_vec_env
from safetensors.torch import load_file, save_file
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from tqdm import tqdm

from rlrep import runs, spaces
from rlrep.dataset import COMMIT, FORMAT_VERSION, META, PARTS, Dataset, DatasetWriter, check_ours
from rlrep.distributed import local_device
from rlrep.encoders import Encoder, RecurrentEncoder, load_encoder, make_encoder
from rlrep.evaluate.coverage import Coverage
from rlrep.explore import Actor, Bonus, Mixture, make_explorer
from rlrep.explore.base import beside, sample_actions
from rlrep.fanout import JobFailure, Send, map_jobs
from rlrep.intrinsic import Alongside, IntrinsicReward, WithContext
from rlrep.latent import FeaturesSpace, LatentVecEnv
from rlrep.recorder import Recorder, ground_truth
from rlrep.registry import nearest
from rlrep.sb3 import action_masks, check_settings, get_algorithm, policy_kwargs, policy_name
from rlrep.types import (
    Episode,
    RunError,
    SpaceError,
)

PPO_SETTINGS: dict[str, Any] = {
    "n_steps": 128,
    "batch_size": 256,
    "n_epochs": 4,
    "learning_rate": 1e-3,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "ent_coef": 0.01,
}
"""Of the policy that learns from a bonus, unless other `settings` are given; what is not here is SB3's default."""

OFF_POLICY_SETTINGS: dict[str, Any] = {"buffer_size": 20_000, "learning_starts": 1_000, "batch_size": 64}
"""A bonus in a replay buffer is that of its day: in a short one it is not yet out of date."""

SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": PPO_SETTINGS,
    "maskableppo": PPO_SETTINGS,
    "recurrentppo": PPO_SETTINGS,
    "a2c": {"n_steps": 16, "gae_lambda": 0.95, "ent_coef": 0.01},
    "dqn": OFF_POLICY_SETTINGS | {"learning_rate": 5e-4, "gradient_steps": 4, "target_update_interval": 1_000},
    "qrdqn": OFF_POLICY_SETTINGS | {"learning_rate": 5e-4, "gradient_steps": 4, "target_update_interval": 1_000},
}
"""The same for other algorithms; those that learn off-policy and are not here have `OFF_POLICY_SETTINGS`."""

TRAIN_EVERY = 128
"""Steps of each environment between trainings of the bonus, beside an algorithm that has no roll-outs."""

UNTIL = ("observations", "states", "episodes")
"""What coverage can be waited for."""

EXPLORER, POLICY, BONUS, RECORD = "explorer", "policy.zip", "bonus.safetensors", "explorer.json"
METRICS, COVERAGE = "metrics.jsonl", "coverage.json"


def collect(
    env: str | Mapping[str, Any] | EnvSpec | VecEnv,
    *,
    out: str | Path,
    explorer: str | Mapping[str, Any] = "random",
    steps: int = 100_000,
    n_envs: int = 16,
    seed: int = 0,
    episodic: bool = False,
    features: str | Path | Encoder | None = None,
    encoder: str | Mapping[str, Any] = "auto",
    algorithm: str = "ppo",
    settings: Mapping[str, Any] | None = None,
    until: str | None = None,
    device: str = "auto",
    checkpoint_every: int = 10_000,
    n_workers: int = 1,
    ray: str | None = None,
    overwrite: bool = False,
) -> Dataset:
    """Explores an environment without its reward, and records everything it says.

    The same call on a folder goes on from the last checkpoint until `steps` are there, and a larger `steps` adds to it;
    environments and chance then start anew, so the data differ from those of an unbroken run.

    Args:
        env: Environment spec; or environments you made, then `n_envs` is theirs.
        out: Dataset folder. `explorer/` in it has the coverage over time and, where a policy learnt, the policy.
        explorer: What acts, `random` or `policy:PATH`; or a bonus that rewards a policy for what is new, such as
            `noveld`; a product of bonuses, `e3b*rnd`; or a mixture that shares the environments,
            `random:0.2+noveld:0.8`.
        steps: Environment steps in the dataset, all environments together, rounded up to a multiple of `n_envs`.
        n_envs: Environments stepped together.
        seed: Of networks and actions; environment i has the seed `seed * n_envs + i`.
        episodic: Whether returns of a bonus stop where episodes do; see `IntrinsicReward` for why they do not.
        features: Pre-trained encoder, or its folder. The policy then sees its features, computed once a step, and so
            does the bonus, unless it counts exact observations. Raw observations are recorded all the same. In the
            folder of a run, that is the encoder of single observations; name its `belief` for one that remembers.
        encoder: Spec of the exploring policy's own network.
        algorithm: What learns from the bonus, by its name in SB3 or sb3-contrib. Off-policy ones learn from bonuses as
            they were when paid. A recurrent policy remembers across episodes unless `episodic`.
        settings: Arguments of the algorithm, over those in `SETTINGS`.
        until: Stop before `steps` once coverage reaches this, `states=5000` or `observations=20000`; looked at every
            `checkpoint_every` steps.
        device: Where policy and bonus compute; `auto` is a GPU if there is one.
        checkpoint_every: Steps between commits to disk, checkpoints of the explorer and rows of coverage. An episode is
            committed after it has ended.
        n_workers: Processes, a core each, that explore side by side with explorers, environments and seeds of their
            own. Each writes `out/worker-I`, and `out` is read as one dataset. One that dies is started again, and goes
            on from what it had committed.
        ray: Where the workers run: `local` or the address of a Ray cluster (`HOST:PORT`, `auto`), whose nodes have
            rlrep installed and share the file system that `out` lies on; on this machine, without Ray, unless given.
        overwrite: Start again, throwing away what is in `out`.

    Returns:
        The dataset.

    Raises:
        SpecError: Unknown explorer, encoder or option.
        SpaceError: Explorer, algorithm or features cannot work in this environment.
        RunError: `out` was collected with other settings or by another number of workers, or a worker failed.
        ClusterError: The Ray cluster cannot be reached.
        DatasetError: `out` holds something else, or cannot be written.
        ValueError: An unknown environment, or a number out of range.
    """
    call = {name: value for name, value in locals().items() if name not in ("n_workers", "ray")}
    if n_workers < 1:
        raise ValueError(f"n_workers must be at least 1, not {n_workers}")
    _check_layout(Path(out), n_workers, overwrite)
    if n_workers > 1 or ray is not None:
        return _side_by_side(call, Path(out), n_workers, ray)
    if overwrite and check_ours(Path(out)):
        try_out(call)
        _throw_away(Path(out))
    return _collect(**call)[0]


def _collect(
    env: str | Mapping[str, Any] | EnvSpec | VecEnv,
    *,
    out: str | Path,
    explorer: str | Mapping[str, Any],
    steps: int,
    n_envs: int,
    seed: int,
    episodic: bool,
    features: str | Path | Encoder | None,
    encoder: str | Mapping[str, Any],
    algorithm: str,
    settings: Mapping[str, Any] | None,
    until: str | None,
    device: str,
    checkpoint_every: int,
    overwrite: bool,
    follow: Callable[[int], None] | None = None,
) -> tuple[Dataset, Coverage | None]:
    """Is `collect` with one worker; returns the coverage too, unless all was there.

    With `follow`, nothing is shown or printed: it is told instead, every now and then, how many steps there are.
    """
    for name, value in {"steps": steps, "n_envs": n_envs, "checkpoint_every": checkpoint_every}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, and it is {seed}")
    out, device = Path(out), str(local_device(device))
    goal = _goal(until)
    frozen = load_encoder(features) if features is not None else None
    spec = None if isinstance(env, VecEnv) else EnvSpec.parse(env)
    asked: dict[str, Any] = {
        "env": None if spec is None else str(spec),
        "explorer": explorer,
        "n_envs": env.num_envs if isinstance(env, VecEnv) else n_envs,
        "seed": seed,
        "episodic": episodic,
        "features": None if frozen is None else {"name": frozen.name, "digest": frozen.digest()},
        "encoder": encoder,
        "algorithm": algorithm,
        "settings": dict(settings or {}),
    }
    try:
        json.dumps(asked, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"what is collected with is recorded with the data, so it must be plain values: {error}"
        ) from error
    done = 0 if overwrite else _committed(out, asked)
    if done >= steps:
        if follow is None:
            print(f"{out} already holds {done:,} steps")
        return Dataset(out), None
    # Environments of different seeds have no layout in common, and whoever goes on does not begin with known ones.
    chance = np.random.SeedSequence([seed, done])
    first_seed = int(chance.generate_state(1)[0] >> 1) if done else seed * asked["n_envs"]
    with contextlib.ExitStack() as stack, torch.random.fork_rng(devices=[]):
        if isinstance(env, VecEnv):
            venv, n_stack = env, 1
        else:
            single = dataclasses.replace(cast(EnvSpec, spec), frame_stack=1)
            venv, n_stack = make_vec_env(single, n_envs, first_seed), cast(EnvSpec, spec).frame_stack
            stack.callback(venv.close)
        # All that can be wrong with what was asked is found before the folder is touched.
        seen = FrameStack(venv, n_stack).observation_space if n_stack > 1 else venv.observation_space
        shown = seen
        if frozen is not None:
            spaces.check_same(seen, frozen.observation_space, "the encoder for `features` was made for observations")
            if isinstance(frozen, RecurrentEncoder):
                spaces.check_same(
                    venv.action_space, frozen.action_space, "the encoder for `features` was made for actions"
                )
            shown = FeaturesSpace(frozen)
        torch.manual_seed(first_seed)
        built = make_explorer(explorer, shown, venv.action_space, venv.num_envs)
        bonus = built.bonus if isinstance(built, Mixture) else built if isinstance(built, Bonus) else None
        if bonus is not None and not bonus.scores_features and frozen is not None:
            torch.manual_seed(first_seed)
            built = make_explorer(explorer, seen, venv.action_space, venv.num_envs)
            bonus = built.bonus if isinstance(built, Mixture) else cast(Bonus, built)
        learner = _settings(algorithm, settings, built, bonus, venv.action_space)
        network = None
        if bonus is not None:
            network = make_encoder(encoder, beside(shown, bonus.context) if bonus.context else shown)
        venv.seed(first_seed)
        venv.reset()
        factor_names = list(ground_truth(venv))
        venv.seed(first_seed)
        if "states" in goal and not factor_names:
            raise ValueError("until: this environment tells no ground truth, and so no states; wait for observations")
        interrupted = stack.enter_context(runs.deferred_interrupt())
        writer = stack.enter_context(
            DatasetWriter(
                out,
                venv.observation_space,
                venv.action_space,
                env_spec=None if spec is None else str(spec.task),
                factor_names=factor_names,
                collector=asked,
                overwrite=overwrite,
                flush_every=checkpoint_every,
            )
        )
        session = _Session(out, writer, steps, checkpoint_every, interrupted, goal, follow)
        recorder = session.recorder = Recorder(venv, session, seed=first_seed)
        top: VecEnv = FrameStack(recorder, n_stack) if n_stack > 1 else recorder
        rng = np.random.default_rng(chance)
        if frozen is not None and (bonus is None or bonus.scores_features):
            top = LatentVecEnv(top, frozen, device=device)
        if isinstance(built, Mixture) and bonus is not None:
            top = Alongside(top, built, np.random.default_rng([first_seed, 2]))
        with session:
            if session.reached:
                pass
            elif bonus is None:
                _act(session, cast(Actor, built), top, rng)
            else:
                if bonus.context:
                    top = WithContext(top, bonus.context, np.random.default_rng([first_seed, 3]))
                rewarded = top = IntrinsicReward(
                    top,
                    bonus,
                    rng=rng,
                    gamma=learner["gamma"],
                    episodic=episodic,
                    train_every=_roll_out(algorithm, learner),
                    device=device,
                )
                if frozen is not None and not bonus.scores_features:
                    top = LatentVecEnv(top, frozen, device=device)
                _learn(session, top, rewarded, cast(Encoder, network), algorithm, learner, first_seed)
            recorder.finish()
    session.summarise(asked["explorer"])
    return Dataset(out), session.coverage


def _check_layout(out: Path, n_workers: int, overwrite: bool) -> None:
    """Checks that `out` holds nothing but a dataset, and, unless that is to go, one of as many workers."""
    check_ours(out)
    if overwrite:
        return
    found = n_workers
    if (out / PARTS).exists():
        found = len(runs.read_json(out / PARTS)["parts"])
    elif (out / META).exists():
        found = 1
    if found != n_workers:
        raise RunError(
            f"{out} was collected with n_workers={found}, asked for {n_workers}. "
            "Keep the number, choose another folder, or pass overwrite to start again."
        )


def try_out(call: Mapping[str, Any]) -> None:
    """Collects a step into a folder of its own, so that all that can be wrong is found before anything is touched.

    Args:
        call: Arguments of `collect`, all but those that say where it happens.
    """
    with tempfile.TemporaryDirectory(prefix="rlrep-") as folder:
        _collect(**{**call, "out": Path(folder) / "data", "steps": 1, "overwrite": False}, follow=lambda steps: None)


def _throw_away(out: Path) -> None:
    """Empties a folder that holds a dataset, of one worker or several; one of anything else is an error."""
    with runs.lock(out):
        left = check_ours(out)
        # What says that it is ours goes last, and what says that there is something to read first.
        for name in sorted(left, key=lambda name: (name in (META, PARTS), name != COMMIT)):
            shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()


def _side_by_side(call: dict[str, Any], out: Path, n_workers: int, ray: str | None) -> Dataset:
    """Lets several workers collect a share of the steps each, and says what they reached together."""
    if isinstance(call["env"], VecEnv):
        raise ValueError("several workers make their environments themselves: pass an environment spec, not a VecEnv")
    if call["until"] is not None and n_workers > 1:
        raise ValueError("until cannot be looked at by several workers, who see their own coverage only: leave it out")
    steps = call["steps"]
    if steps < n_workers:
        raise ValueError(f"steps must be at least 1 for each of the {n_workers} workers, not {steps} in all")
    try_out(call)
    if call["overwrite"]:
        _throw_away(out)
    names = [f"worker-{i}" for i in range(n_workers)]
    jobs = [
        call
        | {
            "env": str(EnvSpec.parse(call["env"])),
            "out": str((out / name if n_workers > 1 else out).resolve()),
            "steps": steps // n_workers + (i < steps % n_workers),
            "seed": call["seed"] * n_workers + i,
            # One that starts again must find what it wrote.
            "overwrite": False,
        }
        for i, name in enumerate(names)
    ]
    reached: dict[str, int] = {}
    failures: list[str] = []
    coverage = Coverage()
    with contextlib.ExitStack() as stack:
        if n_workers > 1:
            stack.enter_context(runs.lock(out))
            runs.write_json(out / PARTS, {"format_version": FORMAT_VERSION, "parts": names})
        workers = f"collect ({n_workers} workers)"
        bar = stack.enter_context(tqdm(total=steps, desc=workers, unit="step", unit_scale=True, mininterval=0.5))

        def receive(job: Mapping[str, Any], steps: int) -> None:
            reached[job["out"]] = steps
            bar.update(sum(reached.values()) - bar.n)

        try:
            for job, found in map_jobs(_collect_share, jobs, n_workers, ray=ray, receive=receive):
                if isinstance(found, JobFailure):
                    failures.append(f"{Path(job['out']).name}: {found.error}")
                else:
                    coverage.include(found)
        except KeyboardInterrupt:
            print(f"stopped at about {sum(reached.values()):,} steps; the same command goes on from what is on disk")
            raise
    if failures:
        raise RunError(
            f"{len(failures)} of {n_workers} workers failed; {failures[0]}. What was committed is there, and the same "
            "command goes on from it."
        )
    figures = coverage.figures()
    runs.write_json(out / EXPLORER / COVERAGE, figures)
    print(f"{call['explorer']}: {describe(figures)}")
    return Dataset(out)


def _collect_share(job: Mapping[str, Any], send: Send) -> Coverage:
    """What one of several workers does."""
    data, coverage = _collect(**job, follow=send)
    if coverage is None:
        coverage = Coverage()
        # One at a time: all together may not fit memory.
        for episode in data:
            coverage.add(episode)
    return coverage


def _committed(out: Path, asked: Mapping[str, Any]) -> int:
    """Returns how many steps are in `out`, once it is clear that they were collected with the settings asked for."""
    if not (out / COMMIT).exists():
        return 0
    found = runs.read_json(out / META)["writers"][-1]["collector"]
    if not isinstance(found, Mapping):
        raise RunError(f"{out} holds a dataset that was not collected but written by {found!r}; choose another folder")
    if changed := runs.differences(json.loads(json.dumps(asked)), found):
        raise RunError(
            f"{out} was collected with other settings: {'; '.join(changed)}. "
            "Choose another folder, or pass overwrite to start again."
        )
    record = runs.read_json(out / COMMIT)
    return record["rows"] - record["episodes"]


def _settings(
    algorithm: str,
    settings: Mapping[str, Any] | None,
    explorer: Actor | Bonus,
    bonus: Bonus | None,
    action_space: Space,
) -> dict[str, Any]:
    """Returns the settings of what learns from `bonus`, with the discount among them.

    Raises:
        SpecError: There is no such algorithm.
        ValueError: It has no such setting, or nothing learns.
        SpaceError: It cannot take these actions.
    """
    cls, name = get_algorithm(algorithm), algorithm.lower()
    if settings and bonus is None:
        raise ValueError(f"explorer {explorer.name!r} learns nothing, and `settings` are for the policy that does")
    check_settings(cls, settings or {})
    off_policy = issubclass(cls, OffPolicyAlgorithm)
    suitable = Discrete if name in ("dqn", "qrdqn") else Box
    if bonus is not None and off_policy and not isinstance(action_space, suitable):
        raise SpaceError(f"{cls.__name__} takes {suitable.__name__} actions, and these are {action_space}; use PPO")
    default = SETTINGS.get(name, OFF_POLICY_SETTINGS if off_policy else {})
    gamma = inspect.signature(cls).parameters["gamma"].default
    return {"gamma": gamma} | default | dict(settings or {})


def _roll_out(algorithm: str, settings: Mapping[str, Any]) -> int:
    """Returns the steps of each environment between trainings of the bonus: a roll-out, if there are any."""
    # Off-policy, `n_steps` is how far a return looks ahead.
    off_policy = issubclass(get_algorithm(algorithm), OffPolicyAlgorithm)
    return TRAIN_EVERY if off_policy else settings.get("n_steps", TRAIN_EVERY)


def _goal(until: str | None) -> dict[str, int]:
    """Returns what `until` waits for, `{"states": 5000}`.

    Raises:
        ValueError: It is not written so, or there is nothing of the kind.
    """
    goal = {}
    for part in until.split(",") if until else []:
        name, _, number = part.strip().partition("=")
        if name not in UNTIL or not number.isdigit() or int(number) < 1:
            raise ValueError(
                f"until={until!r} is not understood: write states=5000; it waits for {', '.join(UNTIL)}."
                f"{nearest(name, UNTIL)}"
            )
        goal[name] = int(number)
    return goal


def _act(session: _Session, actor: Actor, env: VecEnv, rng: np.random.Generator) -> None:
    """Lets an actor act until the session ends."""
    obs, first, more = env.reset(), np.ones(env.num_envs, bool), True
    while more:
        obs, _, first, _ = env.step(actor.act(obs, first, rng))
        more = session.step()


def _learn(
    session: _Session,
    env: VecEnv,
    rewarded: IntrinsicReward,
    network: Encoder,
    algorithm: str,
    settings: dict[str, Any],
    seed: int,
) -> None:
    """Lets an algorithm learn from the bonus until the session ends; first, random steps settle the statistics."""
    extra = dict(settings.pop("policy_kwargs", {}))
    cls = get_algorithm(algorithm)
    try:
        model = cls(
            policy_name(cls, env.observation_space),
            env,
            policy_kwargs=policy_kwargs(network, algorithm, mode="scratch", **extra),
            seed=seed,
            device=rewarded.device,
            **settings,
        )
    except (AssertionError, TypeError) as error:
        raise ValueError(f"{cls.__name__} cannot be made with {settings}: {error}") from error
    masks, options = action_masks(algorithm, env)
    rng = np.random.default_rng([seed, 1])
    if not session.restore(rewarded, model):
        obs = env.reset()
        for _ in range(rewarded.bonus.warmup):
            if masks is None:
                actions = sample_actions(env.action_space, env.num_envs, rng)
            else:
                # Untrained, it draws evenly among the actions that are allowed.
                actions = cast(Any, model).predict(obs, action_masks=masks(env))[0]
            obs = env.step(actions)[0]
            if not session.step():
                return
    model.learn(session.steps, callback=_Callback(session), **options)


class _Session:
    """One call of `collect`: how far it got, what it reached, and what it saves as it goes."""

    def __init__(
        self,
        out: Path,
        writer: DatasetWriter,
        steps: int,
        checkpoint_every: int,
        interrupted: threading.Event,
        goal: Mapping[str, int],
        follow: Callable[[int], None] | None = None,
    ) -> None:
        self.writer, self.steps, self.checkpoint_every = writer, steps, checkpoint_every
        self._goal = goal
        self.folder = out / EXPLORER
        self.folder.mkdir(exist_ok=True)
        for left in self.folder.glob(".*"):
            # What a writer that was killed had not renamed yet.
            shutil.rmtree(left)
        self.recorder: Recorder
        self.env: IntrinsicReward | None = None
        self.model: BaseAlgorithm | None = None
        self.coverage = Coverage()
        self.before = writer.n_transitions
        if self.before:
            for episode in Dataset(out):
                self.coverage.add(episode)
            runs.trim_jsonl(self.folder / METRICS, lambda row: row["steps"] <= self.before)
        self._next = self.checkpoint_every
        self.quiet = follow is not None
        bar: dict[str, Any] = {"total": steps, "initial": self.before, "desc": "collect", "mininterval": 0.5}
        bar |= {"unit": "step", "unit_scale": True}
        self._bar = tqdm(**bar) if follow is None else _ToldBar(follow, **bar)
        self._interrupted = interrupted
        self._started = time.perf_counter()

    def add(self, episode: Episode) -> None:
        """Takes an episode from the recorder."""
        self.writer.add(episode)
        self.coverage.add(episode)

    def step(self) -> bool:
        """Called after every step of the environments; returns whether there is one more to take."""
        self._bar.update(self.recorder.num_envs)
        if self._interrupted.is_set():
            self.recorder.finish()
            raise KeyboardInterrupt
        if self.before + self.recorder.steps >= self.steps:
            return False
        if self.recorder.steps >= self._next:
            self._next += self.checkpoint_every
            self.checkpoint()
            return not self.reached
        return True

    @property
    def reached(self) -> bool:
        """Whether coverage has reached what was to be waited for."""
        figures = self.coverage.figures() if self._goal else {}
        return bool(self._goal) and all(figures.get(name, 0) >= number for name, number in self._goal.items())

    def checkpoint(self) -> None:
        """Saves the explorer, and logs a row of coverage; the writer commits what was recorded by itself."""
        row = self.coverage.figures() | {"seconds": round(time.perf_counter() - self._started, 3)}
        if self.env is not None and self.model is not None:
            row |= self.env.metrics
            tensors = {key: value.detach().cpu().contiguous() for key, value in self.env.state_dict().items()}
            runs.write_atomically(self.folder / BONUS, lambda path: save_file(tensors, path))
            runs.write_json(self.folder / RECORD, {"explorer_version": self.recorder.explorer_version})
            runs.write_atomically(self.folder / POLICY, self.model.save)
        runs.append_jsonl(self.folder / METRICS, row)
        self._bar.set_postfix({name: row[name] for name in ("observations", "states") if name in row})

    def restore(self, env: IntrinsicReward, model: BaseAlgorithm) -> bool:
        """Takes up policy and bonus as they were last saved; returns whether there were any."""
        self.env, self.model = env, model
        if not (self.folder / POLICY).exists():
            return False
        env.load_state_dict(load_file(self.folder / BONUS, device=str(env.device)))
        # Unlike `load`, this unpickles nothing.
        model.set_parameters(str(self.folder / POLICY), device=env.device)
        self.recorder.explorer_version = runs.read_json(self.folder / RECORD)["explorer_version"]
        return True

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        try:
            if kind is None or kind is KeyboardInterrupt:
                self.writer.flush()
                self.checkpoint()
        finally:
            self._bar.close()
        if kind is KeyboardInterrupt and not self.quiet:
            print(f"stopped with {self.writer.n_transitions:,} steps on disk; the same command goes on from there")

    def summarise(self, explorer: Any) -> None:
        """Prints what was reached, and saves it."""
        figures = self.coverage.figures()
        runs.write_json(self.folder / COVERAGE, figures)
        if not self.quiet:
            print(f"{explorer}: {describe(figures)}")


class _ToldBar(tqdm):
    """A progress bar that somebody else shows."""

    def __init__(self, follow: Callable[[int], None], **options: Any) -> None:
        self.follow = follow
        super().__init__(file=io.StringIO(), **options)

    def display(self, *args: Any, **options: Any) -> None:
        """Says how far it got."""
        self.follow(int(self.n))


def describe(figures: Mapping[str, Any]) -> str:
    """Returns the figures of `Coverage` in words."""
    text = (
        f"{figures['steps']:,} steps in {figures['episodes']:,} episodes of {figures['mean_length']:g} on average, "
        f"{figures['observations']:,} distinct observations"
    )
    if "states" in figures:
        values = ", ".join(f"{name} {n}" for name, n in figures["factors"].items())
        text += f", {figures['states']:,} distinct states (values of each factor: {values})"
    return (
        f"{text}. The goal was reached in {figures['goal_fraction']:.1%} of episodes, which the explorer is never told."
    )


class _Callback(BaseCallback):
    """Tells the session of every step, and the recorder of every update."""

    def __init__(self, session: _Session) -> None:
        super().__init__()
        self.session = session

    def _on_step(self) -> bool:
        return self.session.step()

    def _on_rollout_end(self) -> None:
        # Algorithms learn from a roll-out as soon as it has ended.
        self.session.recorder.explorer_version += 1
