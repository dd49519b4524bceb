"""Ray nodes in network namespaces are machines of their own, can fail in every way, and leave nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import local
from cluster.local import Nodes

pytestmark = pytest.mark.cluster

CONNECT = "import json, ray, socket, sys, time; ray.init(log_to_driver=False, logging_level='error')\n"

ALIVE = "print(json.dumps([node['NodeManagerAddress'] for node in ray.nodes() if node['Alive']]))"

# One task for each node, by the resource that Ray gives every node for its address.
WHERE = """
@ray.remote(num_cpus=0)
def where():
    return ray.util.get_node_ip_address(), socket.gethostname()
addresses = [node['NodeManagerAddress'] for node in ray.nodes() if node['Alive']]
places = [where.options(resources={f'node:{address}': 0.01}).remote() for address in addresses]
print(json.dumps(dict(zip(addresses, ray.get(places), strict=True))))
"""

# An actor keeps the node busy: an idle one ends as soon as it is drained.
DRAINED = """
@ray.remote(num_cpus=0, resources={f'node:{sys.argv[1]}': 0.01})
class Busy:
    def ready(self):
        return True
busy = Busy.remote()
ray.get(busy.ready.remote())
print('ready', flush=True)
while not (draining := ray._private.state.state.get_draining_nodes()):
    time.sleep(0.1)
