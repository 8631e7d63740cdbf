"""Run a command where nothing can be reached, and print the names that it looks up: `python dns_recorder.py COMMAND ...`.

To be started in a network and a mount namespace of its own (`unshare --map-root-user --net --mount`).
"""

import fcntl
import socket
import struct
import subprocess
import sys
import tempfile
import threading

SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x8914, 0x1, 0x40
NAME_ERROR = b"\x81\x83"


def answer_lookups(listening: socket.socket) -> None:
    """Print each name that is asked for, and say that there is no such host."""
    while True:
        query, sender = listening.recvfrom(4096)
        labels, end = [], 12
        while length := query[end]:
            labels.append(query[end + 1 : end + 1 + length].decode())
            end += 1 + length
        sys.stdout.write(".".join(labels) + "\n")
        sys.stdout.flush()
        question = query[12 : end + 5]
        listening.sendto(query[:2] + NAME_ERROR + query[4:6] + bytes(6) + question, sender)


def main() -> int:
    listening = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    fcntl.ioctl(listening, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", IFF_UP | IFF_RUNNING))
    listening.bind(("127.0.0.1", 53))
    with tempfile.NamedTemporaryFile("w") as resolver:
        resolver.write("nameserver 127.0.0.1\n")
        resolver.flush()
        subprocess.run(["mount", "--bind", resolver.name, "/etc/resolv.conf"], check=True)
        threading.Thread(target=answer_lookups, args=[listening], daemon=True).start()
        return subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode


if __name__ == "__main__":
    sys.exit(main())
