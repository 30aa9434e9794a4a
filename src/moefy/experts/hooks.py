"""Forward hooks that are in place inside a `with` block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Hooks = TypeVar("Hooks", bound="ForwardHooks")  # beartype does not know Self here


class ForwardHooks(ABC):
    """Watches forward passes; subclasses say of which modules, and how."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    @abstractmethod
    def hooks(self) -> Iterable[tuple[Any, Callable[..., Any]]]:
        """Return modules, each with its hook."""

    def begin(self) -> None:  # noqa: B027 - most subclasses change nothing but the outputs
        """Prepare the model before the hooks are in place."""

    def end(self) -> None:  # noqa: B027
        """Undo `begin`, on errors too."""

    def __enter__(self: Hooks) -> Hooks:
        self.begin()
        self._handles = [module.register_forward_hook(hook) for module, hook in self.hooks()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.end()
