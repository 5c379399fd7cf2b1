"""A cable with a delay: `python wire.py 0.02 s0 s1 s2` passes frames between interfaces.

What one interface hears the others get after a delay, in order, as from a hub. For
kernels without netem. Needs root; ends when its standard input does.
"""

import collections
import contextlib
import select
import socket
import struct
import sys
import time

ALL_PROTOCOLS = 3  # ETH_P_ALL
SOL_PACKET, ADD_MEMBERSHIP, VNET_HEADER, PROMISCUOUS = 263, 1, 15, 1  # linux/if_packet.h
OUTGOING = 4  # sll_pkttype of what this end sent itself
LARGEST_FRAME = 1 << 17


def listen(interface: str) -> socket.socket:
    """Hears and sends whole frames. With VNET_HEADER their unfinished checksums and large segments,
    which the kernel leaves to the network card, pass through unharmed."""
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    wire.setsockopt(SOL_PACKET, VNET_HEADER, 1)
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
    wire.bind((interface, ALL_PROTOCOLS))
    index = socket.if_nametoindex(interface)
    membership = struct.pack("iHH8s", index, PROMISCUOUS, 0, b"")
    wire.setsockopt(SOL_PACKET, ADD_MEMBERSHIP, membership)
    return wire


def main() -> None:
    delay_s = float(sys.argv[1])
    ends = [listen(interface) for interface in sys.argv[2:]]
    under_way: collections.deque[tuple[float, socket.socket, bytes]] = collections.deque()
    print("ready", flush=True)
    while True:
        wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready, _, _ = select.select([sys.stdin, *ends], [], [], wait_s)
        if sys.stdin in ready:
            return
        for end in ready:
            frame, address = end.recvfrom(LARGEST_FRAME)
            if address[2] != OUTGOING:
                under_way.append((time.monotonic() + delay_s, end, frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, source, frame = under_way.popleft()
            for end in ends:
                if end is not source:
                    with contextlib.suppress(OSError):  # TCP sends a lost frame again
                        end.send(frame)


if __name__ == "__main__":
    main()
