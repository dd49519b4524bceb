"""Ray nodes on one Linux machine, each in a network namespace with an address of its own, as if on many machines.

As a library, by root:

    with Nodes(count=3, cpus=2) as nodes:
        subprocess.run(nodes.command(0, ["rayft", "run", "job.yaml"]), env=nodes.environ, check=True)
        nodes.kill(2)

As a command, where the nodes stay until `down`:

    sudo .venv/bin/python cluster/local.py up --nodes 3 --cpus 2
    sudo .venv/bin/python cluster/local.py exec 0 -- rayft run job.yaml

A node reaches the other nodes and this machine, and nothing else: no route leads to the internet. All nodes share this
machine's disk, /dev/shm, memory, cores and host name.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

RAY = Path(sys.executable).with_name("ray")
START_S = 120  # a head needs 6 s on two idle cores; this is for busy ones

# For a process on the head, so that the caller needs no Ray: ADDRESS then `alive N SECONDS` or `drain IP SECONDS`.
QUESTION = """
import sys, time
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION
address, question, wanted, seconds = sys.argv[1:]
client, end = GcsClient(address=address), time.time() + float(seconds)
while True:
    known = client.get_all_node_info(timeout=5).values()
    alive = {node.node_manager_address: node.node_id.hex() for node in known if node.state == node.ALIVE}
    if question == "drain" or len(alive) == int(wanted):
        break
    if time.time() > end:
        sys.exit(f"Ray counts {len(alive)} live nodes after {seconds} s, not {wanted}: {', '.join(sorted(alive))}")
    time.sleep(0.1)
if question == "drain":
    client.drain_node(alive[wanted], DRAIN_NODE_REASON_PREEMPTION, "by cluster/local.py", int(1000 * end))
"""


def ip(*arguments: str) -> str:
    """What `ip ARGUMENTS` printed; RuntimeError with what it said when it failed."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _ended(pid: int) -> bool:
    """Is the process gone, or a zombie that only its parent's notice keeps?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def check_machine() -> None:
    faults = {
        "the command `ip` is missing (Debian: apt-get install iproute2)": shutil.which("ip") is None,
        "only root may make network namespaces (run it with sudo)": os.geteuid() != 0,
        f"{RAY} is missing (run it with the Python of the environment that has Ray)": not RAY.exists(),
    }
    if any(faults.values()):
        raise RuntimeError(f"no Ray nodes here: {'; '.join(fault for fault, found in faults.items() if found)}")


@dataclass
class Node:
    """One namespace with its Ray processes. `namespace` is also the name of the host's end of its link."""

    name: str
    namespace: str
    ip: str
    head: bool
    folder: str  # Ray's --temp-dir; the output of `ray start` is in the file of this name with .log
    pid: int = 0  # of `ray start --block`; 0 before the first start

    @property
    def pids(self) -> list[int]:
        """All processes of the namespace: Ray's own, workers, and what was started with `Nodes.command`."""
        return [int(pid) for pid in ip("netns", "pids", self.namespace).split()]

    @property
    def alive(self) -> bool:
        """Whether its raylet runs. `ray start` lives on after a drain; what Ray believes can lag: see `Nodes.wait`."""
        names = []
        for pid in self.pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                names.append(Path(f"/proc/{pid}/comm").read_text())
        return "raylet\n" in names


