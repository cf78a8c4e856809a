"""Hosts inside this one: Linux namespaces with addresses, host names, sshd and, on request, SLURM.

Every host has its own network, host name, processes and shared memory, and sees this machine's files; a bridge joins
them. Nothing is left outside: ending a host's first process ends everything in it, and all of them end with pytest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

SUBNET = "10.213.57"
WAIT_S = 20.0
BASICS = ("unshare", "nsenter", "setpriv", "ip")
SLURM = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SSH = ("sshd", "ssh", "ssh-keygen", "pdsh")
PACKAGES = "slurmctld slurmd slurm-client munge pdsh openssh-server openssh-client iproute2"


def missing(*programs: str) -> str:
    """Why this machine cannot play a cluster with these programs; empty when it can."""
    if os.geteuid() != 0:
        return "CLUSTER TESTS SKIPPED: they make network namespaces, which needs root"
    absent = [name for name in (*BASICS, *programs) if not shutil.which(name, path=_path())]
    if absent:
        return f"CLUSTER TESTS SKIPPED: no {', '.join(absent)}; on Debian: apt-get install {PACKAGES}"
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"], capture_output=True
    )
    return "" if tried.returncode == 0 else "CLUSTER TESTS SKIPPED: this container may not make namespaces"


class Nodes:
    """``count`` hosts n1, n2, … Use as a context manager.

    Args:
        folder: for logs, keys and configuration; any directory that is not there yet.
        count: number of hosts.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.names = [f"n{index}" for index in range(1, count + 1)]
        self._inside: dict[str, int] = {}
        self._cleanup = ExitStack()

    def __enter__(self) -> Nodes:
        with self._cleanup:
            self.folder.mkdir(parents=True)
            (self.folder / "hosts").write_text(
                "127.0.0.1 localhost\n" + "".join(f"{address(name)} {name}\n" for name in self.names)
            )
            switch = self._start_namespace(
                "switch", "ip link add br0 type bridge; ip link set br0 up; touch $READY; exec sleep infinity"
            )
            for name in self.names:
                self._inside[name] = self._start_namespace(name, HOST.format(name=name, folder=self.folder))
            for name in self.names:
                self._plug_in(name, switch)
            self._cleanup = self._cleanup.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._cleanup.close()

    def command(self, name: str, *arguments: str) -> list[str]:
        """The command line that runs ``arguments`` on host ``name``, in this process's directory."""
        flags = ["--net", "--uts", "--ipc", "--mount", "--pid", f"--wd={os.getcwd()}"]
        return ["nsenter", f"--target={self._inside[name]}", *flags, "--", *arguments]

    def run(self, name: str, *arguments: str, timeout: float = 60, **options: Any) -> str:
        """Standard output of a command on host ``name``, which must succeed."""
        done = subprocess.run(
            self.command(name, *arguments),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **options,
        )
        assert done.returncode == 0, f"{arguments} on {name}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def start(
        self, name: str, *arguments: str, log: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command on host ``name``; it ends with the hosts. Its output goes to ``log`` in the folder."""
        with (self.folder / log).open("ab") as output:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self.command(name, *arguments)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
            )
        self._cleanup.callback(_end, process)
        return process

    def start_ssh(self) -> None:
        """sshd on every host, and an ssh that reaches it without a question."""
        keys = self.folder / "ssh"
        keys.mkdir(mode=0o700)
        for name in ("user", "host"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True
            )
        (keys / "config").write_text(
            f"Host *\n  IdentityFile {keys}/user\n  StrictHostKeyChecking no\n"
            f"  UserKnownHostsFile {keys}/known_hosts\n  LogLevel ERROR\n  BatchMode yes\n"
        )
        (keys / "sshd").write_text(
            f"HostKey {keys}/host\nAuthorizedKeysFile {keys}/user.pub\nStrictModes no\nUsePAM no\nPidFile none\n"
        )
        server = shutil.which("sshd", path=_path())
        assert server
        for name in self.names:
            self.run(name, "mount", "--bind", str(keys / "config"), "/etc/ssh/ssh_config")
            self.run(name, "sh", "-c", "mkdir -p /run/sshd")
            self.start(name, server, "-D", "-e", "-f", str(keys / "sshd"), log=f"sshd-{name}.log")
        first = self.names[0]
        for name in self.names:
            wait_for(
                lambda name=name: (
                    subprocess.run(self.command(first, "ssh", name, "true"), capture_output=True).returncode
                    == 0
                ),
                f"sshd on {name}",
            )

    def start_slurm(self, cpus: int) -> dict[str, str]:
        """slurmctld on n1, slurmd everywhere; returns the environment for commands of SLURM on a host."""
        folder = self.folder / "slurm"
        (folder / "state").mkdir(parents=True)
        last = len(self.names)
        text = SLURM_CONF.format(folder=folder, address=address("n1"), last=last, cpus=cpus)
        (folder / "slurm.conf").write_text(text)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        self.start("n1", "slurmctld", "-D", "-i", log="slurmctld.log", environment=environment)
        for name in self.names:
            self.start(name, "slurmd", "-D", log=f"slurmd-{name}.log", environment=environment)
        idle = self.command("n1", "sinfo", "--noheader", "--Node", "--states=idle", "--format=%N")
        wait_for(
            lambda: len(subprocess.run(idle, capture_output=True, env=environment).stdout.split()) == last,
            f"SLURM (logs in {self.folder})",
        )
        return environment

    def _start_namespace(self, name: str, script: str) -> int:
        """Process id, seen from here, of the first process of a new host."""
        ready = self.folder / f"{name}.ready"
        flags = ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (self.folder / f"{name}.log").open("wb") as log:
            outer = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", *flags, "--", "sh", "-ec", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "READY": str(ready), "PATH": _path()},
            )
        self._cleanup.callback(_end, outer)
        wait_for(ready.exists, f"namespace {name} (log in {self.folder})")
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        return int(children[0])

    def _plug_in(self, name: str, switch: int) -> None:
        """A cable from ``name`` to the switch."""
        port = f"port-{name}"
        ends = ["ip", "link", "add", "eth0", "netns", str(self._inside[name]), "type", "veth"]
        subprocess.run([*ends, "peer", "name", port, "netns", str(switch)], check=True)
        bridge = [
            "nsenter",
            f"--target={switch}",
            "--net",
            "--",
            "ip",
            "link",
            "set",
            port,
            "master",
            "br0",
            "up",
        ]
        subprocess.run(bridge, check=True)
        self.run(name, "ip", "address", "add", f"{address(name)}/24", "dev", "eth0")
        self.run(name, "ip", "link", "set", "eth0", "up")


def address(name: str) -> str:
    """The address of host ``n3``."""
    return f"{SUBNET}.{name.removeprefix('n')}"


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = WAIT_S) -> None:
    """Until ``condition()`` is true; AssertionError naming ``what`` when it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.1)


def rank_environment(base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a user's shell has with the environment active: this interpreter first on PATH, no rank variables."""
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    kept = {name: value for name, value in base.items() if name not in hidden}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{_path()}"}


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


HOST = """
hostname {name}
mount --make-rprivate /
mount --bind {folder}/hosts /etc/hosts
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
touch $READY
while :; do sleep 3600 & wait; done
"""

# What differs from SLURM's defaults is there so that a test does not wait: grace periods of seconds, jobs that start
# at once. The rest is what runs without munge, cgroups and a database.
SLURM_CONF = """
ClusterName=test
SlurmctldHost=n1({address})
SlurmUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
KillWait=5
ReturnToService=2
MinJobAge=3600
NodeName=n[1-{last}] CPUs={cpus} RealMemory=1000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
