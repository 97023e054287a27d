"""The processes of one run: how they meet before the work, and how each learns that one is gone.

JAX aborts a process with a stack trace where a run is incomplete or another process dies, and some
collectives wait for a dead one for ever. So the processes first meet over plain TCP at the
coordinator's address, where one sentence tells what is wrong, and keep these connections until the
end: the kernel closes them when a process dies, however it dies, and all others end at once.
They also agree over them on the place where all stop after a SIGTERM to one.
"""

import abc
import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Coroutine
from typing import Any, NamedTuple

from brgsa_jax.config import UserError
from brgsa_jax.stopping import ASKED, STOPPED, StopPoint, end

# A machine that vanished without a word is noticed after IDLE + PROBES * INTERVAL seconds.
IDLE, INTERVAL, PROBES = 15, 5, 6
# Seconds for what takes none between living processes: the first line, the end after a verdict.
PROMPT = 5.0
# What a process says first.
HELLO = {"index": int, "count": int, "host": str, "versions": str}
WITHOUT_A_WORD = ("ended without a word (killed, out of memory, or its machine is gone); see its "
                  "own log, then start all again: they go on from the last checkpoint")


class Place(NamedTuple):
    """This process's place in a run.

    Attributes:
        host, port: where process 0 waits for the others.
        count: processes of the run.
        index: the number of this one, from 0.
    """

    host: str
    port: int
    count: int
    index: int

    @property
    def address(self) -> str:
        """The coordinator's address as JAX takes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def bind(self) -> str | None:
        """The only name of this machine to listen on; None listens on its networks as well."""
        own = self.host in ("localhost", "::1") or self.host.startswith("127.")
        return self.host if own else None


def meet(place: Place, *, versions: str, timeout: float) -> "Peers":
    """Waits until all processes of the run have come.

    Args:
        place: of this process, where `count` is at least 2.
        versions: what must be equal on every machine, in words.
        timeout: seconds.

    Returns:
        The ties to the others, to be left with `Peers.leave`. Until then this process ends with
        a sentence on stderr and exit code 1 as soon as another one fails or dies.

    Raises:
        UserError: not all came in time, their numbers or versions do not fit, or process 0
            cannot be reached.
    """
    peers = (Hub if place.index == 0 else Spoke)(place, versions, timeout)
    try:
        peers.run(peers.gather())
    except UserError:
        peers.close()
        raise
    return peers


class Peers(abc.ABC):
    """Ties of a process to the others, served by a thread of their own."""

    def __init__(self, place: Place, versions: str, timeout: float) -> None:
        self.place, self.versions, self.timeout = place, versions, timeout
        self.name = f"process {place.index} on {socket.gethostname()}"
        self.stop = StopPoint()
        # Set when what the others do no longer concerns this process.
        self.over = False
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._links: list[asyncio.StreamWriter] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="peers", daemon=True)
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Has all processes stop at one place; all end where one has not come to any yet.

        For a signal handler: it only leaves word.
        """
        if not self.over:
            self._loop.call_soon_threadsafe(lambda: self.follow(self.ask()))

    def leave(self) -> None:
        """Says that this process has finished, and waits until all others have."""
        self.run(self.depart())
        self.close()

    def fail(self, failure: str) -> None:
        """Ends the others, with this sentence."""
        if not self.over:
            self.over = True
            self.run(self.spread(failure))

    def close(self) -> None:
        """Hangs up and ends the thread."""
        self.run(self._hang_up())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _hang_up(self) -> None:
        for link in self._links:
            link.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, *(link.wait_closed() for link in self._links),
                             return_exceptions=True)

    def keep(self, link: asyncio.StreamWriter) -> None:
        """Has the kernel notice when the machine at the other end vanishes."""
        self._links.append(link)
        connection = link.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Only Linux has all three; elsewhere the system's own, slower ones hold.
        for name, value in (("TCP_KEEPIDLE", IDLE), ("TCP_KEEPINTVL", INTERVAL),
                            ("TCP_KEEPCNT", PROBES)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Waits for `work`, which the thread does."""
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def follow(self, work: Coroutine[Any, Any, None]) -> None:
        """Lets the thread do `work` while this one goes on."""
        task = self._loop.create_task(work)
        # The loop itself keeps a weak reference only.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @abc.abstractmethod
    async def gather(self) -> None:
        """See `meet`."""

    @abc.abstractmethod
    async def ask(self) -> None:
        """See `ask_to_stop`."""

    @abc.abstractmethod
    async def depart(self) -> None:
        """See `leave`."""

    @abc.abstractmethod
    async def spread(self, failure: str) -> None:
        """See `fail`."""


class Member(NamedTuple):
    """Another process, as process 0 knows it."""

    name: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class Hub(Peers):
    """Process 0, which has a connection to each other one."""

    async def gather(self) -> None:
        """Lets the others in until all are there or one does not fit."""
        self._members: dict[int, Member] = {}
        self._refused: str | None = None
        self._decided, self._all_left = asyncio.Event(), asyncio.Event()
        self._working: set[int] = set(range(1, self.place.count))
        # How often each process had come to its stop point when it was held there.
        self._held: dict[int, int] = {}
        try:
            server = await asyncio.start_server(self._welcome, self.place.bind, self.place.port)
        except OSError as error:
            raise UserError(f"process 0 cannot listen on port {self.place.port} of this machine "
                            f"({error.strerror or error}); is another run or a second process 0 "
                            "there? Number each process once, or choose another port") from error
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._decided.wait(), self.timeout)
        # JAX listens here next; connections that stand stay.
        server.close()
        missing = [str(index) for index in sorted(self._working - self._present())]
        if missing and not self._refused:
            here = self.place.count - len(missing)
            self._refused = (
                f"only {here} of {self.place.count} processes came to {self.place.address} within "
                f"{self.timeout:g} s, without number {', '.join(missing)}; start all of them, or "
                "lower the number of processes")
        if self._refused:
            await self._tell({"stop": self._refused})
            raise UserError(self._refused)
        await self._tell({"go": self.name})
        for index in self._members:
            self.follow(self._attend(index))

    def _present(self) -> set[int]:
        return {index for index, member in self._members.items() if not member.reader.at_eof()}

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.keep(writer)
        hello = await _read(reader, PROMPT)
        if hello is None or {key: type(hello.get(key)) for key in HELLO} != HELLO:
            # A port scan or a health check, none of us.
            writer.close()
            return
        index, count, versions = hello["index"], hello["count"], hello["versions"]
        name = f"process {index} on {hello['host']}"
        if count != self.place.count:
            problem = (f"{name} was started for {count} processes, {self.name} for "
                       f"{self.place.count}; give all of them the same number")
        elif index not in self._working - self._present():
            problem = (f"{name} has the number of another process; number them 0 to {count - 1}, "
                       "each once")
        elif versions != self.versions:
            problem = (f"{name} has {versions}, {self.name} has {self.versions}; install the same "
                       "versions on every machine")
        else:
            self._members[index] = Member(name, reader, writer)
            if self._present() == self._working:
                self._decided.set()
            return
        self._refused = self._refused or problem
        await _write(writer, {"stop": problem})
        self._decided.set()

    async def _attend(self, index: int) -> None:
        """Listens to one process until it leaves or dies."""
        member = self._members[index]
        while (said := await _read(member.reader)) is not None and "failed" not in said:
            if "ask" in said:
                await self.ask()
            elif "held" in said:
                await self._agree(index, said["held"])
            elif "leave" in said:
                self._working.discard(index)
                if not self._working:
                    self._all_left.set()
        if index in self._working:
            reason = f"failed: {said['failed']}" if said else WITHOUT_A_WORD
            await self._end_all(f"{member.name} {reason}", 1)

    async def ask(self) -> None:
        """Holds every process at its stop point, to learn where that is."""
        if not self._held:
            self._held[0] = self.stop.hold()
            await self._tell({"hold": True})

    async def _agree(self, index: int, calls: int) -> None:
        """Once all are held, lets them go on to the first place that none has passed."""
        self._held[index] = calls
        if len(self._held) < self.place.count:
            return
        if min(self._held.values()) == 0:
            # It may compile for minutes before it comes to one; nothing is lost by not waiting.
            self.follow(self._end_all(ASKED, STOPPED))
        else:
            last = max(self._held.values()) + 1
            await self._tell({"last": last})
            self.stop.release(last)

    async def depart(self) -> None:
        """Waits for the others, who wait for this word."""
        await self._all_left.wait()
        self.over = True
        await self._tell({"end": True})

    async def spread(self, failure: str) -> None:
        """Tells the others."""
        await self._stop(f"{self.name} failed: {failure}", 1)

    async def _end_all(self, sentence: str, code: int) -> None:
        if not self.over:
            self.over = True
            await self._stop(sentence, code)
            end(sentence, code)

    async def _stop(self, sentence: str, code: int) -> None:
        """Ends the others; waits for that, since JAX aborts them when process 0 goes first."""
        await self._tell({"stop": sentence, "code": code})
        others = self._tasks - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=PROMPT)

    async def _tell(self, message: dict[str, Any]) -> None:
        for member in self._members.values():
            await _write(member.writer, message)


class Spoke(Peers):
    """A process with another number than 0, which has a connection to process 0."""

    async def gather(self) -> None:
        """Calls process 0 until it answers, then waits for the others."""
        deadline = self._loop.time() + self.timeout
        self._reader, self._writer = await self._connect(deadline)
        self._ended = asyncio.Event()
        self.keep(self._writer)
        await _write(self._writer, {"index": self.place.index, "count": self.place.count,
                                    "host": socket.gethostname(), "versions": self.versions})
        said = await _read(self._reader, deadline - self._loop.time() + PROMPT)
        if said is not None and "stop" in said:
            raise UserError(said["stop"])
        if said is None or "go" not in said:
            raise UserError(f"process 0 at {self.place.address} let this one in but did not begin "
                            f"within {self.timeout:g} s; see its log, and whether that port is "
                            "another program's")
        self.follow(self._attend(said["go"]))

    async def _connect(self, deadline: float
                       ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reason = "no answer"
        while (left := deadline - self._loop.time()) > 0:
            try:
                return await asyncio.wait_for(asyncio.open_connection(
                    self.place.host, self.place.port), min(left, PROMPT))
            except TimeoutError:
                reason = "no answer"
            except OSError as error:
                reason = error.strerror or str(error)
                await asyncio.sleep(min(left, 0.2))
        raise UserError(f"process 0 could not be reached at {self.place.address} within "
                        f"{self.timeout:g} s ({reason}); is it running, is the address right, and "
                        "is the port open between the machines?")

    async def _attend(self, hub: str) -> None:
        """Listens to process 0 until the end."""
        while (said := await _read(self._reader)) is not None and "stop" not in said:
            if "hold" in said:
                await _write(self._writer, {"held": self.stop.hold()})
            elif "last" in said:
                self.stop.release(said["last"])
            elif "end" in said:
                self.over = True
                break
        if not self.over:
            if said is None:
                end(f"{hub} {WITHOUT_A_WORD}", 1)
            else:
                end(said["stop"], said["code"])
        self._ended.set()

    async def ask(self) -> None:
        """Tells process 0."""
        await _write(self._writer, {"ask": True})

    async def depart(self) -> None:
        """Tells process 0 and waits for its word that all are done."""
        await _write(self._writer, {"leave": True})
        await self._ended.wait()

    async def spread(self, failure: str) -> None:
        """Tells process 0, which tells the others."""
        await _write(self._writer, {"failed": failure})


async def _read(reader: asyncio.StreamReader, timeout: float | None = None
                ) -> dict[str, Any] | None:
    """The next message; None when the other side is gone, silent or speaks no such thing."""
    try:
        message = json.loads(await asyncio.wait_for(reader.readline(), timeout))
    except (OSError, ValueError, TimeoutError, RecursionError):
        return None
    if not isinstance(message, dict):
        return None
    return {key: _plain(value) if isinstance(value, str) else value
            for key, value in message.items()}


async def _write(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError, TimeoutError):
        writer.write(json.dumps(message).encode() + b"\n")
        await asyncio.wait_for(writer.drain(), PROMPT)


def _plain(text: str) -> str:
    """What a stranger may have sent, fit for a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)[:1000]