addresses = {node['NodeID']: node['NodeManagerAddress'] for node in ray.nodes()}
print(json.dumps({addresses[node]: deadline / 1000 - time.time() for node, deadline in draining.items()}))
"""


def driver(nodes: Nodes, script: str) -> Any:
    """What a driver on the head printed, as JSON."""
    argv = nodes.command(0, [sys.executable, "-c", CONNECT + script])
    done = subprocess.run(argv, env=nodes.environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not after {seconds} s"
        time.sleep(0.05)


def running(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def traces(number: int, home: Path) -> list[str]:
    """What is left of a cluster: interfaces, namespaces, the folder, processes that name it."""
    names = re.compile(rf"rayft{number}(-\d+)?")
    found = [
        name for folder in ("/sys/class/net", "/run/netns") for name in os.listdir(folder) if names.fullmatch(name)
    ]
    found += [str(home)] if home.exists() else []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(home) in argument for argument in process.info["cmdline"] or ()):
            found.append(f"process {process.pid}")
    return found


def ips(nodes: Nodes, *indices: int) -> list[str]:
    return sorted(nodes.nodes[index].ip for index in indices)


@pytest.fixture
def third(nodes: Nodes) -> Iterator[int]:
    """A node to mistreat; it is started anew."""
    yield 2
    nodes.kill(2)
    nodes.start(2)
    nodes.wait(alive=3)


def test_each_node_has_an_address_of_its_own_and_runs_tasks(nodes: Nodes) -> None:
    places = driver(nodes, WHERE)
    assert sorted(places) == [f"10.{nodes.number}.0.{host}" for host in (1, 2, 3)] == ips(nodes, 0, 1, 2)
    assert places == {address: [address, socket.gethostname()] for address in places}
    assert [node.head for node in nodes.nodes] == [True, False, False]
    assert all(node.alive for node in nodes.nodes)


def test_job_server_answers_this_machine(nodes: Nodes) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{nodes.dashboard}/api/version", timeout=10) as answer:
        assert json.load(answer)["ray_version"]


def test_nodes_reach_a_server_on_this_machine(nodes: Nodes) -> None:
    with socket.create_server((nodes.gateway, 0)) as server:
        call = f"import socket; socket.create_connection({server.getsockname()!r}, timeout=10)"
        subprocess.run(nodes.command(2, [sys.executable, "-c", call]), timeout=30, check=True)
        server.settimeout(10)
        connection, (caller, _) = server.accept()
        connection.close()
    assert caller == nodes.nodes[2].ip


def test_killed_node_is_gone_and_the_others_stay(nodes: Nodes, third: int) -> None:
    there = nodes.nodes[third].pids
    nodes.kill(third)
    assert running(there) == []
    nodes.wait(alive=2, timeout=30)
    assert sorted(driver(nodes, ALIVE)) == ips(nodes, 0, 1)


def test_stopped_node_takes_its_leave(nodes: Nodes, third: int) -> None:
    there = nodes.nodes[third].pids
    nodes.stop(third)
    assert running(there) == []
    nodes.wait(alive=2, timeout=2)
    assert sorted(driver(nodes, ALIVE)) == ips(nodes, 0, 1)


def test_node_that_is_cut_off_lives_on_and_ends_when_it_hears_that_it_was_given_up(nodes: Nodes, third: int) -> None:
    nodes.cut(third)
    nodes.wait(alive=2, timeout=60)
    assert nodes.nodes[third].alive
    nodes.heal(third)
    until(lambda: not nodes.nodes[third].alive, seconds=30)


def test_node_that_is_cut_off_for_a_moment_stays_in_the_cluster(nodes: Nodes) -> None:
    before = nodes.nodes[2].pids
    nodes.cut(2)
    nodes.heal(2)
    assert sorted(driver(nodes, WHERE)) == ips(nodes, 0, 1, 2)
    assert set(before) <= set(nodes.nodes[2].pids)


def test_drained_node_is_announced_with_its_deadline(nodes: Nodes, third: int) -> None:
    address = nodes.nodes[third].ip
    argv = nodes.command(0, [sys.executable, "-c", CONNECT + DRAINED, address])
    with subprocess.Popen(argv, env=nodes.environ, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n"
        nodes.drain(third, deadline_s=40)
        left = json.loads(started.stdout.readline())
    assert list(left) == [address]
    assert 20 < left[address] < 40


def test_added_node_joins(nodes: Nodes) -> None:
    index = nodes.add()
    nodes.wait(alive=4)
    assert sorted(driver(nodes, ALIVE)) == ips(nodes, 0, 1, 2, index)
    nodes.stop(index)
    nodes.wait(alive=3)


def test_head_starts_again_while_other_nodes_still_run(nodes: Nodes) -> None:
    nodes.kill(0)
    assert nodes.nodes[1].alive
    nodes.start(0)
    assert nodes.nodes[0].ip in driver(nodes, ALIVE)


def test_nothing_is_left_after_an_exception(network_namespaces: None) -> None:
    cluster = Nodes(1, with_dashboard=False)
    there: list[int] = []
    numbers: list[int] = []

    def interrupted() -> None:
        with cluster:
            there.extend(cluster.nodes[0].pids)
            numbers.append(cluster.number)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert there
    assert running(there) == []
    assert traces(numbers[0], cluster.home) == []


def test_nothing_is_left_when_the_starter_is_killed(network_namespaces: None) -> None:
    name = f"test-{os.getpid()}"
    home = Nodes(1, name=name).home
    script = f"from cluster.local import Nodes; Nodes(1, name={name!r}).__enter__()"
    with subprocess.Popen([sys.executable, "-c", script], cwd=Path(local.__file__).parent.parent) as starter:
        until((home / "0.log").is_file, seconds=30)
        nodes = Nodes.load(str(home.parent), name)
        until(lambda: len(nodes.nodes[0].pids) > 1, seconds=60)
        starter.send_signal(signal.SIGKILL)
    until(lambda: traces(nodes.number, home) == [], seconds=30)


def test_node_that_does_not_start_says_why_and_leaves_nothing(network_namespaces: None) -> None:
    cluster = Nodes(1, resources={"CPU": 1})
    with pytest.raises(RuntimeError, match=r"(?s)node-0 did not start:.*num_cpus"):
        cluster.__enter__()
    assert not cluster.home.exists()


def test_missing_command_names_its_debian_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match="apt-get install iproute2"):
        Nodes(1).__enter__()


def test_command_starts_shows_and_ends_nodes(network_namespaces: None) -> None:
    name = f"test-{os.getpid()}"

    def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, local.__file__, command, "--name", name, *arguments]
        return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)

    try:
        up = run("up", "--nodes", "1", "--cpus", "1")
        assert "address 10." in up.stdout, up.stderr
        nodes = Nodes.load(Nodes(1).folder, name)
        assert nodes.dashboard in up.stdout
        assert "`down` first" in run("up").stderr
        assert run("exec", "0", "--", "printenv", "RAY_ADDRESS").stdout == f"{nodes.address}\n"
        assert re.search(rf"0  {nodes.nodes[0].ip} +alive  link up", run("status").stdout)
        assert "no node 1" in run("kill", "1").stderr
        assert "0 processes" in run("kill", "0").stdout
    finally:
        down = run("down")
    assert down.returncode == 0, down.stderr
    assert traces(nodes.number, nodes.home) == []
