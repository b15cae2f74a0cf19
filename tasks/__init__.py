"""What is trained on: tasks, prompts, conversations, rewards and their noise."""

import traceback
from pathlib import Path


class InputError(ValueError):
    """What the user gave cannot work: one line with the flag or row, the find, the expectation."""


def as_messages(said, role="user"):
    """Messages as they are; a text is one message, of role."""
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def one_line(error):
    """The beginning of an exception's text without line breaks; its kind where it has no text."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def raised(error):
    """What a user's code raised, with file and line, in one line."""
    file, line = traceback.extract_tb(error.__traceback__)[-1][:2]
    return f"it raised {error!r:.160} ({Path(file).name}, line {line})"
