"""What commands share: a model by its name, and errors as sentences."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["build_model", "guarded", "image_shape", "say"]

Command = Callable[[argparse.Namespace], int]


def build_model(name: str) -> nn.Module:
    """The model of ``package.module:factory``, a function without arguments or a model itself.

    The current folder is importable. What is wrong is said as a ValueError.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"the model must be given as package.module:factory; got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"cannot import {module_name!r}: {type(error).__name__}: {error}"
        ) from error
    factory: Any = module
    for part in attribute.split("."):
        if not hasattr(factory, part):
            raise ValueError(f"module {module_name!r} has no {attribute!r}")
        factory = getattr(factory, part)
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise ValueError(f"{name} must be callable without arguments; got {factory!r}")
    try:
        model = factory()
    except Exception as error:
        raise ValueError(f"{name}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name}() must return a torch.nn.Module; got {type(model).__name__}")
    return model


def image_shape(text: str) -> tuple[int, ...]:
    """N x C x H x W."""
    sizes = text.lower().split("x")
    if len(sizes) != 4 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(
            f"expected NxCxHxW, each at least 1, such as 1x512x128x128; got {text!r}"
        )
    return tuple(map(int, sizes))


def say(text: str) -> None:
    print(text, file=sys.stderr)


def guarded(name: str, run: Command) -> Command:
    """A command whose errors are sentences, with exit status 2."""

    def guarded(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except (ValueError, TypeError, ImportError, OSError) as error:
            message = str(error)
            say(message if message.startswith(name) else f"{name}: {message}")
            return 2

    return guarded
