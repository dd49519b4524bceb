"""A process that Ray's raylet takes for its node's dashboard agent, where there is no dashboard: it serves nothing.

A raylet waits until its agent has left three port numbers in the session's folder, -1 for what is not served, and ends
when its agent ends. Ray's own takes a second of a processor to import what nobody asks it for. This file is started as
a script, with the session's folder and the node's id, and imports nothing that takes time.
"""

from __future__ import annotations

import os
import sys
import time

PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
LOOK_S = 0.5


def main(folder: str, node: str) -> None:
    """Leaves the port numbers and stays as long as the raylet that has started this process."""
    raylet = os.getppid()
    for name in PORTS:
        path = os.path.join(folder, f"{name}_{node}")
        with open(f"{path}.part", "w", encoding="ascii") as file:
            file.write("-1")
        os.replace(f"{path}.part", path)  # it is read as soon as it is there
    while os.getppid() == raylet:
        time.sleep(LOOK_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
