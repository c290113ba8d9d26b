"""Unsupervised pre-training for Stable-Baselines3: explore without reward, learn an encoder, fine-tune with reward.

The four verbs are `collect`, `pretrain`, `finetune` and `report`; `run` does them all from a recipe.
"""

from importlib.metadata import version as _version

from rlrep_envs import EnvSpec, make_env, make_vec_env

from rlrep.belief import BeliefPolicy
from rlrep.collect import collect
from rlrep.dataset import Dataset, DatasetWriter
from rlrep.dreaming import Dreaming
from rlrep.encoders import Encoder, load_belief, load_encoder, make_encoder
from rlrep.evaluate.dreams import dream
from rlrep.evaluate.memory import probe_memory
from rlrep.evaluate.probes import probe
from rlrep.evaluate.report import compare, report
from rlrep.explore import Bonus
from rlrep.export import export
from rlrep.finetune import finetune
from rlrep.imagination import DreamVecEnv, fit_reward
from rlrep.latent import LatentVecEnv
from rlrep.objectives import Objective, make_objective
from rlrep.pretrain import pretrain
from rlrep.recipe import load_recipe, run
from rlrep.sb3 import policy_kwargs
from rlrep.transfer import Auxiliary, Unfreeze
from rlrep.types import Batch, Episode, RlrepError, Transition
from rlrep.warm import CriticFirst, warm_start

__version__ = _version("rlrep")

__all__ = [
    "Auxiliary",
    "Batch",
    "BeliefPolicy",
    "Bonus",
    "CriticFirst",
    "Dataset",
    "DatasetWriter",
    "DreamVecEnv",
    "Dreaming",
    "Encoder",
    "EnvSpec",
    "Episode",
    "LatentVecEnv",
    "Objective",
    "RlrepError",
    "Transition",
    "Unfreeze",
    "collect",
    "compare",
    "dream",
    "export",
    "finetune",
    "fit_reward",
    "load_belief",
    "load_encoder",
    "load_recipe",
    "make_encoder",
    "make_env",
    "make_objective",
    "make_vec_env",
    "policy_kwargs",
    "pretrain",
    "probe",
    "probe_memory",
    "report",
    "run",
    "warm_start",
]
