"""What is trained on: tasks, prompts, conversations, rewards and their noise."""

import contextlib
import traceback
from pathlib import Path

# What is loaded runs no code of its own, nobody is asked whether it may, and nothing is unpickled.
SAFE = {"trust_remote_code": False}
WEIGHTS = {"dtype": "float32", "use_safetensors": True, "output_loading_info": True, **SAFE}


class InputError(ValueError):
    """What the user gave cannot work: one line with the flag or row, the find, the expectation."""


def as_messages(said, role="user"):
    """Messages as they are; a text is one message, of role."""
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def one_line(error):
    """An exception's text without line breaks, both ends of a long one; its kind if it has none."""
    text = " ".join(str(error).split()) or f"{type(error).__name__} without a message"
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


@contextlib.contextmanager
def naming(what):
    """Whatever a library raises is an InputError: what could not be done, and why."""
    try:
        yield
    except Exception as error:
        # What is wrong with a file, datasets says in the cause alone.
        is_vague = "while generating the dataset" in str(error)
        raise InputError(f"{what}: {one_line(error.__cause__ if is_vague else error)}") from error


@contextlib.contextmanager
def users_code(flag):
    """Whatever a user's code raises is an InputError with its file and line; not so Ctrl-C."""
    try:
        yield
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:
        where = ""
        for file, line, *_ in traceback.extract_tb(error.__traceback__):
            if Path(file).parent != Path(__file__).parent and "importlib" not in file:
                where = f" ({Path(file).name}, line {line})"
        raise InputError(f"{flag}: it raised {one_line(repr(error))}{where}") from error
