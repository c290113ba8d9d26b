"""Fine-tuning: arms x seeds of an SB3 algorithm with reward, side by side on the cores, evaluated as they learn."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from gymnasium.spaces import Space
from rlrep_envs import EnvSpec, make_vec_env
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from rlrep import runs, spaces
from rlrep.augment import Augment
from rlrep.dreaming import Dreaming, check_can_dream, check_options
from rlrep.encoders import Encoder, RecurrentEncoder, load_belief, make_encoder
from rlrep.encoders.base import BELIEF, read_encoder
from rlrep.evaluate.comparison import EXPLORER, PRETRAINED, WARM
from rlrep.fanout import JobFailure, Send, map_jobs
from rlrep.imagination import load_world_model
from rlrep.latent import FeaturesSpace, LatentVecEnv
from rlrep.live import Watch
from rlrep.registry import nearest
from rlrep.sb3 import action_masks, check_settings, get_algorithm, policy_kwargs, policy_name
from rlrep.transfer import Auxiliary, Unfreeze
from rlrep.types import RunError
from rlrep.warm import CriticFirst, Explorer, Start, check_explorer, load_explorer, warm_start

SCORES, FAILURES, AGENTS = "scores.jsonl", "failures.jsonl", "agents"
LIVED = "lived-"
"""How the folders begin in which an arm that dreams keeps what it did; one that was killed leaves it there."""

Kind = Literal[
    "scratch",
    "random-frozen",
    "frozen",
    "belief",
    "dream",
    "finetune",
    "augment",
    "warm-actor",
    "warm-logits",
    "explorer",
]

KINDS: tuple[Kind, ...] = get_args(Kind)

DREAM = "dream"
REMEMBERING = (BELIEF, DREAM)
"""The kinds of arm whose policies learn on the features of a recurrent encoder."""

ON_FEATURES = ("frozen", "random-frozen", *REMEMBERING)
"""Those whose environments show features, as they do for an explorer that saw an encoder's."""

DEFAULT_ARMS = ("scratch", "random-frozen", "frozen", "finetune")
"""Those that need one encoder at most; `augment` is for pictures, `belief` for memories, others for an explorer."""

