"""A snapshot's chat template, rendered under limits of time, memory and length, because the template is untrusted.

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

SECONDS = 5  # of processor time for one conversation; a published template takes milliseconds
MEMORY = 2**29  # bytes, in addition to the memory of the process at its start
CHARACTERS = 2**22
# What a template can raise: Jinja's errors, and the errors of the arithmetic and the methods that a template uses.
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
# A function from messages, and whether the assistant's turn is opened at their end, to text.
Render = Callable[[list[dict[str, Any]], bool], str]


class TemplateStopped(InputError):
    """The template exceeded a limit, so it is not tried on another sample."""


def renderer(tokenizer: Any) -> Render:
    """The template of a tokenizer without limits, for a template of this project.

    Raises:
        InputError: at a call, if the template raises an error or makes too long a text.
    """

    def render(messages: list[dict[str, Any]], opened: bool) -> str:
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
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
    """The template of a tokenizer, rendered in a process of its own that ends when the template exceeds a limit.

    Jinja's sandbox keeps a template from files and programs, but not from nested loops or texts of gigabytes.

    Raises:
        InputError: at a call of the yielded function, if the template raises an error.
        TemplateStopped: at a call of the yielded function, if the template exceeds the limit of time.
    """
    # A forked process has the tokenizer already; a new process would need seconds for its imports.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, ours, tokenizer), daemon=True)
    process.start()
    theirs.close()

    def render(messages: list[dict[str, Any]], opened: bool) -> str:
        text: str
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
    """Render all messages that arrive, until the other side closes the connection."""
    other_end.close()  # otherwise this process would keep its own input open
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
