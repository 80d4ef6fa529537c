"""Stand-ins for Slurm's commands, which do what its manuals say of the options that our scripts use: `srun` starts its
tasks as processes of this machine, signals only the first process of each, kills all where one fails, and ends with
the highest code; `scontrol` names the hosts and notes what is requeued."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SRUN = r"""
import os, signal, subprocess, sys
options, rest = {}, sys.argv[1:]
while rest[0].startswith("--"):
    name, _, value = rest.pop(0).partition("=")
    options[name] = value
assert options["--ntasks-per-node"] == "1" and options["--wait"] == "0", options
tasks = [subprocess.Popen(rest, env=os.environ | {"SLURM_NODEID": str(node)}, process_group=0, close_fds=False)
         for node in range(int(options["--nodes"]))]
def stop(number, frame):
    for task in tasks:
        if task.returncode is None:
            os.kill(task.pid, signal.SIGTERM)
signal.signal(signal.SIGUSR1, stop)  # what slurmctld does S seconds before the end of the time
with open(os.environ["SRUN_PID"], "w") as file:
    file.write(f"{os.getpid()}\n")
left, worst = {task.pid: task for task in tasks}, 0
while left:
    pid, status = os.wait()
    task = left.pop(pid)
    code = task.returncode = os.waitstatus_to_exitcode(status)
    code = 128 - code if code < 0 else code
    if code and options["--kill-on-bad-exit"] == "1" and "SRUN_TOO_LATE" not in os.environ:
        for other in left.values():
            os.killpg(other.pid, signal.SIGKILL)
    worst = max(worst, code)
sys.exit(worst)
"""

SCONTROL = r"""
import os, sys
match sys.argv[1:]:
    case ["show", "hostnames", "nodes[1-2]"]:
        print(os.environ["SCONTROL_HOSTS"].replace(",", "\n"))
    case ["requeue", job]:
        with open(os.environ["SCONTROL_LOG"], "a") as file:
            file.write(f"requeue {job}\n")
    case words:
        sys.exit(f"scontrol: {words}")
"""


def install(folder: Path, **programs: str) -> dict[str, str]:
    """Writes the commands, and others given as Python, into `folder`; the variables of a job's environment."""
    folder.mkdir()
    for name, program in {"srun": SRUN, "scontrol": SCONTROL, **programs}.items():
        command(folder / name, program)
    return {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "nodes[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SCONTROL_HOSTS": "127.0.0.1,other-host",
        "SCONTROL_LOG": str(folder / "scontrol.log"),
        "SRUN_PID": str(folder / "srun.pid"),
    }


def command(file: Path, program: str) -> None:
    file.write_text(f"#!{sys.executable}\n{program}", encoding="utf-8")
    file.chmod(0o755)


def requeued(environment: dict[str, str]) -> list[str]:
    log = Path(environment["SCONTROL_LOG"])
    return log.read_text().splitlines() if log.exists() else []