@dataclass
class Nodes:
    """`count` nodes, of which the first is the head: up within `with`.

    They end with the process that started them, also when it is killed: another process waits for its end.
    """

    count: int
    cpus: int = 1  # of each node
    gpus: int = 0  # of each node; the nodes do not divide the GPUs among them
    object_store_memory: int = 200_000_000  # bytes of each node
    resources: dict[str, float] = field(default_factory=dict)  # of each node
    environment: dict[str, str] = field(default_factory=dict)  # for all processes; {gateway} in a value is `gateway`
    with_dashboard: bool = True
    folder: str = field(default_factory=tempfile.gettempdir)  # a short one: paths of sockets end at 107 bytes
    name: str = field(default_factory=lambda: os.urandom(3).hex())
    number: int = 0  # N of 10.N.0.0/24, in the names of the bridge and the namespaces; not for the caller, as `nodes`
    nodes: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._children: dict[str, subprocess.Popen[bytes]] = {}  # by node, and the guard
        self.home = Path(self.folder, f"rayft-{self.name}")  # state, logs and Ray's files, until `down`

    @classmethod
    def load(cls, folder: str, name: str) -> Self:
        """The cluster that another process started; RuntimeError if there is none."""
        try:
            state = json.loads(Path(folder, f"rayft-{name}", "state.json").read_text())
        except FileNotFoundError:
            raise RuntimeError(f"no cluster {name!r} in {folder}: start it with `up`") from None
        return cls(**state | {"nodes": [Node(**node) for node in state["nodes"]]})

    @property
    def gateway(self) -> str:
        """This machine's address as the nodes see it, where servers for them listen."""
        return f"10.{self.number}.0.254"

    @property
    def address(self) -> str:
        """What RAY_ADDRESS wants. A driver has to run on a node."""
        return f"10.{self.number}.0.1:6379"

    @property
    def dashboard(self) -> str:
        """URL of the job server, for this machine and the nodes; nobody answers without `with_dashboard`."""
        return f"http://10.{self.number}.0.1:8265"

    @property
    def environ(self) -> dict[str, str]:
        """Environment of a process on a node: this process's own, and what leads to this Ray and no other."""
        path = f"{RAY.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        leads = {"PATH": path, "RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled"}
        return os.environ | leads | {k: v.replace("{gateway}", self.gateway) for k, v in self.environment.items()}

    def command(self, index: int, argv: Sequence[str]) -> list[str]:
        """`argv` as a command that runs on a node, with `environ`.

        Ray looks for its raylet among the processes of the machine, so a driver on any node joins the head's.
        """
        return ["ip", "netns", "exec", self.nodes[index].namespace, *argv]

    def __enter__(self) -> Self:
        """Up when Ray counts `count` nodes; on an error, nothing is left."""
        check_machine()
        try:
            self.home.mkdir()
        except FileExistsError:
            raise RuntimeError(f"{self.home} exists: end cluster {self.name!r} with `down` first") from None
        try:
            self._save()
            guard = [__file__, "down", "--folder", self.folder, "--name", self.name, "--after", str(os.getpid())]
            self._children["guard"] = subprocess.Popen([sys.executable, *guard], start_new_session=True)
            self._make_network()
            nodes = [self._make_node() for _ in range(self.count)]
            self._start(nodes[:1])
            self._start(nodes[1:])
            self.wait(alive=self.count)
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.down()

    def leave(self) -> None:
        """Let the nodes outlive this process."""
        if guard := self._children.pop("guard", None):
            guard.kill()
            guard.wait()

    def down(self) -> None:
        """End all processes; delete namespaces, links, bridge and folder."""
        # The bridge is the claim on the number, so it goes after all that bears the number.
        for index, name in enumerate([*(node.namespace for node in self.nodes), f"rayft{self.number}"]):
            if has_namespace := Path("/run/netns", name).exists():
                self.kill(index)
            if Path("/sys/class/net", name).exists():
                ip("link", "delete", name)
            if has_namespace:
                ip("netns", "delete", name)
        self.nodes, self.number = [], 0
        shutil.rmtree(self.home, ignore_errors=True)
        self.leave()

    def start(self, index: int) -> None:
        """Start a node that has ended, at the same address, with its link up.

        A head starts empty, because Ray keeps its tables in the head's memory: start the other nodes again too.
        """
        if self.nodes[index].alive:
            raise RuntimeError(f"node {index} runs already")
        self.kill(index)
        self.heal(index)
        # Ray takes the raylets of other nodes, which it finds by their arguments, for a head that runs here already.
        Path(self.nodes[index].folder, "ray_current_cluster").unlink(missing_ok=True)
        self._start([self.nodes[index]])

    def add(self) -> int:
        """Start one more node like the others; its index."""
        self._start([self._make_node()])
        return len(self.nodes) - 1

    def kill(self, index: int) -> None:
        """SIGKILL to every process of the node at once, as a power cut. Returns when all have ended."""
        killed: set[int] = set()
        while pids := self.nodes[index].pids:  # again, because one may have forked in between
            killed.update(pids)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        while any(not _ended(pid) for pid in killed):  # a process leaves its namespace before it ends
            time.sleep(0.01)
        if child := self._children.pop(self.nodes[index].name, None):
            child.wait()

    def stop(self, index: int, timeout: float = 40) -> None:
        """SIGTERM to `ray start`, as a machine's orderly shutdown; SIGKILL to what is left after `timeout` s.

        Ray 2.60 takes it as a preemption: it drains the node for up to 30 s while work runs there
        (RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S).
        """
        node, end = self.nodes[index], time.monotonic() + timeout
        if node.pid in node.pids:
            os.kill(node.pid, signal.SIGTERM)
            while node.pids and time.monotonic() < end:
                time.sleep(0.05)
        self.kill(index)

    def cut(self, index: int) -> None:
        """Take the node's link down: the node lives, and what is sent to it or by it gets lost without a word."""
        ip("link", "set", self.nodes[index].namespace, "down")

    def heal(self, index: int) -> None:
        """Take the link up again. A node that Ray has given up meanwhile ends itself: `start` it."""
        ip("link", "set", self.nodes[index].namespace, "up")

    def wait(self, alive: int, timeout: float = 60) -> None:
        """Return when the head counts `alive` live nodes; TimeoutError after `timeout` s."""
        self._ask(TimeoutError, "alive", alive, timeout)

    def drain(self, index: int, deadline_s: float = 30) -> None:
        """A preemption notice through Ray. At the deadline nothing happens, unless the caller kills the node."""
        self._ask(RuntimeError, "drain", self.nodes[index].ip, deadline_s)

    def _ask(self, fault: type[Exception], question: str, about: object, seconds: float) -> None:
        asking = ["timeout", str(seconds + 10), sys.executable, "-c", QUESTION, self.address]  # longer if Ray is silent
        argv = self.command(0, [*asking, question, str(about), str(seconds)])
        done = subprocess.run(argv, env=self.environ, capture_output=True, text=True, check=False)
        if done.returncode:
            raise fault(done.stderr.strip()[-2000:] or f"no answer from Ray at {self.address}")

    def _make_network(self) -> None:
        """Claim a free 10.N.0.0/24 by creating its bridge, which only one process can."""
        routes = [route["dst"] for route in json.loads(ip("-json", "-4", "route", "show"))]
        taken = [ipaddress.IPv4Network(route) for route in routes if route != "default"]
        for number in range(254, 0, -1):
            if any(network.overlaps(ipaddress.IPv4Network(f"10.{number}.0.0/24")) for network in taken):
                continue
            try:
                ip("link", "add", f"rayft{number}", "type", "bridge")
            except RuntimeError as error:
                if "File exists" in str(error):
                    continue
                raise
            self.number = number
            self._save()
            ip("address", "add", f"{self.gateway}/24", "dev", f"rayft{number}")
            ip("link", "set", f"rayft{number}", "up")
            return
        raise RuntimeError("no network 10.N.0.0/24 is free here")

    def _make_node(self) -> Node:
        index = len(self.nodes)
        name = f"rayft{self.number}-{index}"  # 12 bytes at most, of the 15 that Linux allows an interface
        node = Node(f"node-{index}", name, f"10.{self.number}.0.{index + 1}", index == 0, str(self.home / str(index)))
        self.nodes.append(node)
        self._save()  # before anything of it exists, so that `down` finds it
        ip("netns", "add", name)
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", name, "master", f"rayft{self.number}", "up")
        ip("-netns", name, "address", "add", f"{node.ip}/24", "dev", "eth0")
        ip("-netns", name, "link", "set", "eth0", "up")
        ip("-netns", name, "link", "set", "lo", "up")
        return node

    def _start(self, nodes: Sequence[Node]) -> None:
        """Start the nodes side by side; RuntimeError with the end of the log if one does not come up."""
        own = {key: value for key, value in self.environ.items() if key != "RAY_ADDRESS"}
        for node in nodes:
            argv = ["ip", "netns", "exec", node.namespace, *self._ray_start(node)]
            with open(f"{node.folder}.log", "wb") as log:
                child = subprocess.Popen(argv, stdout=log, stderr=log, env=own, cwd="/", start_new_session=True)
            self._children[node.name], node.pid = child, child.pid
        self._save()
        end = time.monotonic() + START_S
        for node in nodes:
            # Printed when `ray start` is done, which is later than the head first counts the node.
            while "Ray runtime started." not in (log_text := Path(f"{node.folder}.log").read_text()):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._children[node.name].wait(timeout=0.05)
                    end = 0
                if time.monotonic() > end:
                    raise RuntimeError(f"{node.name} did not start:\n" + "\n".join(log_text.splitlines()[-20:]))

    def _ray_start(self, node: Node) -> list[str]:
        argv = [
            str(RAY), "start", "--block", f"--node-ip-address={node.ip}", f"--temp-dir={node.folder}",
            f"--num-cpus={self.cpus}", f"--num-gpus={self.gpus}", f"--resources={json.dumps(self.resources)}",
            f"--object-store-memory={self.object_store_memory}", "--disable-usage-stats",
        ]  # fmt: skip
        if not node.head:
            return [*argv, f"--address={self.address}"]
        return [*argv, "--head", f"--include-dashboard={self.with_dashboard}", "--dashboard-host=0.0.0.0"]

    def _save(self) -> None:
        new = self.home / "state.new"
        new.write_text(json.dumps(asdict(self), indent=1))
        new.replace(self.home / "state.json")


