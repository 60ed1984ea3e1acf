"""A real SLURM on this machine, for tests: munged, slurmctld and one slurmd a node.

All its files are in a temporary folder, and all its processes end with it. Nodes have as many cores and as much memory
as the test says: nothing checks it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import psutil

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv")
_START_S = 30.0
_STOP_S = 20.0

#: `cred_expire` and `KillWait` make a requeue quick, the scheduler's intervals a chain of jobs. A job of the partition
#: `urgent` preempts those of `all`, which get their signal and the time of grace.
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
KillWait=3
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF
"""
_NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory={memory_mb}{gres}\n"


@dataclass(frozen=True)
class Job:
    """A job, or one task of an array."""

    job_id: str  # the whole array's
    task: int | None
    name: str
    state: str
    node: str
    submitted: datetime
    started: datetime | None
    ended: datetime | None  # while it runs: when its time will be over


@dataclass(frozen=True)
class Cluster:
    directory: Path
    nodes: tuple[str, ...]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)  # munged, slurmctld, and by node

    def run(self, command: Sequence[str], cwd: Path | None = None, **environment: str) -> str:
        """What the command printed, which finds this cluster and no outer SLURM job; a failure is a RuntimeError."""
        outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        variables = outer | {"SLURM_CONF": str(self._conf_path)} | environment
        done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def jobs(self, *job_ids: str) -> list[Job]:
        """Tasks of these jobs (default: of all), the ended ones of the last minutes too."""
        lines = self.run(["squeue", "--states=all", "--array", "--noheader", "--format=%F|%K|%j|%T|%N|%V|%S|%e"])
        jobs = [_parse(line) for line in lines.splitlines()]
        return [job for job in jobs if not job_ids or job.job_id in job_ids]

    def wait_for_end(self, *job_ids: str, timeout_s: float = 60.0) -> list[Job]:
        def ended() -> bool:
            return not self.run(["squeue", "--noheader", f"--jobs={','.join(job_ids)}"])

        wait_for(ended, f"the end of jobs {', '.join(job_ids)}", timeout_s)
        return self.jobs(*job_ids)

    def wait_for_state(self, job_id: str, state: str, timeout_s: float = 60.0) -> Job:
        wait_for(lambda: [job.state for job in self.jobs(job_id)] == [state], f"job {job_id} {state}", timeout_s)
        return self.jobs(job_id)[0]

    def describe(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says: Restarts, ExitCode, ..."""
        words = self.run(["scontrol", "--oneliner", "show", "job", job_id]).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def processes(self, **environment: str) -> list[psutil.Process]:
        """Those of jobs and daemons that were started with these variables."""
        wanted = {"SLURM_CONF": str(self._conf_path)} | environment
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if wanted.items() <= process.environ().items():
                    found.append(process)
        return found

    def start(self, name: str, *command: str) -> None:
        environment = os.environ | {"SLURM_CONF": str(self._conf_path)}
        with (self.directory / f"{name}.out").open("ab") as out:
            # setpriv: a test run that is killed takes them with it
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", *command], env=environment, cwd=self.directory, stdout=out, stderr=out
            )

    def start_node(self, node: str) -> None:
        self.start(node, "slurmd", "-D", "-N", node)

    def lose_node(self, node: str) -> None:
        """As a power cut: nothing of it says goodbye."""
        tasks = self.processes(SLURMD_NODENAME=node)
        parents = [parent for task in tasks if (parent := task.parent()) is not None]
        self.daemons[node].kill()
        for process in [*(parent for parent in parents if "slurmstepd" in parent.name()), *tasks]:
            with suppress(psutil.Error):
                process.kill()

    @property
    def _conf_path(self) -> Path:
        return self.directory / "slurm.conf"


def why_not() -> str | None:
    """The reason why no cluster can be started here, if there is one."""
    if missing := [name for name in _PROGRAMS if shutil.which(name) is None]:
        return f"{', '.join(missing)}: not installed; `make test-slurm` installs SLURM on Debian"
    return None if os.geteuid() == 0 else "slurmd has to be started by root"


def wait_for(condition: Callable[[], object], what: str, timeout_s: float, every_s: float = 0.2) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:.0f} s in vain for {what}")
        time.sleep(every_s)


@contextmanager
def running_cluster(
    num_nodes: int = 2, cpus_per_node: int = 8, memory_mb_per_node: int = 16_384, gpus_per_node: int = 0
) -> Iterator[Cluster]:
    """Nodes n1, n2, ... in the partition `all`. GPUs are counted only: jobs may ask for them, and find none."""
    # not below pytest's folder: the path of a socket may have 107 characters, and munge wants to walk to it
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        cluster = Cluster(Path(name), tuple(f"n{number}" for number in range(1, num_nodes + 1)))
        _write_files(cluster, cpus_per_node, memory_mb_per_node, gpus_per_node)
        try:
            _start(cluster)
            yield cluster
        finally:
            _stop(cluster)


def _write_files(cluster: Cluster, cpus: int, memory_mb: int, num_gpus: int) -> None:
    directory, host = cluster.directory, socket.gethostname().partition(".")[0]
    ports = _free_ports(1 + len(cluster.nodes))
    gres = f" Gres=gpu:{num_gpus}" if num_gpus else ""
    text = _CONF.format(host=host, ports=ports, directory=directory)
    for name, port in zip(cluster.nodes, ports[1:], strict=True):
        text += _NODE.format(name=name, host=host, port=port, cpus=cpus, memory_mb=memory_mb, gres=gres)
        (directory / name).mkdir()
    (directory / "state").mkdir()
    (directory / "slurm.conf").write_text(text, encoding="utf-8")
    gpu_paths = [directory / f"gpu{number}" for number in range(num_gpus)]  # slurmd counts the files that exist
    for path in gpu_paths:
        path.touch()
    lines = [f"Name=gpu File={path}\n" for path in gpu_paths]
    (directory / "gres.conf").write_text("".join(lines), encoding="utf-8")
    key_path = directory / "munge.key"
    key_path.touch(mode=0o600)
    key_path.write_bytes(os.urandom(128))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _start(cluster: Cluster) -> None:
    directory = cluster.directory

    def all_idle() -> bool:
        if ended := [str(daemon.args) for daemon in cluster.daemons.values() if daemon.poll() is not None]:
            logs = "\n".join(path.read_text(errors="replace")[-800:] for path in sorted(directory.glob("*.out")))
            raise RuntimeError(f"ended at once: {', '.join(ended)}\n{logs}")
        with suppress(RuntimeError):  # slurmctld does not listen yet
            lines = cluster.run(["sinfo", "--Node", "--noheader", "--states=idle", "--format=%N"])
            return set(lines.split()) == set(cluster.nodes)
        return False

    munge_files = {
        "socket": "munge.socket",
        "key-file": "munge.key",
        "pid-file": "munged.pid",
        "log-file": "munged.log",
    }
    munge_files |= {"seed-file": "munged.seed"}
    munge_options = [f"--{name}={directory / file}" for name, file in munge_files.items()]
    cluster.start("munged", "munged", "--foreground", "--force", *munge_options)
    wait_for((directory / "munge.socket").exists, "munged", _START_S)
    cluster.start("slurmctld", "slurmctld", "-D")
    for node in cluster.nodes:
        cluster.start_node(node)
    wait_for(all_idle, "idle nodes", _START_S)


def _stop(cluster: Cluster) -> None:
    """Jobs, then daemons, then whatever of them is left."""
    with suppress(RuntimeError, TimeoutError, subprocess.TimeoutExpired):
        cluster.run(["scancel", "--user=root"])
        wait_for(lambda: not cluster.run(["squeue", "--noheader"]), "jobs to end", _STOP_S)
    daemons = list(cluster.daemons.values())
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in reversed(daemons):
        with suppress(subprocess.TimeoutExpired):
            daemon.wait(_STOP_S)
    left = cluster.processes()
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, _STOP_S)
    for daemon in daemons:
        daemon.wait(_STOP_S)


def _parse(line: str) -> Job:
    job_id, task, name, state, node, *times = line.split("|")
    submitted, started, ended = (None if text == "N/A" else datetime.fromisoformat(text) for text in times)
    assert submitted is not None
    return Job(job_id, int(task) if task.isdigit() else None, name, state, node, submitted, started, ended)
