"""Requests and replies on one connection, against a peer that says what the test wants it to say."""

from __future__ import annotations

import _thread
import contextlib
import itertools
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from prefault.device import protocol
from prefault.device.client import channel, exchange, packets
from prefault.device.client.channel import Channel
from prefault.device.client.exchange import Exchange
from prefault.errors import DeviceError, DeviceGoneError
from support.interrupts import strike_at


class Peer:
    """The other end: reads requests, and sends the replies of the test."""

    def __init__(self) -> None:
        ours, self.socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(10)
        self.channel = Channel(ours)

    def take(self) -> protocol.Request:
        return protocol.decode_request(self.socket.recv(protocol.MAX_MESSAGE))

    def say(self, *replies: protocol.Reply) -> None:
        for reply in replies:
            self.socket.send(protocol.encode(reply))

    def close(self) -> None:
        self.socket.close()
        self.channel.connection.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.close()


class Asking(threading.Thread):
    """A question in a thread of its own."""

    def __init__(self, question: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._question = question
        self.answer: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.answer = self._question()
        except BaseException as error:  # noqa: BLE001  the test looks at it
            self.answer = error

    def result(self) -> Any:
        self.join(10)
        assert not self.is_alive(), "it hangs"
        return self.answer


def _statistics(number: int, missing: int) -> protocol.Statistics:
    return protocol.Statistics(number, missing, 0, 0, 0, 0, 0, ())


def _ask(channel: Channel, area: int) -> Callable[[], protocol.Statistics]:
    return lambda: channel.ask(protocol.AskStatistics(channel.next_id(), area), protocol.Statistics)


def _ask_log(channel: Channel, number: int, area: int) -> tuple[protocol.Run, ...]:
    return channel.ask(protocol.AskLog(number, area), protocol.Runs).runs


def test_answers_find_their_threads_in_any_order(peer: Peer) -> None:
    threads = [Asking(_ask(peer.channel, area)) for area in range(8)]
    requests = [peer.take() for _ in threads]
    for request in reversed(requests):
        assert isinstance(request, protocol.AskStatistics)
        peer.say(_statistics(request.id, request.area))
    assert [thread.result().missing for thread in threads] == list(range(8))


def test_a_reply_that_the_last_reader_dispatched_before_it_left_is_not_waited_for(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LastMoment:
        """Stands for the lock: the reply is there once a thread has it."""

        def __enter__(self) -> None:
            peer.channel._dispatch(_statistics(1, 77))

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(peer.channel, "_reader_lock", LastMoment())
    monkeypatch.setattr(peer.channel, "_read", mock.Mock(side_effect=AssertionError("it waits for a further message")))
    assert Asking(_ask(peer.channel, 1)).result().missing == 77


def test_a_long_request_does_not_hold_up_a_short_one(peer: Peer) -> None:
    long = Asking(_ask(peer.channel, 1))
    first = peer.take()
    for area in range(20):
        short = Asking(_ask(peer.channel, area))
        peer.say(_statistics(peer.take().id, area))
        assert short.result().missing == area
    peer.say(_statistics(first.id, 77))
    assert long.result().missing == 77


def test_progress_comes_before_the_reply(peer: Peer) -> None:
    seen: list[int] = []
    exchange = Exchange(protocol.Populate(peer.channel.next_id(), 1, ((0, 9),), "read", False, True, True))

    def question() -> protocol.Reply | None:
        with peer.channel.asking(exchange.request) as made:
            peer.channel.wait(made, progress=seen.append)
        return made.reply

    thread = Asking(question)
    number = peer.take().id
    peer.say(protocol.Progress(number, 3))
    while not seen:
        time.sleep(0.001)
    peer.say(protocol.Progress(number, 6), protocol.Populated(number, 9, 1, ()))
    assert isinstance(thread.result(), protocol.Populated)
    assert seen[0] == 3


def test_lists_come_in_parts(peer: Peer) -> None:
    thread = Asking(lambda: _ask_log(peer.channel, peer.channel.next_id(), 1))
    number = peer.take().id
    peer.say(protocol.Runs(number, ((0, 1), (5, 6)), True), protocol.Runs(number, ((2, 3),), False))
    assert thread.result() == ((0, 1), (5, 6), (2, 3))


def test_what_is_unanswered_is_asked_again_of_a_new_server(peer: Peer) -> None:
    answered, open_one = Asking(_ask(peer.channel, 1)), Asking(lambda: _ask_log(peer.channel, 99, 2))
    requests = {type(request): request for request in (peer.take(), peer.take())}
    peer.say(
        _statistics(requests[protocol.AskStatistics].id, 5),
        protocol.Runs(99, ((0, 1),), True),  # the old server's list ended here
        protocol.Restarted(0, 1),
    )
    assert answered.result().missing == 5
    assert peer.take() == requests[protocol.AskLog]
    peer.say(protocol.Runs(99, ((7, 8),), False))
    assert open_one.result() == ((7, 8),)


def test_gone_ends_all_waits_and_all_requests(peer: Peer) -> None:
    threads = [Asking(_ask(peer.channel, area)) for area in range(3)]
    for _ in threads:
        peer.take()
    peer.say(protocol.Gone(0, "it fell over"))
    for thread in threads:
        assert isinstance(thread.result(), DeviceGoneError)
        assert "it fell over" in str(thread.answer)
    with pytest.raises(DeviceGoneError, match="it fell over"):
        _ask(peer.channel, 1)()


def test_a_warden_still_hears_of_areas_that_go(peer: Peer) -> None:
    ended: list[int] = []
    before = Asking(lambda: peer.channel.unmap_area(1, lambda: ended.append(1)))
    first = peer.take()
    peer.say(protocol.Gone(0, "it fell over"))
    assert peer.take() == first  # the server may not have read it
    peer.say(protocol.Done(first.id))
    before.result()
    after = Asking(lambda: peer.channel.unmap_area(2, lambda: ended.append(2)))
    peer.say(protocol.Done(peer.take().id))
    after.result()
    assert ended == [1, 2]


def test_the_end_of_the_socket_ends_all_waiting(peer: Peer) -> None:
    ended: list[int] = []
    threads = [Asking(_ask(peer.channel, 1)), Asking(lambda: peer.channel.unmap_area(3, lambda: ended.append(3)))]
    peer.take()
    peer.take()
    peer.socket.shutdown(socket.SHUT_RDWR)
    assert isinstance(threads[0].result(), DeviceGoneError)
    threads[1].result()
    assert ended == [3]


@pytest.mark.parametrize("garbage", [b"\xc1", b"\x93\xa4what\x01\x02", random.Random(1).randbytes(100)])
def test_garbage_ends_the_requests_and_not_the_process(peer: Peer, garbage: bytes) -> None:
    thread = Asking(_ask(peer.channel, 1))
    peer.take()
    peer.socket.send(garbage)
    assert isinstance(thread.result(), DeviceGoneError)


def test_a_reply_of_the_wrong_kind_ends_the_requests(peer: Peer) -> None:
    thread = Asking(_ask(peer.channel, 1))
    peer.say(protocol.Done(peer.take().id))
    assert isinstance(thread.result(), DeviceGoneError)
    assert "answered a AskStatistics with a Done" in str(thread.answer)


@pytest.mark.parametrize(("kind", "error"), [("value", ValueError), ("device", DeviceError), ("gone", DeviceGoneError)])
def test_refusals_are_exceptions(peer: Peer, kind: Any, error: type[Exception]) -> None:
    thread = Asking(_ask(peer.channel, 1))
    peer.say(protocol.Refused(peer.take().id, kind, 5, "because"))
    assert type(thread.result()) is error
    assert "because" in str(thread.answer)


def test_a_signal_handler_in_the_middle_of_a_request_cannot_ask(peer: Peer) -> None:
    raised: list[BaseException] = []

    def handler(*_: object) -> None:
        try:
            _ask(peer.channel, 2)()
        except RuntimeError as error:
            raised.append(error)
        peer.channel.unmap_area(4, lambda: raised.append(StopIteration()))  # as a finalizer would

    def other_side() -> None:
        first = peer.take()
        while not peer.channel._inside:  # until then it could ask
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGUSR1)
        unmap = peer.take()
        while not isinstance(unmap, protocol.Unmap):
            unmap = peer.take()  # what the handler asked in vain
        peer.say(protocol.Done(unmap.id), _statistics(first.id, 3))

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        thread = Asking(other_side)
        assert _ask(peer.channel, 1)().missing == 3
        assert thread.result() is None
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert [type(error) for error in raised] == [RuntimeError, StopIteration]


def test_ctrl_c_leaves_the_others_their_answers(peer: Peer) -> None:
    def other_side() -> list[protocol.Request]:
        first = peer.take()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        second = peer.take()
        peer.say(_statistics(first.id, 1), _statistics(second.id, 2))
        return [first, second]

    thread = Asking(other_side)
    with pytest.raises(KeyboardInterrupt):
        _ask(peer.channel, 1)()
    other = Asking(_ask(peer.channel, 2))
    assert other.result().missing == 2
    assert len(thread.result()) == 2
    assert not peer.channel.is_inside()


def test_ctrl_c_just_before_the_wait_ends_it_all_the_same(peer: Peer) -> None:
    def other_side() -> None:
        peer.take()
        time.sleep(0.05)  # so that the main thread waits
        _thread.interrupt_main()  # a signal that interrupts no system call

    thread = Asking(other_side)
    with pytest.raises(KeyboardInterrupt):
        _ask(peer.channel, 1)()
    assert thread.result() is None


class Server(threading.Thread):
    """The other end as a server: it answers Map, Unmap and AskStatistics, and knows which areas are mapped."""

    def __init__(self, peer: Peer) -> None:
        super().__init__(daemon=True)
        self._peer = peer
        self.areas: set[int] = set()
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                match self._peer.take():
                    case protocol.Map(id=number):
                        self.areas.add(number)
                        self._peer.say(protocol.Mapped(number, number))
                    case protocol.Unmap(id=number, area=area):
                        self.areas.discard(area)
                        self._peer.say(protocol.Done(number))
                    case request:
                        self._peer.say(_statistics(request.id, 5))


_TRACED = [str(module.__file__) for module in (channel, exchange, packets)]


def test_ctrl_c_at_any_line_leaves_the_channel_in_order(peer: Peer) -> None:
    server = Server(peer)
    for line in itertools.count(1):
        ended: list[int] = []
        opening = Exchange(_map(peer.channel.next_id()))
        before = sys.gettrace()
        interrupted = False
        sys.settrace(strike_at(line, _TRACED, spared=["_inside.discard", "with self._reader_lock"]))
        try:
            peer.channel.open(opening)
            _ask(peer.channel, 1)()
            peer.channel.abandon(opening, lambda: ended.append(1))  # noqa: B023
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(before)
        if not ended:
            peer.channel.abandon(opening, lambda: ended.append(1))  # noqa: B023
        other = Asking(_ask(peer.channel, 2))
        assert other.result().missing == 5, line
        assert not peer.channel.is_inside()
        assert ended, line
        assert not server.areas, line
        assert not peer.channel._exchanges, line
        if not interrupted:
            break
    assert line > 100, "the trace saw the channel"


def test_when_the_reader_is_interrupted_another_thread_reads_on(peer: Peer) -> None:
    def other_side() -> None:
        first = peer.take()
        waiting = Asking(_ask(peer.channel, 2))
        second = peer.take()
        time.sleep(0.05)  # so that it waits for the main thread to read
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        main_is_out.wait(10)
        peer.say(_statistics(first.id, 1), _statistics(second.id, 2))
        assert waiting.result().missing == 2

    main_is_out = threading.Event()
    thread = Asking(other_side)
    with pytest.raises(KeyboardInterrupt):
        _ask(peer.channel, 1)()
    main_is_out.set()
    assert thread.result() is None


def _map(number: int) -> protocol.Map:
    return protocol.Map(number, 1 << 20, 0, 4096, "read", False)


def test_an_area_that_ctrl_c_left_keeps_its_memory_until_the_server_has_released_it(peer: Peer) -> None:
    ended: list[int] = []
    opening = Exchange(_map(1234))

    def other_side() -> protocol.Request:
        peer.take()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        is_out.wait(10)
        peer.say(protocol.Mapped(1234, 17))
        unmap = peer.take()
        assert not ended
        peer.say(protocol.Done(unmap.id))
        return unmap

    is_out = threading.Event()
    thread = Asking(other_side)
    with pytest.raises(KeyboardInterrupt):
        peer.channel.open(opening)
    is_out.set()
    peer.channel.abandon(opening, lambda: ended.append(1))
    unmap = thread.result()
    assert isinstance(unmap, protocol.Unmap)
    assert unmap.area == 17
    assert ended == [1]


def test_an_abandoned_area_is_unmapped_by_the_next_reader(peer: Peer) -> None:
    ended: list[int] = []
    opening = Exchange(_map(1234))
    mapping = Asking(lambda: peer.channel.open(opening))
    peer.take()
    while not opening.sent:
        time.sleep(0.001)
    peer.channel.abandon(opening, lambda: ended.append(1), time.monotonic())
    assert not ended
    peer.say(protocol.Mapped(1234, 17))
    assert mapping.result().area == 17
    unmap = peer.take()
    assert isinstance(unmap, protocol.Unmap)
    assert unmap.area == 17
    assert not ended
    thread = Asking(_ask(peer.channel, 1))
    request = peer.take()
    peer.say(protocol.Done(unmap.id), _statistics(request.id, 1))
    assert thread.result().missing == 1
    assert ended == [1]


def test_thousands_of_areas_may_go_in_the_middle_of_a_request(peer: Peer) -> None:
    # More than what the socket and the server's queue hold, of requests as of answers.
    count = 2000
    ended: list[int] = []

    def handler(*_: object) -> None:
        for number in range(count):
            peer.channel.unmap_area(number, lambda: ended.append(1))  # as the garbage collector would

    def other_side() -> None:
        first = peer.take()
        while not peer.channel._inside:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGUSR1)
        for _ in range(count):
            peer.say(protocol.Done(peer.take().id))  # a server that waits until its answers are taken
        peer.say(_statistics(first.id, 3))

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        thread = Asking(other_side)
        assert _ask(peer.channel, 1)().missing == 3
        assert thread.result() is None
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(ended) == count


def test_an_answer_that_comes_twice_takes_no_area_away(peer: Peer) -> None:
    # A new server finds the request in the socket, and is asked again because it is new.
    mapping = Asking(lambda: peer.channel.open(Exchange(_map(1234))))
    peer.take()
    peer.say(protocol.Restarted(0, 1), protocol.Mapped(1234, 17), protocol.Mapped(1234, 17))
    assert mapping.result().area == 17
    thread = Asking(_ask(peer.channel, 1))
    assert peer.take() == _map(1234)
    request = peer.take()
    assert isinstance(request, protocol.AskStatistics)
    peer.say(_statistics(request.id, 1))
    assert thread.result().missing == 1


def test_in_a_fork_nothing_can_be_asked(peer: Peer) -> None:
    pid = os.fork()
    if not pid:
        status = 1
        try:
            _ask(peer.channel, 1)()
        except DeviceGoneError as error:
            status = 0 if "map the device again here" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