SEED_STRIDE = 10_000
"""Apart from one another: the environment seeds of two runs, and of training and evaluation."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of getting a policy: where its features come from, and the algorithm's settings.

    `scratch` trains encoder and policy together from nothing; `random-frozen` trains a policy on the features of an
    untrained encoder; `frozen` on those of the pre-trained one, computed once a step; `finetune` trains the pre-trained
    encoder along, at `lr_scale` times the policy's rate; `augment` is `scratch` on pictures that are shifted at random
    by up to `shift` pixels in every update: what pre-training has to beat, and often does not (arXiv:2205.07886).

    `freeze`, `weight_decay` and `anchor` are for `finetune`, as `rlrep.policy_kwargs` takes them; `unfreeze_at` and
    `unfreeze_every` are those of `rlrep.Unfreeze`, and `auxiliary` are objectives for `rlrep.Auxiliary`.

    `belief` trains a policy on the features of the recurrent encoder that was pre-trained beside the other one: it
    remembers the episode. `frozen` is the same without a memory. `dream` is `belief` with a policy that learns in the
    world model's dreams too, between its rollouts, of the reward that it has had itself; `dream` in the arm's settings
    are options of `rlrep.Dreaming`, such as `{"ratio": 4, "horizon": 15}`.

    The others need an explorer, and have its layers: `warm-actor` starts from a copy of its actor, with values anew;
    `warm-logits` adds its frozen logits to those of a fresh policy (arXiv:2111.09119); in both, only values are learnt
    in the first `critic_steps` rewarded steps, lest a fresh critic ruin the actor (arXiv:2301.07302). `explorer` is
    that policy as it is, evaluated once and never trained with reward: what a warm start has to beat.
    """

    name: str
    kind: Kind
    lr_scale: float = 0.1
    shift: int = 4
    freeze: int | Literal["all"] = 0
    weight_decay: float | None = None
    anchor: float = 0.0
    unfreeze_at: int | None = None
    unfreeze_every: int | None = None
    auxiliary: list[str | Mapping[str, Any]] = dataclasses.field(default_factory=list)
    critic_steps: int = 0
    dream: dict[str, Any] = dataclasses.field(default_factory=dict)
    algorithm: str | None = None
    """What trains it, where that is not what trains the others."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Constructor arguments of the algorithm, over those all arms share."""

    @classmethod
    def parse(cls, arm: str | Mapping[str, Any]) -> Arm:
        """Reads `"frozen"`, or `{"name": "frozen-slow", "kind": "frozen", "settings": {"learning_rate": 1e-4}}`."""
        given = {"name": arm, "kind": arm} if isinstance(arm, str) else {"kind": arm.get("name"), **arm}
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in given:
            if key not in fields:
                raise ValueError(
                    f"an arm has no setting {key!r}.{nearest(key, fields)} Its settings: {', '.join(fields)}"
                )
        if given["kind"] not in KINDS:
            raise ValueError(
                f"there is no arm {given['kind']!r}.{nearest(str(given['kind']), KINDS)} "
                f"The kinds are: {', '.join(KINDS)}; an arm of another name says which with 'kind'"
            )
        for key in ("lr_scale", "weight_decay", "anchor"):
            value = given.get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{key} of arm {given['name']!r} is a number, such as 1.0e-4, and not {value!r}")
        for key in ("unfreeze_at", "unfreeze_every", "critic_steps"):
            value = given.get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{key} of arm {given['name']!r} is a whole number of steps, and not {value!r}")
        dream: Any = given.get(DREAM, {})
        if not isinstance(dream, Mapping):
            raise ValueError(f"dream of arm {given['name']!r} is a mapping, such as {{ratio: 4}}, and not {dream!r}")
        try:
            check_options(dream)
        except ValueError as error:
            raise ValueError(f"arm {given['name']!r}: {error}") from None
        return cls(**given)

    @property
    def transfer(self) -> dict[str, Any]:
        """How the encoder learns, for `policy_kwargs`."""
        names = ("lr_scale", "freeze", "weight_decay", "anchor")
        return {name: getattr(self, name) for name in names} if self.kind == "finetune" else {}

    def callbacks(self) -> list[BaseCallback]:
        """Returns what changes the encoder's training on the way."""
        found: list[BaseCallback] = []
        if self.unfreeze_at is not None:
            found.append(Unfreeze(self.unfreeze_at, self.unfreeze_every))
        if self.auxiliary:
            found.append(Auxiliary(self.auxiliary))
        return found

    @property
    def pretrained(self) -> bool:
        """Whether it needs a pre-trained encoder."""
        return self.kind in PRETRAINED

    @property
    def explored(self) -> bool:
        """Whether it needs an explorer."""
        return self.kind in (*WARM, EXPLORER)


def parse_arms(arms: Sequence[str | Mapping[str, Any]], algorithm: str, settings: Mapping[str, Any]) -> list[Arm]:
    """Reads arms, and checks whatever of them can be checked without environment and encoder.

    Args:
        arms: Names or mappings, see `Arm`.
        algorithm: What trains them.
        settings: What they share of its settings.

    Raises:
        SpecError: There is no such algorithm or objective.
        ValueError: Unknown arm or setting, two arms of one name, or a number out of range.
    """
    parsed = [Arm.parse(arm) for arm in arms]
    if len({arm.name for arm in parsed}) < len(parsed) or not parsed:
        raise ValueError(f"arms need names of their own, and there must be one at least: {[a.name for a in parsed]}")
    for arm in parsed:
        check_settings(get_algorithm(arm.algorithm or algorithm), {**settings, **arm.settings})
        if arm.algorithm is not None and arm.explored:
            raise ValueError(
                f"arm {arm.name!r} starts from an explorer, and goes on with the algorithm of the run: say it there"
            )
        if arm.critic_steps < 0 or (arm.critic_steps and arm.kind not in WARM):
            raise ValueError(
                f"critic_steps={arm.critic_steps} of arm {arm.name!r}: it is 0 or more, and only arms that start "
                f"from an explorer have it ({', '.join(WARM)})"
            )
        if arm.kind == DREAM:
            check_can_dream(get_algorithm(arm.algorithm or algorithm))
        elif arm.dream:
            raise ValueError(f"arm {arm.name!r} says how to dream, which arms of kind {DREAM!r} do, not {arm.kind!r}")
        if not arm.lr_scale > 0:
            raise ValueError(f"lr_scale={arm.lr_scale} of arm {arm.name!r} is not positive; 'frozen' does not learn")
        if arm.unfreeze_every is not None and arm.unfreeze_at is None:
            raise ValueError(f"arm {arm.name!r} says unfreeze_every, and not when it begins: say unfreeze_at too")
        if arm.unfreeze_at is not None and not arm.freeze:
            raise ValueError(f"arm {arm.name!r} unfreezes layers, and freezes none: say freeze='all', or how many")
        if (arm.callbacks() or arm.freeze or arm.weight_decay is not None or arm.anchor) and arm.kind != "finetune":
            raise ValueError(
                f"arm {arm.name!r} says how a pre-trained encoder learns, which it does in 'finetune' only, not in "
                f"{arm.kind!r}"
            )
    return parsed


