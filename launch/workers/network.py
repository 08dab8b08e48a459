"""Which network interface workers talk over."""

import os
import socket

# gloo takes the interface of the host's name, often loopback, and fails between machines only; NCCL and
# TensorPipe guess too.
_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")


def use_node_interface() -> None:
    """Have this process's collectives use the interface that has its Ray node's address.

    What the user set already stays.
    """
    import ray

    interface = interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        for variable in _VARIABLES:
            os.environ.setdefault(variable, interface)


def interface_of(address: str) -> str | None:
    """Return the name of this machine's interface with an IP address; None if none has it."""
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family in families and entry.address.partition("%")[0] == address:
                return str(name)
    return None
