"""Hosts on one machine: network namespaces on a bridge, each behind a link of limited rate and delay.

Everything is gone when the `with` block ends, also by Ctrl-C or SIGTERM; what a killed process left, the next one
sweeps.
"""

import ctypes
import io
import os
import queue
import signal
import subprocess
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moesaic.errors import MoesaicError

CLONE_NEWNET = 0x40000000
FRAME_BYTES = 66
"""Ethernet 14, IPv4 20, TCP 32 with timestamps: that the interface counts with each packet."""
NAMESPACES = Path("/run/netns")
PREFIX = "moe"
PORT = 29_511
SETTINGS = {"tcp_congestion_control": "reno", "tcp_slow_start_after_idle": "0"}
"""Of a namespace's TCP: a sender that paces itself by an estimate of the link starts every exchange too slowly."""


@dataclass(frozen=True)
class Traffic:
    """What a host's interface has sent so far."""

    bytes: int
    packets: int

    @property
    def payload(self) -> int:
        """Without the headers of frames, IP and TCP."""
        return self.bytes - FRAME_BYTES * self.packets

    def since(self, before: "Traffic") -> "Traffic":
        return Traffic(self.bytes - before.bytes, self.packets - before.packets)


def sent(interface: str = "eth0") -> Traffic:
    """By an interface of this process's namespace."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            fields = numbers.split()
            return Traffic(int(fields[8]), int(fields[9]))
    raise MoesaicError(f"there is no interface {interface} here; run it as a rank of Hosts")


def why_not() -> str:
    """Why there can be no hosts here, in a line; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root; run it with sudo, or in a container with --privileged"
    try:
        with Hosts(1, rate_mbit=1000):
            return ""
    except MoesaicError as error:
        return str(error)


class Hosts:
    """`count` namespaces, each with an interface eth0 that sends and receives at most `rate_mbit`."""

    def __init__(self, count: int, rate_mbit: int, delay_ms: float = 0.0) -> None:
        self.rate_mbit, self.delay_ms = rate_mbit, delay_ms
        self.bridge = f"{PREFIX}{os.getpid()}b"
        self.names = [f"{PREFIX}{os.getpid()}h{index}" for index in range(count)]
        self.is_delayed = False
        """Whether the kernel could delay packets (netem)."""

    def __enter__(self) -> "Hosts":
        _sweep()
        self._old_handler = signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        try:
            _ip("link", "add", self.bridge, "type", "bridge")
            _ip("link", "set", self.bridge, "up")
            for index, name in enumerate(self.names):
                self._add(index, name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            _ip("link", "delete", f"{name}o", check=False)  # with its other end; the namespace's own end takes its time
            _ip("netns", "delete", name, check=False)
        _ip("link", "delete", self.bridge, check=False)
        signal.signal(signal.SIGTERM, self._old_handler)

    def run(
        self, function: Callable[..., Any], *arguments: Any, ranks_per_host: int = 1, timeout: float = 240.0
    ) -> list[Any]:
        """What `function(*arguments)` returns on each rank; ranks of a host are neighbours."""
        context, count = mp.get_context("fork"), len(self.names) * ranks_per_host
        results = context.Queue()
        processes = [
            context.Process(
                target=_run, daemon=True,
                args=(self.names[rank // ranks_per_host], rank, count, results, function, arguments),
            )
            for rank in range(count)
        ]  # fmt: skip
        for process in processes:
            process.start()
        answers: dict[int, Any] = {}
        try:
            for _ in processes:
                rank, answer, failure = results.get(timeout=timeout)
                if failure is not None:
                    raise MoesaicError(f"rank {rank} of a benchmark failed: {failure}")
                answers[rank] = torch.load(io.BytesIO(answer), weights_only=False)
        except queue.Empty:
            raise MoesaicError(f"ranks were not done after {timeout:.0f} s; use fewer --tokens") from None
        finally:
            for process in processes:
                process.join(2.0 if len(answers) == count else 0.0)
                process.kill()
                process.join()
        return [answers[rank] for rank in range(count)]

    def _add(self, index: int, name: str) -> None:
        outside = f"{name}o"
        _ip("netns", "add", name)
        _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", outside, "master", self.bridge, "up")
        _ip("-n", name, "addr", "add", f"{address(index)}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "link", "set", "eth0", "up")
        for setting, value in SETTINGS.items():
            _ip("netns", "exec", name, "sh", "-c", f"echo {value} > /proc/sys/net/ipv4/{setting}")
        limit = f"tbf rate {self.rate_mbit}mbit burst 256kb latency 400ms".split()
        _command("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", "handle", "1:", *limit)
        _command("tc", "qdisc", "add", "dev", outside, "root", *limit)
        if self.delay_ms:
            delay = ("parent", "1:1", "netem", "delay", f"{self.delay_ms}ms", "limit", "100000")
            self.is_delayed = _command("tc", "-n", name, "qdisc", "add", "dev", "eth0", *delay, check=False)


def address(host: int) -> str:
    return f"10.83.0.{host + 1}"


def _run(
    name: str, rank: int, count: int, results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its ranks
    try:
        _enter(name)
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"tcp://{address(0)}:{PORT}", rank=rank, world_size=count)
        answer = io.BytesIO()
        torch.save(function(*arguments), answer)
        results.put((rank, answer.getvalue(), None))
        results.close()
        results.join_thread()
        dist.barrier()
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        results.put((rank, None, f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"))
        results.close()
        results.join_thread()
    os._exit(0)  # a process group that waits for a rank which is gone must not hold this one up


def _enter(name: str) -> None:
    """The calling thread, and so the threads that it starts, live in that namespace from now on."""
    with (NAMESPACES / name).open() as file:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(file.fileno(), CLONE_NEWNET) != 0:
            raise MoesaicError(f"cannot enter the network namespace {name}: {os.strerror(ctypes.get_errno())}")


def _sweep() -> None:
    """Deletes what processes left that are no more."""
    names = [path.name for path in NAMESPACES.glob(f"{PREFIX}*h*")] if NAMESPACES.exists() else []
    for name in names:
        pid, _, _ = name.removeprefix(PREFIX).partition("h")
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            _ip("netns", "delete", name, check=False)
            _ip("link", "delete", f"{PREFIX}{pid}b", check=False)


def _ip(*arguments: str, check: bool = True) -> bool:
    return _command("ip", *arguments, check=check)


def _command(*arguments: str, check: bool = True) -> bool:
    """Whether it went well. Raises MoesaicError, where it had to."""
    try:
        result = subprocess.run(arguments, capture_output=True, text=True)
    except FileNotFoundError:
        raise MoesaicError(f"the command {arguments[0]} is missing; install iproute2") from None
    if check and result.returncode:
        raise MoesaicError(f"{' '.join(arguments)}: {result.stderr.strip()}; it needs CAP_NET_ADMIN")
    return result.returncode == 0
