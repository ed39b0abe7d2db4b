"""The runs of a sweep as jobs: scripts that run, in an order that shares results."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from prunekit.cli.executors import arrange
from prunekit.engine import submitting

SBATCH = """\
#!/bin/sh
# Runs the jobs of an array at once, and says its number.
echo "$@" >> sbatch.log
array=${2#--array=}
shift 2
case "$1" in --dependency=*) shift ;; esac
for i in $(seq "${array%-*}" "${array#*-}"); do
    SLURM_ARRAY_TASK_ID=$i bash "$@" >&2 || exit
done
echo "7;here"
"""


@pytest.fixture
def sweep(here):
    (here / "a b").mkdir()
    (here / "a b/s.toml").write_text(
        'extends = "../r.toml"\n[sweep]\n"evaluate.images" = [10, 20]\n'
    )
    return here


def test_each_list_of_runs_shares_nothing_that_is_not_computed():
    def run(label, *keys, status="to do"):
        return {"run": label, "stages": [{"key": key, "status": status} for key in keys]}

    runs = [run("a", "p", "x"), run("b", "p", "y"), run("c", "q"), run("d", "p", "y", "z")]
    assert list(arrange({"runs": runs})) == [["a", "c"], ["b"], ["d"]]
    assert list(arrange({"runs": [run("a", "p", status="stored"), run("b", "p")]})) == [["b", "a"]]


def test_the_scripts_run_from_anywhere(sweep, call, monkeypatch):
    out, _ = call("run", "a b/s.toml", "--executor", "print", "--out", "it's/s", "--device", "cpu")
    assert out == ("""2 runs: sh 'it'"'"'s/s.sh'\nas SLURM arrays: bash 'it'"'"'s/s.slurm'\n""")
    assert not (sweep / "it's/s").exists()
    (sweep / "bin").mkdir()
    (sweep / "bin/sbatch").write_text(SBATCH)
    (sweep / "bin/sbatch").chmod(0o755)
    elsewhere = {"cwd": "bin", "env": {**os.environ, "PATH": f"{sweep}/bin:{os.environ['PATH']}"}}
    subprocess.run(["bash", "../it's/s.slurm"], check=True, capture_output=True, **elsewhere)
    assert json.loads((sweep / "it's/s/plan.json").read_text())["done"]
    assert (sweep / "bin/sbatch.log").read_text().splitlines() == [
        "--parsable --array=0-0 ../it's/s.slurm 0",
        "--parsable --array=0-0 --dependency=afterany:7 ../it's/s.slurm 1",
    ]
    done = subprocess.run(["sh", "../it's/s.sh"], capture_output=True, text=True, **elsewhere)
    assert (done.returncode, done.stderr.count("is done already")) == (0, 2)
    # It is written anew, but nobody else's file is.
    call("run", "a b/s.toml", "--executor", "print", "--out", "it's/s", "--device", "cpu")
    (sweep / "it's/s.sh").write_text("#!/bin/sh\nmine\n")
    _, err = call("run", "a b/s.toml", "--executor", "print", "--out", "it's/s", code=2)
    assert err == "prunekit: it's/s.sh is in the way; choose another folder with --out\n"


def test_a_job_does_not_go_side_by_side(sweep, call):
    _, err = call("run", "a b/s.toml", "--executor", "print", "--jobs", "2", code=2)
    assert "--executor makes a job of each run; leave --jobs, --devices and --force out" in err


def test_without_submitit_or_slurm_one_line_says_so(sweep, call, monkeypatch):
    command = ("run", "a b/s.toml", "--executor", "slurm")
    monkeypatch.setenv("PATH", "/nowhere")
    _, err = call(*command, code=2)
    assert err.startswith("prunekit: submitit: RuntimeError: Could not detect")
    monkeypatch.setattr(submitting, "CLUSTER", "local")
    _, err = call(*command, "--slurm", "slurm_partion=gpu", code=2)
    assert "submitit: NameError: Unknown argument 'partion'" in err
    monkeypatch.setitem(sys.modules, "submitit", None)
    _, err = call(*command, code=2)
    assert err == (
        "prunekit: --executor slurm needs submitit: pip install submitit; --executor print does "
        "without\n"
    )


@pytest.mark.slow
def test_jobs_of_submitit_share_the_work(sweep, call, monkeypatch):
    """With its executor for this machine, which knows no dependencies: the locks are enough."""
    monkeypatch.setattr(submitting, "CLUSTER", "local")
    out, _ = call("run", "a b/s.toml", "--executor", "slurm", "--slurm", "timeout_min=5")
    assert out.startswith("submitted: ")
    wait_for(lambda: is_done(sweep / "runs/tiny"))


def is_done(folder):
    mark = folder / "plan.json"
    return mark.exists() and json.loads(mark.read_text())["done"]


def wait_for(found, seconds=90):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
def test_a_job_that_is_ended_saves_and_is_submitted_again(here, recipe):
    (here / "s.toml").write_text(recipe.replace("epochs = 1", "epochs = 2000"))
    command = (sys.executable, "-m", "prunekit", "run", "s.toml")
    code = (
        "import signal, sys\n"
        "from prunekit.engine.submitting import Submitted\n"
        f"job = Submitted({command!r}, {str(here)!r})\n"
        "def end(*_):\n"
        "    print(job.checkpoint().function.command == job.command)\n"
        "    sys.exit(3)\n"
        "signal.signal(signal.SIGUSR2, end)\n"
        "job()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    log = here / "runs/tiny/metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count('"epoch"') > 2)
    process.send_signal(signal.SIGUSR2)
    assert process.communicate(timeout=60)[0] == "True\n"
    assert process.returncode == 3
    assert json.loads((here / "runs/tiny/run.json").read_text())["status"] == "interrupted"
