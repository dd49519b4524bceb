"""Connections between the ranks of one machine, for what is short: who is there, counts, a loss.

gloo hands every message from thread to thread: where two ranks share two processors, a barrier took it 0.3 ms and up to
1.3 ms beside work, and a socket of the machine's own 0.02 and 0.08 ms.
"""

from __future__ import annotations

import socket
from pathlib import Path

import torch
import torch.distributed as dist

SHORT = 16 << 10  # bytes of a message at most: two of them lie in a connection unread, and nobody waits to send


class Links:
    """A connection with each other rank; every rank has to make the same calls, as with any collective.

    A rank that ends closes its connections: who waits for it then raises ConnectionError.
    """

    def __init__(self, peers: dict[int, socket.socket], rank: int) -> None:
        self.peers, self.rank = dict(sorted(peers.items())), rank

    def barrier(self) -> None:
        """Returns when every rank has called it; what they have written to shared memory before can be read then."""
        self.exchange(b".")

    def exchange(self, message: bytes) -> list[bytes]:
        """Every rank's message, in their order; each as long as this one, and SHORT at most."""
        for peer in self.peers.values():
            peer.sendall(message)
        found = {rank: _read(peer, len(message), rank) for rank, peer in self.peers.items()} | {self.rank: message}
        return [found[rank] for rank in sorted(found)]

    def reduce(self, tensor: torch.Tensor, largest: bool = False) -> None:
        """Replaces a short tensor (contiguous, on the CPU) by the sum of all ranks', in their order, or the largest."""
        flat = tensor.view(-1)
        parts = [torch.frombuffer(bytearray(part), dtype=tensor.dtype) for part in self._parts(flat)]
        total = parts[0]
        for other in parts[1:]:
            total = torch.maximum(total, other) if largest else total.add_(other)
        flat.copy_(total)

    def gather(self, output: torch.Tensor, tensor: torch.Tensor) -> None:
        """Fills `output` with every rank's short `tensor`, one after another; both contiguous and on the CPU."""
        whole = bytearray(b"".join(self._parts(tensor.view(-1))))
        output.view(-1).copy_(torch.frombuffer(whole, dtype=tensor.dtype))

    def _parts(self, flat: torch.Tensor) -> list[bytes]:
        return self.exchange(flat.detach().view(torch.uint8).numpy().tobytes())


def _read(peer: socket.socket, size: int, rank: int) -> bytes:
    part = b""
    while len(part) < size:
        more = peer.recv(size - len(part))
        if not more:
            raise ConnectionError(f"Connection closed by peer: rank {rank}")
        part += more
    return part


def connected(folder: Path, listener: socket.socket) -> Links:
    """Connections through sockets in `folder`, which all ranks of the world see; collective.

    `listener` is this rank's, from `listening`.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # all listen
    peers = {}
    for other in range(rank):
        peers[other] = socket.socket(socket.AF_UNIX)
        peers[other].connect(str(folder / str(other)))
        peers[other].sendall(rank.to_bytes(4, "little"))
    while len(peers) < world - 1:
        peer, _ = listener.accept()
        peers[int.from_bytes(_read(peer, 4, -1), "little")] = peer
    listener.close()
    return Links(peers, rank)


def listening(folder: Path, rank: int, world: int) -> socket.socket:
    """A socket in `folder` to which the ranks above this one connect. OSError where there can be none."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(folder / str(rank)))
        listener.listen(world)
    except OSError:
        listener.close()
        raise
    return listener
