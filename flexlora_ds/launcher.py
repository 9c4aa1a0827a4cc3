"""What a launcher says in the environment: checked before anything waits for processes that will never come."""

from __future__ import annotations

import os
import socket

from flexlora_ds.errors import UserError

_LARGEST_PORT = 65_535


def require_environment() -> int:
    """The number of processes that the environment names; without a launcher 1.

    Raises:
        UserError: a variable is no number, or they do not fit together.
    """
    world = number_in_environment("WORLD_SIZE", 1, least=1)
    rank = number_in_environment("RANK", 0)
    local_rank = number_in_environment("LOCAL_RANK", 0)
    if "MASTER_PORT" in os.environ and not 0 < number_in_environment("MASTER_PORT", 1) <= _LARGEST_PORT:
        raise _fault("MASTER_PORT", f"give a port from 1 to {_LARGEST_PORT:,}")
    if rank >= world:
        size = f"WORLD_SIZE is {world}" if "WORLD_SIZE" in os.environ else "WORLD_SIZE is not set"
        raise _fault(
            "RANK", "start the processes with deepspeed or torchrun, which set both", f", and {size}"
        )
    if world > 1 and local_rank > rank:  # alone, LOCAL_RANK only names a GPU
        raise _fault(
            "LOCAL_RANK", "a process's number on its machine is at most RANK", f", and RANK is {rank}"
        )
    return world


def require_rendezvous() -> None:
    """See that the processes can find each other.

    Raises:
        UserError: several processes, and nothing says where they meet, or the name of that machine is unknown.
    """
    if require_environment() == 1:
        return
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and {name} is not set",
                "environment",
                "start the processes with deepspeed or torchrun, which set it",
            )
    try:
        socket.getaddrinfo(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    except (OSError, UnicodeError) as error:
        raise _fault("MASTER_ADDR", "give the name or address of process 0's machine", f": {error}") from None


def number_in_environment(name: str, default: int, *, least: int = 0) -> int:
    """The whole number that a variable holds; `default` where it is not set. Raises UserError where it holds none."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
        raise _fault(name, f"give a whole number of at least {least}, or let the launcher set it")
    return int(text)


def _fault(name: str, todo: str, more: str = "") -> UserError:
    return UserError(f"{name} is {os.environ[name][:100]!r}{more}", "environment", todo)
