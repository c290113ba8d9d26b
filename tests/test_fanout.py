from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from rlrep import runs
from rlrep.fanout import JobFailure, map_jobs, map_missing


def work(job, send):
    """One job of every kind that can happen."""
    match job["kind"]:
        case "square":
            return job["value"] ** 2
        case "setup":
            import torch

            return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"], os.getpid()
        case "raise":
            raise ValueError("the loss is NaN\nat step 3")
        case "exit":
            os._exit(7)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "sys.exit":
            sys.exit("gave up")
        case "unpicklable":
            return threading.Lock()
        case "meet":
            # Opening a FIFO for reading waits for its writer, so these two end only when they run side by side.
            with Path(job["fifo"]).open(job["mode"]) as fifo:
                return fifo.read() if job["mode"] == "r" else fifo.write("hello")
    return None


def outcomes(jobs, n_workers=2):
    return {job["kind"]: outcome for job, outcome in map_jobs(work, jobs, n_workers)}


def test_every_job_runs_in_a_fresh_process_with_one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    results = [outcome for _, outcome in map_jobs(work, [{"kind": "setup"}] * 2, n_workers=1)]
    assert [result[:3] for result in results] == [(1, "1", "1")] * 2
    assert len({os.getpid(), results[0][3], results[1][3]}) == 3
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert "MKL_NUM_THREADS" not in os.environ


def test_failures_and_deaths_are_reported_and_the_others_go_on():
    kinds = ["raise", "exit", "kill", "sys.exit", "unpicklable"]
    found = outcomes([*({"kind": kind} for kind in kinds), {"kind": "square", "value": 3}])
    assert found.pop("square") == 9
    assert all(isinstance(outcome, JobFailure) for outcome in found.values())
    assert found["raise"].error == "ValueError: the loss is NaN at step 3"
    assert 'raise ValueError("the loss is NaN' in found["raise"].traceback
    assert "exit code 7" in found["exit"].error
    assert "SIGKILL" in found["kill"].error
    assert found["sys.exit"].error == "SystemExit: gave up"
    assert "pickle" in found["unpicklable"].error


def note(job, send):
    """Returns a row; the second fails once."""
    broken = Path(job["folder"]) / "broken"
    if job["value"] == 2 and broken.exists():
        broken.unlink()
        raise ValueError("not now")
    return {"value": job["value"], "square": job["value"] ** 2}


def test_what_is_missing_of_a_file_is_run_and_added(tmp_path, capsys):
    (tmp_path / "broken").touch()
    rows = tmp_path / "results" / "rows.jsonl"
    jobs = [{"value": value, "folder": tmp_path} for value in (1, 2, 3)]

    def run():
        return sorted(row["square"] for _, row in map_missing(note, jobs, lambda job: job["value"], rows, 2))

    assert run() == [1, 9]
    assert "/3] 2 failed: ValueError: not now" in capsys.readouterr().err
    assert run() == [4]
    assert run() == []
    assert sorted(row["value"] for row in runs.read_jsonl(rows)) == [1, 2, 3]


def test_workers_run_side_by_side(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    jobs = [{"kind": "meet", "fifo": str(fifo), "mode": mode} for mode in "rw"]
    assert {job["mode"]: outcome for job, outcome in map_jobs(work, jobs, n_workers=2)} == {"r": "hello", "w": 5}


def test_no_jobs_no_results_and_no_workers_is_an_error():
    assert list(map_jobs(work, [], 2)) == []
    with pytest.raises(ValueError, match="n_workers is 0"):
        list(map_jobs(work, [{"kind": "square", "value": 1}], 0))


def test_a_script_that_runs_again_in_its_jobs_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import rlrep\nrlrep.finetune('rlrep/TinyGrid-v0', out='run', arms=['scratch'], seeds=[0])\n")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "put its calls under  if __name__ == '__main__':" in done.stderr
    assert "imported by its jobs" in done.stderr.splitlines()[-1]


SCRIPT = """
    import signal

    from rlrep.fanout import map_jobs


    def job(job, send):
        print("started", flush=True)
        if job["quick"]:
            return
        signal.pause()


    if __name__ == "__main__":
        for done, _ in map_jobs(job, [{"quick": quick} for quick in QUICK], 2):
            print("got one", flush=True)
            signal.pause()
"""


@pytest.mark.parametrize(
    ("quick", "lines", "sent"),
    [
        ((False, False), ["started", "started"], signal.SIGINT),
        ((True, False), ["got one", "started", "started"], signal.SIGINT),
        ((False, False), ["started", "started"], signal.SIGKILL),
    ],
    ids=["Ctrl-C while waiting", "Ctrl-C between results", "parent killed"],
)
def test_no_child_outlives_its_parent(tmp_path, quick, lines, sent):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).replace("QUICK", repr(quick)))
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert sorted(parent.stdout.readline().strip() for _ in lines) == lines
    # The terminal sends Ctrl-C to the whole group; a kill hits the parent alone.
    os.killpg(parent.pid, sent) if sent == signal.SIGINT else parent.kill()
    # Every child holds the pipe, so reading to its end returns only when all of them are gone.
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == -sent
    assert errors.count("Traceback") == (1 if sent == signal.SIGINT else 0), errors
