"""What is trained on: tasks, prompts, conversations, rewards and their noise."""

import traceback
from pathlib import Path


class InputError(ValueError):
    """What the user gave cannot work: one line with the flag or row, the find, the expectation."""


def one_line(error):
    """The beginning of an exception's text without line breaks; its kind where it has no text."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def raised(error):
    """What a user's code raised and where, in one line: kind, text, file and line."""
    file, line = traceback.extract_tb(error.__traceback__)[-1][:2]
    text = one_line("".join(traceback.format_exception_only(error))).rstrip(":")
    return f"it raised {text} ({Path(file).name}, line {line})"
