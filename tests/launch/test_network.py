"""The interface that holds an address."""

from __future__ import annotations

import os

import psutil
import pytest
import ray

from rayft.launch import network


def test_the_interface_of_an_address_is_found() -> None:
    for name, held in psutil.net_if_addrs().items():
        for one in held:
            if one.family.name == "AF_INET":
                assert network.own_interface(one.address) == name
    assert network.own_interface("203.0.113.9") is None


def test_what_the_environment_says_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    network.bind()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
    assert os.environ.pop("NCCL_SOCKET_IFNAME") == "=lo"
