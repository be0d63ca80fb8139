"""Where the processes of a job meet: a free port on one node, an address that answers on several.

It carries no data: torch opens and uses the port; this only finds out beforehand what torch would say in fifty lines.
"""

from __future__ import annotations

import errno
import socket
import sys
import time
from collections.abc import Callable

from alignkit.errors import RunError
from alignkit.launch.placement import LOOPBACK, Placement
from alignkit.recipe import Stage

_LOOK_SECONDS = 0.5


def choose_port(stage: Stage, placement: Placement) -> int:
    """Return the port node 0 opens: the one that was given when it is free, else any free one.

    Raises RunError when a port that was given is in use.
    """
    wanted = placement.main_port or 0
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # torch sets it too: a dying connection is no user
        try:
            probe.bind((LOOPBACK if placement.nodes == 1 else "", wanted))
        except OSError as error:
            which = f"port {wanted}" if wanted else "no free port"
            state = "is in use" if error.errno == errno.EADDRINUSE else "cannot be opened"
            raise RunError(
                f"{which} {state} on {socket.gethostname()} ({error.strerror}); choose another with "
                "--main-port or launch.main_port",
                where=stage.where("launch.main_port"),
            ) from error
        return int(probe.getsockname()[1])


def require_known(stage: Stage, address: str) -> None:
    """Raise RunError when the main address is no host that can be found."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise RunError(
            f"the main address {address} cannot be resolved on {socket.gethostname()} ({error.strerror}); give the "
            "name or IP of node 0 with --main-address or launch.main_address",
            where=stage.where("launch.main_address"),
        ) from error


def wait_for_main(stage: Stage, placement: Placement, *, look: Callable[[], bool], pause: Callable[[], None]) -> None:
    """Wait until node 0 answers at its port and `look` agrees; `pause` is called between two tries and may raise.

    Raises RunError when the host is unknown, or nobody answers for launch.timeout_seconds.
    """
    address, port = str(placement.main_address), placement.main_port
    require_known(stage, address)
    deadline = time.monotonic() + stage.launch.timeout_seconds
    while not (_answers(address, int(port or 0)) and look()):
        if time.monotonic() > deadline:
            raise RunError(
                f"nobody answers at {address}:{port} after {stage.launch.timeout_seconds:g} s; start the same command "
                "on node 0, check --main-address and --main-port, and that no firewall stands between",
                where=stage.where("launch.main_address"),
            )
        pause()
        time.sleep(_LOOK_SECONDS)


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


def network_interface(placement: Placement) -> str | None:
    """Return the interface the processes reach each other through, None where it cannot be told.

    gloo would take the one this host's name resolves to, which on many machines is none the others reach.
    """
    import psutil

    if placement.nodes == 1:
        return "lo" if sys.platform == "linux" else None
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            str(placement.main_address), placement.main_port, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing: it only asks the kernel for the way
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            return str(name)
    return None
