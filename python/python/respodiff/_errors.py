"""The exceptions: one class for all, and classes that are also Python's own where there is one of that meaning."""

from __future__ import annotations

from typing import Optional


class Error(Exception):
    """A failure, as data.

    `kind` is one of "invalid", "not_found", "damaged", "unsupported", "mismatch", "out_of_memory", "io", "network",
    "non_finite", "device_lost", "cancelled" and "internal"; `subject` is the argument, file or model that it is about,
    if it is about one, and `advice` says what to do, if there is something to do.
    """

    kind: str = "internal"
    subject: Optional[str] = None
    advice: Optional[str] = None


class InvalidError(Error, ValueError):
    """A value that can never work as it was given."""


class NotFoundError(Error, FileNotFoundError):
    """A file, folder, model, concept or device that is not there."""

    __str__ = Exception.__str__


class IoError(Error, OSError):
    """The operating system refused to read or write."""

    __str__ = Exception.__str__


class NetworkError(Error, ConnectionError):
    """The model server is out of reach, or refuses. It may work later."""

    __str__ = Exception.__str__


class OutOfMemoryError(Error, MemoryError):
    """More memory than there is. A smaller picture or batch may work."""


_CLASSES = {
    "invalid": InvalidError,
    "mismatch": InvalidError,
    "not_found": NotFoundError,
    "io": IoError,
    "network": NetworkError,
    "out_of_memory": OutOfMemoryError,
}

# The arguments that have other names in requests.
_ARGUMENTS = {"num_inference_steps": "steps", "guidance_scale": "guidance"}


def made(kind: str, subject: str, problem: str, advice: Optional[str]) -> Error:
    """The exception of a failure, which the engine raises."""
    subject = _ARGUMENTS.get(subject, subject)
    message = f"{subject}: {problem}" if subject else problem
    error = _CLASSES.get(kind, Error)(f"{message}; {advice}" if advice else message)
    error.kind, error.subject, error.advice = kind, subject or None, advice
    return error
