"""Two hosts with addresses of their own: network namespaces joined by a pair of virtual interfaces."""

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpuops.training.test_faults import Room, assert_alike, open_when_read, record

pytestmark = pytest.mark.slow
ADDRESSES = ("10.231.7.1", "10.231.7.2")


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, str]]:
    """Names of two namespaces that reach each other and nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` here (iproute2): two hosts cannot be made")
    tag = uuid.uuid4().hex[:6]
    names = f"gpuops-{tag}-a", f"gpuops-{tag}-b"
    made = ip("netns", "add", names[0], check=False)
    if made.returncode:
        pytest.skip(f"`ip netns add` is not permitted here: {made.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        links = f"gp{tag}a", f"gp{tag}b"
        pair = ip("link", "add", links[0], "type", "veth", "peer", "name", links[1], check=False)
        if pair.returncode:
            pytest.skip(f"virtual interfaces are not permitted here: {pair.stderr.strip()}")
        for name, link, address in zip(names, links, ADDRESSES, strict=True):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "link", "set", link, "name", "veth0")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "veth0")
            ip("-n", name, "link", "set", "veth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name, check=False)


class Cluster:
    """The launcher of each host, played by the test as Slurm would: it starts a host's command, and starts it again."""

    def __init__(self, room: Room, hosts: tuple[str, str], run: Path) -> None:
        self.room, self.hosts, self.run = room, hosts, run
        self.told = run.with_suffix(".told")
        self.started: list[subprocess.Popen[str]] = []

    def start(self, host: int, **environ: str) -> subprocess.Popen[str]:
        launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"]
        launch += ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29400", "--rdzv-id=job"]
        # Its own name tells an agent nothing here: which host the rendezvous is on has to be said.
        launch += [
            f"--rdzv-conf=is_host={host == 0},keep_alive_interval=1,keep_alive_max_attempt=2",
            f"--local-addr={ADDRESSES[host]}",
            "--monitor-interval=0.1",
        ]
        main = ["-m", "gpuops.training.main", "fit", f"--config={self.room.root / 'run.yaml'}"]
        main += [f"--trainer.default_root_dir={self.run}"]
        with (self.told / f"errors-{len(self.started)}").open("w") as errors:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.hosts[host], sys.executable, *launch, *main],
                env=self.room.environment(
                    self.told, GLOO_SOCKET_IFNAME="veth0", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", **environ
                ),
                stderr=errors,
                stdout=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def lose(self, process: subprocess.Popen[str], worker: int) -> None:
        """Everything on a host dies at once: its agent and its worker."""
        os.kill(process.pid, signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        process.wait()

    def errors(self) -> str:
        return "\n".join(file.read_text()[-3000:] for file in sorted(self.told.glob("errors-*")))

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def cluster(room: Room, hosts: tuple[str, str], request: pytest.FixtureRequest) -> Iterator[Cluster]:
    run = room.root / request.node.name.replace("[", "-").rstrip("]")
    cluster = Cluster(room, hosts, run)
    cluster.told.mkdir()
    yield cluster
    cluster.close()


def host_of(pid: int, hosts: tuple[str, str]) -> int:
    return hosts.index(ip("netns", "identify", str(pid)).stdout.strip())


def test_training_across_two_hosts_is_training_on_one(cluster: Cluster, alone: Path) -> None:
    processes = [cluster.start(0), cluster.start(1)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0], cluster.errors()
    assert record(cluster.run)["world_size"] == 2
    assert_alike(cluster.run, alone)


@pytest.mark.parametrize("lost", [1, 0])
def test_a_lost_host_is_started_again(cluster: Cluster, alone: Path, lost: int) -> None:
    """The other host's loss needs that host's command again; the loss of the rendezvous host needs both."""
    for rank in range(2):
        os.mkfifo(cluster.told / f"go-{rank}")
    processes = [cluster.start(0, PAUSE="7"), cluster.start(1, PAUSE="7")]
    streams = [open_when_read(cluster.told / f"go-{rank}", processes) for rank in range(2)]
    pids = [int((cluster.told / f"paused-{rank}").read_text()) for rank in range(2)]
    for stream in streams:
        stream.close()
    worker = next(pid for pid in pids if host_of(pid, cluster.hosts) == lost)
    cluster.lose(processes[lost], worker)
    for rank in range(2):  # the pause is over for whoever comes to this step again
        (cluster.told / f"go-{rank}").unlink()
        (cluster.told / f"go-{rank}").write_text("")
    if lost == 0:
        assert processes[1].wait(timeout=120) != 0, "without the rendezvous the other agent gives up"
        processes[1] = cluster.start(1)
    processes[lost] = cluster.start(lost)
    assert [process.wait(timeout=180) for process in processes] == [0, 0], cluster.errors()
    told = record(cluster.run)
    assert told["status"] == "finished"
    assert told["attempts"][-1]["from_step"] == 6
    assert_alike(cluster.run, alone)
