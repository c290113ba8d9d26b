"""Jobs on a Ray cluster of two nodes, with workers killed on purpose: nothing but unflushed work is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_workers import SPEC, collect_with_a_kill

import rlrep
from rlrep import fanout
from rlrep.fanout import JobFailure, map_jobs
from rlrep.recipe import load_recipe, sweep
from rlrep.runs import read_jsonl
from rlrep.types import ClusterError

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes with a core each."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    yield nodes.address
    nodes.shutdown()


def work(job: dict[str, Any], send: Any) -> Any:
    """One job of every kind that can happen."""
    match job["kind"]:
        case "square":
            return job["value"] ** 2
        case "raise":
            raise ValueError("the loss is NaN\nat step 3")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "unpicklable":
            return threading.Lock()
        case "die once":
            send("hello")
            before, mark = Path(job["mark"]).exists(), Path(job["mark"])
            mark.touch()
            if not before:
                os.kill(os.getpid(), signal.SIGKILL)
            return "alive"
        case "meet":
            # Opening a FIFO for reading waits for its writer, so these two end only when they run side by side.
            with Path(job["fifo"]).open(job["mode"]) as fifo:
                fifo.read() if job["mode"] == "r" else fifo.write("hello")
            threads = torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]
            return threads, ray.get_runtime_context().get_node_id()
    return None


def test_ray_keeps_the_contract_of_processes(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "RETRIES", 1)
    kinds = ["raise", "kill", "unpicklable"]
    jobs = [*({"kind": kind} for kind in kinds), {"kind": "die once", "mark": str(tmp_path / "mark")}]
    heard: list[Any] = []
    mapped = map_jobs(work, jobs, 2, ray=cluster, receive=lambda job, message: heard.append(message))
    found = {job["kind"]: outcome for job, outcome in mapped}
    assert found.pop("die once") == "alive"
    assert heard[-1] == "hello"
    assert len(heard) <= 2, "it was started more often than needed"
    assert all(isinstance(outcome, JobFailure) for outcome in found.values())
    assert found["raise"].error == "ValueError: the loss is NaN at step 3"
    assert 'raise ValueError("the loss is NaN' in found["raise"].traceback
    assert found["kill"].died
    assert "died" in found["kill"].error
    assert "pickle" in found["unpicklable"].error
    assert not ray.is_initialized(), "the cluster was not left again"


def test_workers_have_one_thread_and_are_on_every_node(cluster: str, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    jobs = [{"kind": "meet", "fifo": str(fifo), "mode": mode} for mode in "rw"]
    found = [outcome for _, outcome in map_jobs(work, jobs, ray=cluster)]
    assert [threads for threads, _ in found] == [(1, "1", "1")] * 2
    assert len({node for _, node in found}) == 2


def test_a_killed_collector_is_started_again(cluster: str, tmp_path: Path) -> None:
    collect_with_a_kill(tmp_path / "data", ray=cluster)


def test_scores_come_home(cluster: str, tmp_path: Path) -> None:
    small = {"steps": 64, "n_envs": 2, "eval_every": 32, "eval_episodes": 1, "seeds": (0,)}
    settings = {"n_steps": 16, "batch_size": 16, "n_epochs": 1}
    out = rlrep.finetune(SPEC, out=tmp_path / "run", arms=["scratch"], settings=settings, ray=cluster, **small)
    assert [(row["steps"], row["last"]) for row in read_jsonl(out / "scores.jsonl")] == [(32, False), (64, True)]


TINY = {
    "env": SPEC,
    "collect": {"steps": 200, "n_envs": 4},
    "pretrain": {"updates": 4, "batch_size": 16, "log_every": 2, "encoder": "mlp:features_dim=16"},
    "finetune": {
        "arms": ["frozen"],
        "seeds": [0, 1],
        "steps": 64,
        "n_envs": 2,
        "eval_every": 64,
        "eval_episodes": 1,
        "settings": {"n_steps": 16, "batch_size": 16, "n_epochs": 1},
    },
}


def test_a_sweep_of_as_many_recipes_as_cores(cluster: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(TINY))
    # As many recipes as cores: each waits for policies that need a core as well.
    summary = sweep(
        load_recipe(tmp_path), {"pretrain.objectives": [["ae"], ["inverse"]]}, tmp_path / "out", ray=cluster
    )
    assert len(summary.runs) == 4
    for name in ("ae", "inverse"):
        rows = read_jsonl(tmp_path / "out" / f"pretrain.objectives={name}" / "finetune" / "scores.jsonl")
        assert sorted(row["seed"] for row in rows if row["last"]) == [0, 1]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:9", r"no Ray cluster answers at 127\.0\.0\.1:9.*refused.*'local'"),
        ("ray://127.0.0.1:10001", "ray job submit"),
        ("somewhere", "use 'local', 'auto' or HOST:PORT"),
    ],
)
def test_an_address_that_leads_nowhere_is_an_error_at_once(address: str, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        list(map_jobs(work, [{"kind": "square", "value": 2}], 1, ray=address))


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'rlrep\[ray\]'"):
        list(map_jobs(work, [{"kind": "square", "value": 2}], 1, ray="local"))


SCRIPT = """
    import os, signal, sys

    from rlrep import fanout


    def work(job, send):
        if job["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"


    if __name__ == "__main__":
        fanout.RETRIES = 0
        for _, outcome in fanout.map_jobs(work, [{"kill": True}, {"kill": False}], 1, ray="local"):
            print(getattr(outcome, "died", outcome))
"""


def test_a_local_ray_leaves_nothing_behind_and_stdout_alone(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True", "done"]
    assert "sage stat" not in done.stderr
