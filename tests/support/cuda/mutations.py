"""Bugs planted in sources: each gives the sources of a program that has it."""

from __future__ import annotations

import re

from cuda.sources import Edit, Texts

SHARED_FILES = ("cuda/runtime.h", "cuda/elements.h", "cuda/mma.h")  # not a program's own


def replaced(pattern: str, by: str, number: int = 0) -> Edit:
    """The match of a regular expression with that number, in the program's own files in order."""

    def edit(texts: Texts) -> Texts:
        left, edited = number, dict(texts)
        for name in sorted(texts.keys() - set(SHARED_FILES)):
            matches = list(re.finditer(pattern, texts[name]))
            if left < len(matches):
                match, text = matches[left], texts[name]
                edited[name] = text[: match.start()] + match.expand(by) + text[match.end() :]
                assert edited[name] != text, f"{pattern} is replaced by the same"
                return edited
            left -= len(matches)
        raise AssertionError(f"{pattern} is found {number - left} times; asked for number {number}")

    return edit


def without_barrier(number: int = 0) -> Edit:
    return replaced(r"__sync(threads|warp)\(\);", ";", number)


def without_wait(number: int = 0) -> Edit:
    return replaced(r"wait_for_copies<\w+>\(\);", ";", number)