def show(nodes: Nodes) -> None:
    print(f"address {nodes.address}, job server {nodes.dashboard}, this machine {nodes.gateway}, files {nodes.home}")
    for index, node in enumerate(nodes.nodes):
        link = Path("/sys/class/net", node.namespace, "operstate").read_text().strip()
        print(f"{index:3}  {node.ip:13}  {'alive' if node.alive else 'ended'}  link {link}  {len(node.pids)} processes")


def parse() -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", default="local", help="which cluster (default: %(default)s)")
    common.add_argument("--folder", default=tempfile.gettempdir(), help="where its files are (default: %(default)s)")
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", parents=[common], help="start nodes and leave them running")
    up.add_argument("--nodes", type=int, default=3)
    up.add_argument("--cpus", type=int, default=1, help="of each node")
    for name in ("kill", "stop", "cut", "heal", "start", "drain", "add"):
        verb = commands.add_parser(name, parents=[common], help=str(getattr(Nodes, name).__doc__).partition("\n")[0])
        if name != "add":
            verb.add_argument("node", type=int)
    commands.add_parser("status", parents=[common], help="what runs")
    execute = commands.add_parser("exec", parents=[common], help="run a command on a node: exec 0 -- COMMAND")
    execute.add_argument("node", type=int)
    execute.add_argument("argv", nargs="+")
    down = commands.add_parser("down", parents=[common], help="end all nodes, also if what started them is gone")
    down.add_argument("--after", type=int, metavar="PID", help="wait for the end of this process first")
    return parser.parse_args()