def finetune(
    env: str | Mapping[str, Any] | EnvSpec,
    *,
    out: str | Path,
    encoder: str | Path | Encoder | None = None,
    explorer: str | Path | None = None,
    arms: Sequence[str | Mapping[str, Any]] = DEFAULT_ARMS,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 100_000,
    algorithm: str = "ppo",
    settings: Mapping[str, Any] | None = None,
    n_envs: int = 16,
    threshold: float = 0.8,
    eval_every: int = 10_000,
    eval_episodes: int = 20,
    deterministic: bool = False,
    n_workers: int | None = None,
    ray: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Trains every arm with every seed on the rewarded task, and records how their returns grow.

    The same call on an unfinished folder runs the jobs that are missing, failed ones included.

    Args:
        env: Environment spec.
        out: Run folder: `scores.jsonl` has a row an evaluation, `failures.jsonl` one a failed job, `tensorboard/` the
            same curves, and `agents/<arm>/seed-<seed>.zip` the agent that was trained, for SB3 and `export`.
        encoder: Pre-trained encoder, or its folder; `frozen` and `finetune` need one. `belief` and `dream` need the
            folder of a run that trained a recurrent one too, or that recurrent encoder, whose encoder of single
            observations then serves the other arms.
        explorer: Folder of a dataset that a bonus collected, or the zip of a policy, which is trusted; `warm-actor`,
            `warm-logits` and `explorer` need one. One that saw an encoder's features needs that encoder too.
        arms: Names or mappings, see `Arm`.
        seeds: One run of each arm a seed.
        steps: Rewarded environment steps of each run.
        algorithm: Name of an SB3 or sb3-contrib algorithm.
        settings: Arguments of its constructor for all arms, SB3's defaults otherwise.
        n_envs: Environments stepped together.
        threshold: The return that counts as solved.
        eval_every: Rewarded steps between evaluations.
        eval_episodes: Episodes of each evaluation, from the same starts each time.
        deterministic: Evaluate the likeliest action, not a drawn one.
        n_workers: Jobs side by side, one core each; all cores unless given.
        ray: Where the jobs run: `local` or the address of a Ray cluster (`HOST:PORT`, `auto`), whose nodes have rlrep
            installed; on this machine, without Ray, unless given. Scores are written here as they come.
        device: `auto` is a GPU if there is one; but for policies on features computed outside them, which are too small
            for one, the CPU.
        overwrite: Start again, throwing away what another run left in `out`.

    Returns:
        The run folder, for `rlrep.report`.

    Raises:
        SpaceError: The encoder or the explorer was made for other observations, or the explorer for other actions.
        RlrepError: The explorer's policy is not one that others can start from.
        RunError: `out` is taken by something else, there is no explorer's policy, or every job failed.
        SpecError: The encoder of `belief` has no memory, or that of `dream` cannot dream.
        ClusterError: The Ray cluster cannot be reached.
        ValueError: Unknown arm, algorithm or setting, a number out of range, an arm without the encoder or the
            explorer that it needs, or `augment` without pictures.
    """
    spec = EnvSpec.parse(env)
    parsed = parse_arms(arms, algorithm, settings or {})
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be different, none negative, and there must be one at least: {list(seeds)}")
    counts = {"steps": steps, "n_envs": n_envs, "eval_every": eval_every, "eval_episodes": eval_episodes}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")
    pretrained = read_encoder(encoder) if encoder is not None else None
    belief = None
    if isinstance(pretrained, RecurrentEncoder):
        belief, pretrained = pretrained, pretrained.encoder
        pretrained.provenance = belief.provenance
    elif encoder is not None and any(arm.kind in REMEMBERING for arm in parsed):
        belief = load_belief(encoder)
    if needy := [arm.name for arm in parsed if arm.pretrained and pretrained is None]:
        raise ValueError(f"arm {needy[0]!r} needs a pre-trained encoder; pass one, or leave the arm out")
    explored = load_explorer(explorer) if explorer is not None else None
    if needy := [arm.name for arm in parsed if arm.explored and explored is None]:
        raise ValueError(
            f"arm {needy[0]!r} needs an explorer; pass the folder that it collected or its zip, or leave the arm out"
        )
    space, action_space = _spaces(spec)
    for arm in parsed:
        if arm.kind == "augment" and not Augment(space, arm.shift).active:
            raise ValueError(
                f"arm {arm.name!r} shifts pictures by {arm.shift} pixels, which changes nothing here: leave it out, or "
                f"observe pictures ({spec} gives {space})"
            )
    if pretrained is not None:
        spaces.check_same(space, pretrained.observation_space, "this encoder was made for observations")
        for arm in parsed:
            if arm.kind == "finetune":
                policy_kwargs(pretrained, arm.algorithm or algorithm, **arm.transfer)
    if belief is not None:
        spaces.check_same(action_space, belief.action_space, "this encoder was made for actions")
        if any(arm.kind == DREAM for arm in parsed):
            load_world_model(belief)
    network, acted_on = None, None
    if explored is not None:
        warm = {f"arm {arm.name!r}": arm for arm in parsed if arm.kind in WARM}
        starts = {name: cast(Start, arm.kind) for name, arm in warm.items()}
        asked = {name: {**(settings or {}), **arm.settings}.get("policy_kwargs") or {} for name, arm in warm.items()}
        acted_on = _acted_on(explored, pretrained, belief)
        seen = space if acted_on is None else FeaturesSpace(acted_on)
        network = check_explorer(explored, starts, algorithm, asked, seen, action_space)
    record = {
        "env": str(spec),
        "algorithm": algorithm,
        "arms": [dataclasses.asdict(arm) for arm in parsed],
        "seeds": list(seeds),
        "steps": steps,
        "settings": dict(settings or {}),
        "n_envs": n_envs,
        "threshold": threshold,
        "eval_every": eval_every,
        "eval_episodes": eval_episodes,
        "deterministic": deterministic,
        "encoder": _describe(pretrained),
        "belief": _describe(belief),
        "explorer": None if explored is None else explored.record,
    }
    with runs.lock(Path(out)):
        run = runs.RunFolder(out, "finetune", record, overwrite=overwrite)
        if run.finished:
            return run.path
        # The untrained arms have the same architecture as the others.
        untrained = pretrained or network or make_encoder("auto", space)
        if pretrained is not None:
            # A copy makes the run whole: what was fine-tuned can be looked at later.
            runs.write_atomically(run.path / "encoder", pretrained.save_pretrained)
        if belief is not None:
            runs.write_atomically(run.path / "belief", belief.save_pretrained)
        if explored is not None:
            runs.write_atomically(run.path / "explorer.zip", lambda path: path.write_bytes(explored.content))

        def encoder_of(arm: Arm) -> Encoder | None:
            if arm.explored:
                return acted_on
            return belief if arm.kind in REMEMBERING else pretrained if arm.pretrained else untrained

        jobs = [
            {
                **record,
                "device": device,
                # Jobs on a cluster may run where this folder is not.
                "scratch": None if ray else run.path,
                "arm": arm,
                "seed": seed,
                "encoder": encoder_of(arm),
                "explorer": explored if arm.explored else None,
            }
            for seed in seeds
            for arm in parsed
        ]
        _run_all(run, jobs, n_workers, ray)
    return run.path


def _run_all(run: runs.RunFolder, jobs: list[dict[str, Any]], n_workers: int | None, ray: str | None) -> None:
    """Runs the jobs that have not reached their last step, and marks the run finished if all have."""
    scores, failures = run.path / SCORES, run.path / FAILURES
    for left in run.path.glob(f"{LIVED}*"):
        shutil.rmtree(left)
    # A job that was cut short starts again, so what it had scored goes.
    finished = {_key(row): row["steps"] for row in runs.read_jsonl(scores) if row["last"]}
    if scores.exists():
        runs.trim_jsonl(scores, lambda row: _key(row) in finished)
    failures.unlink(missing_ok=True)
    missing = [job for job in jobs if (job["arm"].name, job["seed"]) not in finished]
    reached: dict[tuple[str, int], int] = dict(finished)
    n_failed = 0
    arms, n_seeds = list(dict.fromkeys(job["arm"].name for job in jobs)), len({job["seed"] for job in jobs})
    steps, threshold = jobs[0]["steps"], jobs[0]["threshold"]
    with Watch(run.path / "tensorboard", arms, n_seeds, steps, threshold, runs.read_jsonl(scores)) as watch:

        def receive(job: Mapping[str, Any], row: dict[str, Any] | bytes) -> None:
            if isinstance(row, bytes):
                agent = run.path / AGENTS / job["arm"].name / f"seed-{job['seed']}.zip"
                agent.parent.mkdir(parents=True, exist_ok=True)
                runs.write_atomically(agent, lambda path: path.write_bytes(row))
                return
            if row["steps"] <= reached.get(_key(row), 0):
                # Its process died, and it started again.
                runs.trim_jsonl(scores, lambda scored: _key(scored) != _key(row))
            runs.append_jsonl(scores, row)
            reached[_key(row)] = row["steps"]
            watch.add(row)

        for job, outcome in map_jobs(_run_job, missing, n_workers, ray=ray, receive=receive):
            if isinstance(outcome, JobFailure):
                n_failed += 1
                row = {
                    "arm": job["arm"].name,
                    "seed": job["seed"],
                    "error": outcome.error,
                    "traceback": outcome.traceback,
                }
                runs.append_jsonl(failures, row)
                watch.say(f"arm {row['arm']}, seed {row['seed']} failed: {outcome.error}")
    if n_failed == len(jobs):
        raise RunError(f"every job failed; the first: {runs.read_jsonl(failures)[0]['error']} (see {failures})")
    if not n_failed:
        run.finish(jobs=len(jobs))


def _key(row: Mapping[str, Any]) -> tuple[str, int]:
    """Which job a row of scores is of."""
    return row["arm"], row["seed"]


def _run_job(job: Mapping[str, Any], send: Send) -> None:
    """Trains one arm with one seed, sending a row of scores at every evaluation, and the agent before the last.

    Runs in a process of its own.
    """
    arm: Arm = job["arm"]
    first_seed = SEED_STRIDE * (2 * job["seed"] + 1)
    with contextlib.ExitStack() as stack:
        callbacks: list[BaseCallback] = [CriticFirst(arm.critic_steps)] if arm.kind in WARM else arm.callbacks()
        dreaming = None
        if arm.kind == DREAM:
            lived = stack.enter_context(tempfile.TemporaryDirectory(prefix=LIVED, dir=job["scratch"]))
            dreaming = Dreaming(job["encoder"], lived, seed=job["seed"], device=job["device"], **arm.dream)
            stack.callback(dreaming.close)
            callbacks = [dreaming]
        model, evaluation = _build(arm, job, first_seed, dreaming)
        stack.callback(evaluation.close)
        callback = _Evaluate(job, evaluation, first_seed + SEED_STRIDE, send)
        if arm.kind == EXPLORER:
            callback.init_callback(model)
        else:
            _, options = action_masks(arm.algorithm or job["algorithm"], cast(VecEnv, model.env))
            model.learn(job["steps"], callback=[callback, *callbacks], **options)
            # Before the last row, which says that all of this run is there.
            send(_zipped(model))
        callback.score(last=True)


def _zipped(model: BaseAlgorithm) -> bytes:
    """Returns what `model.save` writes."""
    content = io.BytesIO()
    model.save(content)
    return content.getvalue()


def _build(
    arm: Arm, job: Mapping[str, Any], first_seed: int, dreaming: Dreaming | None
) -> tuple[BaseAlgorithm, VecEnv]:
    """Returns the model on its training environments, and the evaluation environments it understands."""
    env = make_vec_env(job["env"], job["n_envs"], first_seed, factors=False)
    evaluation = make_vec_env(
        job["env"], min(job["n_envs"], job["eval_episodes"]), first_seed + SEED_STRIDE, factors=False
    )
    name: str = arm.algorithm or job["algorithm"]
    encoder: Encoder = job["encoder"]
    if not (arm.pretrained or arm.explored):
        torch.manual_seed(job["seed"])
        encoder = make_encoder({"name": encoder.name, **encoder.config["options"]}, encoder.observation_space)
    settings = {**job["settings"], **arm.settings}
    extra = settings.pop("policy_kwargs", {})
    device, explorer = job["device"], cast(Explorer, job["explorer"])
    on_features = explorer.features is not None if arm.explored else arm.kind in ON_FEATURES
    if on_features:
        evaluation = LatentVecEnv(evaluation, encoder, device=device)
        env = dreaming.wrap(env) if dreaming else LatentVecEnv(env, encoder, device=device)
        device = "cpu" if device == "auto" else device
    if arm.kind == EXPLORER:
        env.close()
        return explorer.load(device), evaluation
    if arm.explored:
        options = {"start": cast(Start, arm.kind), "policy_kwargs": extra, "seed": job["seed"], "device": device}
        return warm_start(explorer, env, name, **options, **settings), evaluation
    if not on_features:
        mode: Literal["finetune", "scratch"] = "finetune" if arm.pretrained else "scratch"
        shift = arm.shift if arm.kind == "augment" else 0
        extra = policy_kwargs(encoder, name, mode=mode, shift=shift, **arm.transfer, **extra)
    algorithm = get_algorithm(name)
    policy = policy_name(algorithm, env.observation_space)
    model = algorithm(policy, env, seed=job["seed"], policy_kwargs=extra, device=device, **settings)
    return model, evaluation


class _Evaluate(BaseCallback):
    """Evaluates every `eval_every` steps on episodes of its own, from the same starts each time."""

    def __init__(self, job: Mapping[str, Any], evaluation: VecEnv, seed: int, send: Send) -> None:
        super().__init__()
        self.job, self.evaluation, self.seed, self.send = job, evaluation, seed, send
        self.next_at = job["eval_every"]
        self.evaluating, self.started = 0.0, time.perf_counter()
        self.evaluate: Callable[..., Any] = evaluate_policy

    def _init_callback(self) -> None:
        if action_masks(type(self.model).__name__, self.evaluation)[0] is not None:
            from sb3_contrib.common.maskable import evaluation

            self.evaluate = evaluation.evaluate_policy

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.next_at and self.num_timesteps < self.job["steps"]:
            self.next_at += self.job["eval_every"]
            self.score(last=False)
        return True

    def score(self, last: bool) -> None:
        """Evaluates the policy as it is, and sends a row of scores."""
        began = time.perf_counter()
        # Equal starts and luck at every evaluation and in every arm: what differs is the policy.
        with _generators_apart(self.model, self.seed):
            self.evaluation.seed(self.seed)
            found = self.evaluate(
                self.model,
                self.evaluation,
                n_eval_episodes=self.job["eval_episodes"],
                deterministic=self.job["deterministic"],
                return_episode_rewards=True,
                warn=False,
            )
        returns, lengths = cast(tuple[list[float], list[int]], found)
        row = {
            "arm": self.job["arm"].name,
            "seed": self.job["seed"],
            "steps": self.num_timesteps,
            "return": float(np.mean(returns)),
            "std": float(np.std(returns)),
            "episodes": len(returns),
            "length": float(np.mean(lengths)),
            "success": float(np.mean(np.asarray(returns) >= self.job["threshold"])),
            "seconds": round(began - self.started - self.evaluating, 3),
            "last": last,
        }
        self.send(row)
        self.evaluating += time.perf_counter() - began


@contextlib.contextmanager
def _generators_apart(model: BaseAlgorithm, seed: int) -> Iterator[None]:
    """Seeds what policies draw actions from, and leaves it as it was: looking at a training does not change it."""
    device, of_actions = model.device, model.action_space.np_random.bit_generator.state
    of_numpy = np.random.get_state()  # noqa: NPY002 (SB3's own)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            model.action_space.seed(seed)
            yield
        finally:
            np.random.set_state(of_numpy)  # noqa: NPY002
            model.action_space.np_random.bit_generator.state = of_actions


def _spaces(spec: EnvSpec) -> tuple[Space, Space]:
    """The spaces of what `make_vec_env` will give, frame stack included."""
    env = make_vec_env(spec)
    env.close()
    return env.observation_space, env.action_space


def _acted_on(explorer: Explorer, *encoders: Encoder | None) -> Encoder | None:
    """Returns which of the encoders' features an explorer acts on, None if on raw observations."""
    if explorer.features is None:
        return None
    name, digest = explorer.features["name"], explorer.features["digest"]
    given = [encoder for encoder in encoders if encoder is not None]
    for encoder in given:
        if encoder.digest() == digest:
            return encoder
    raise ValueError(
        f"explorer {explorer.record['name']!r} acts on the features of encoder {name!r} with digest {digest[:12]}, "
        f"and there is {'another' if given else 'none'}: pass the one that it explored with as the encoder"
    )


def _describe(encoder: Encoder | None) -> dict[str, Any] | None:
    """What the report says of the encoder: what it cost, and what it is."""
    if encoder is None:
        return None
    keys = ("reward_free_steps", "pretrain_seconds", "data_digest", "objectives", "updates", "env_spec")
    known = {key: encoder.provenance.get(key) for key in keys}
    return {"name": encoder.name, "digest": encoder.digest(), **known}
