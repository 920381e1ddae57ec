"""Assertions that say what was got and what was wanted."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc


def that(true: Any, what: str) -> None:
    if not true:
        raise AssertionError(what)


def equal(got: Any, want: Any, what: str = "") -> None:
    if got != want:
        raise AssertionError(f"{what or 'value'}\n   got {_short(got)}\n  want {_short(want)}")


def contains(text: str, part: str, what: str = "") -> None:
    if part not in text:
        raise AssertionError(f"{what or 'text'} does not contain {part!r}: {_short(text)}")


def within(seconds: float, condition: Callable[[], Any], what: str) -> Any:
    """The condition's first true value; asked until the time is over."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.01)


class Caught:
    """The exception an expectation was about."""

    value: Any = None


@contextlib.contextmanager
def raises(kind: type[Exception], **attributes: Any) -> Iterator[Caught]:
    """The body raises `kind`, with these attributes."""
    caught = Caught()
    try:
        yield caught
    except kind as error:
        caught.value = error
        for name, want in attributes.items():
            equal(getattr(error, name, None), want, f"{name} of {error!r}")
        return
    raise AssertionError(f"expected {kind.__name__}, and nothing was raised")


@contextlib.contextmanager
def status(*codes: grpc.StatusCode, naming: str = "") -> Iterator[Caught]:
    """The body's call ends with one of these codes, and a message that contains `naming`."""
    caught = Caught()
    try:
        yield caught
    except grpc.RpcError as error:
        caught.value = error
        equal_code = error.code() in codes
        that(equal_code, f"expected {[code.name for code in codes]}, got {describe(error)}")
        that(error.details(), f"{describe(error)} has no message")
        contains(error.details(), naming, f"message of {describe(error)}")
        return
    raise AssertionError(f"expected {[code.name for code in codes]}, and the call succeeded")


def describe(error: Any) -> str:
    return f"{error.code().name}: {_short(error.details())}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 600 else f"{text[:400]} … {text[-150:]}"