def main() -> None:
    given = parse()
    check_machine()
    if given.command == "up":
        nodes = Nodes(given.nodes, given.cpus, folder=given.folder, name=given.name).__enter__()
        nodes.leave()
        show(nodes)
        again = f"{sys.executable} {__file__}", f"--folder {given.folder} --name {given.name}"
        print(f"on a node:  sudo {again[0]} exec {again[1]} 0 -- rayft run JOB.yaml")
        print(f"as a job:   RAY_API_SERVER_ADDRESS={nodes.dashboard} ray job submit -- rayft run /PATH/OF/JOB.yaml")
        print(f"the end:    sudo {again[0]} down {again[1]}")
        return
    if given.command == "down" and given.after:
        with contextlib.suppress(ProcessLookupError):
            select.select([os.pidfd_open(given.after)], [], [])
    nodes = Nodes.load(given.folder, given.name)
    about = [given.node] if "node" in given else []
    if about and given.node not in range(len(nodes.nodes)):
        raise RuntimeError(f"no node {given.node}: there are {len(nodes.nodes)}, from 0")
    if given.command == "exec":
        os.execvpe("ip", nodes.command(given.node, given.argv), nodes.environ)
    if given.command != "status":
        getattr(nodes, given.command)(*about)
    if given.command != "down":
        show(nodes)


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, TimeoutError) as error:
        sys.exit(f"error: {error}")
