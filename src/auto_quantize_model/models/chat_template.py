"""A snapshot's chat template, rendered under limits of time, memory and length, because a stranger wrote it.

In: messages and a tokenizer. Out: the text that the template makes of them, or an error that says what went wrong.
"""

import multiprocessing
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import psutil
from jinja2 import TemplateError

from auto_quantize_model.files import InputError

SECONDS = 5  # of processor time, for one conversation; a published template takes milliseconds
MEMORY = 2**29  # bytes, beyond what the process has when it starts
CHARACTERS = 2**22
# What a template can raise: the errors of Jinja, and those of the arithmetic and the methods that it uses.
TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    MemoryError,
    AssertionError,
)
# Messages and whether the assistant's turn is opened at their end, to text.
Render = Callable[[list[dict[str, Any]], bool], str]


class TemplateStopped(InputError):
    """The template broke a limit, so it is not tried on another sample."""


def renderer(tokenizer: Any) -> Render:
    """The template of a tokenizer without limits, for a template of our own.

    Raises:
        InputError: when it is called and the template raises an error or makes too long a text.
    """

    def render(messages: list[dict[str, Any]], opened: bool) -> str:
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
            text.encode()  # a template can write half of a character, which no tokenizer takes
        except TEMPLATE_ERRORS as error:
            problem = f"{type(error).__name__}: {str(error)[:200]}".removesuffix(": ")
            raise InputError(
                f"the chat template fails ({problem}); change the sample, or complete the snapshot's template"
            ) from None
        if len(text) > CHARACTERS:
            raise InputError(
                f"the chat template makes a text of {len(text)} characters, over the limit of {CHARACTERS}; shorten the"
                " sample, or use another template"
            )
        return text

    return render


@contextmanager
def limited_renderer(tokenizer: Any) -> Iterator[Render]:
    """The template of a tokenizer, rendered in a process of its own that ends where it breaks a limit.

    Jinja's sandbox keeps a template from files and programs, but not from loops within loops or texts of gigabytes.

    Raises:
        InputError: when what is yielded is called and the template raises an error.
        TemplateStopped: when what is yielded is called and the template breaks the limit of time.
    """
    # A fork has the tokenizer already; a new process would import for seconds.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, ours, tokenizer), daemon=True)
    process.start()
    theirs.close()

    def render(messages: list[dict[str, Any]], opened: bool) -> str:
        try:
            ours.send((messages, opened))
            text, problem = ours.recv()
        except (EOFError, OSError):
            process.join()
            reason = (
                f"takes more than {SECONDS} seconds for one sample"
                if process.exitcode == -signal.SIGXCPU
                else f"ended its process (exit code {process.exitcode})"
            )
            raise TemplateStopped(f"the chat template {reason}; use another template") from None
        if problem is not None:
            raise InputError(problem)
        return text

    try:
        yield render
    finally:
        ours.close()
        process.join()


def _serve(connection: Connection, other_end: Connection, tokenizer: Any) -> None:
    """Render what comes until the other side closes the connection."""
    other_end.close()  # else this process would keep its own input open
    memory = psutil.Process().memory_info().vms + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    render = renderer(tokenizer)
    while True:
        try:
            messages, opened = connection.recv()
        except EOFError:
            return
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + SECONDS, resource.RLIM_INFINITY))
        try:
            answer: tuple[str | None, str | None] = render(messages, opened), None
        except InputError as error:
            answer = None, str(error)
        connection.send(answer)
