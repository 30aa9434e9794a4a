"""How every FFN of a model is cut into experts: one value for the three counts."""

from __future__ import annotations

from dataclasses import dataclass

from moefy.errors import UsageError


@dataclass(frozen=True)
class Preset:
    """What `--for` chooses: of the counts, the first with the best expert size; shares of them."""

    experts: tuple[int, ...]
    active: float = 1 / 2  # of all slices
    shared: float = 1 / 2  # of the active ones, where the target can hold a shared expert
    sizes: tuple[int, ...] = (128, 64, 32, 8, 1)  # multiples that kernels want, the best first

    def count(self, intermediate_size: int) -> int:
        """Return the number of slices."""
        counts = [n for n in self.experts if intermediate_size % n == 0]
        for size in self.sizes:
            for experts in counts:
                if intermediate_size // experts % size == 0:
                    return experts
        # the largest that leaves slices of one size
        return max(n for n in range(1, 65) if intermediate_size % n == 0)


PRESETS = {
    "speed": Preset((8, 16)),
    "quality": Preset(tuple(range(64, 31, -1)), shared=0),
}
_USUAL = Preset(tuple(range(64, 0, -4)), sizes=(8,))


@dataclass(frozen=True, order=True)
class Split:
    """Slices of equal size that every FFN is cut into.

    All three counts are slices: 4 of 16 with 2 shared is one shared expert of two slices, and 2 of
    14 routed experts that run for a token.

    Attributes:
        experts: E, all slices.
        active: k, slices that run for a token.
        shared: slices that run for every token, part of `active`; together one shared expert.
    """

    experts: int
    active: int
    shared: int = 0

    @classmethod
    def of(
        cls,
        intermediate_size: int,
        experts: int | None = None,
        active: int | None = None,
        shared: int | None = None,
        preset: str | None = None,
    ) -> Split:
        """Return the split of a model with the usual number for every count that is None.

        `experts` is the largest multiple of 4 up to 64 that leaves experts of a multiple of 8
        neurons (grouped matrix products in 16-bit weights need that), `active` half of `experts`,
        `shared` half of `active`; or as one of `PRESETS` says. What `check` refuses is a
        UsageError.
        """
        chosen = PRESETS[preset] if preset else _USUAL
        experts = chosen.count(intermediate_size) if experts is None else experts
        active = max(1, round(chosen.active * experts)) if active is None else active
        split = cls(experts, active, int(chosen.shared * active) if shared is None else shared)
        split.check(intermediate_size)
        return split

    @property
    def routed(self) -> int:
        """Experts that the router chooses from."""
        return self.experts - self.shared

    @property
    def chosen(self) -> int:
        """Routed experts that run for a token; 0 where the result is a smaller dense model."""
        return self.active - self.shared

    def size(self, intermediate_size: int) -> int:
        """Return the neurons of one slice."""
        return intermediate_size // self.experts

    def check(self, intermediate_size: int) -> None:
        """Refuse a split that a model with this d_ff does not allow.

        Raises:
            UsageError: E does not divide d_ff (the nearest counts that do are named), or not
                1 <= k <= E, or more slices are shared than run.
        """
        if not 1 <= self.active <= self.experts:
            raise UsageError(
                f"{self.active} active experts of {self.experts} is impossible: --active must be "
                f"between 1 and --experts ({self.experts})"
            )
        if not 0 <= self.shared <= self.active:
            raise UsageError(
                f"{self.shared} shared of {self.active} active experts is impossible: --shared "
                f"must be between 0 and --active ({self.active}); where all are shared, the "
                "result is a smaller dense model"
            )
        if intermediate_size % self.experts == 0:
            return
        divisors = [n for n in range(1, intermediate_size + 1) if intermediate_size % n == 0]
        below = max(n for n in divisors if n < self.experts)
        above = min((n for n in divisors if n > self.experts), default=None)
        counts = f"{below} and {above}" if above else f"{below}"
        flags = f"--experts {below}" + (f" or --experts {above}" if above else "")
        raise UsageError(
            f"intermediate_size {intermediate_size} cannot be split into {self.experts} equal "
            f"experts; the nearest counts that can are {counts}: pass {flags}"
        )
