"""Forward hooks that are in place inside a `with` block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, TypeVar

Hooks = TypeVar("Hooks", bound="ForwardHooks")  # beartype does not know Self here


class ForwardHooks(ABC):
    """Watches forward passes; subclasses say of which modules, and how."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    @abstractmethod
    def hooks(self) -> Iterable[tuple[Any, Callable[..., Any]]]:
        """Return modules, each with its hook."""

    def __enter__(self: Hooks) -> Hooks:
        self._handles = [module.register_forward_hook(hook) for module, hook in self.hooks()]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
