"""Reading a configuration file so that no key of it is lost unnoticed."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from montessori_jax.errors import UserError


class Fields:
    """A JSON mapping that checks types and remembers which keys were read."""

    def __init__(self, values: Mapping[str, Any], origin: str, prefix: str = ""):
        self.values, self.origin, self.prefix = values, origin, prefix
        self.known = set[str]()

    def _get(self, key: str, default: Any, wanted: str, fits: Callable[[Any], bool]) -> Any:
        self.known.add(key)
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise UserError(f"{self.origin}: '{self.prefix}{key}' is missing ({wanted})")
            return default
        if not fits(value):
            raise UserError(f"{self.origin}: '{self.prefix}{key}' is {value!r}, expected {wanted}")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number; an error where it is missing and has no default."""
        return self._get(key, default, "a whole number above 0", lambda v: type(v) is int and v > 0)

    def whole(self, key: str, default: int) -> int:
        """A whole number, 0 among them."""
        wanted = "a whole number, 0 or above"
        return self._get(key, default, wanted, lambda v: type(v) is int and v >= 0)

    def optional_count(self, key: str, default: int | None) -> int | None:
        """A positive whole number or null, which is not the same as a key that is missing."""
        return None if self._null(key, default) else self.count(key, default)

    def optional_number(self, key: str, default: float | None) -> float | None:
        """A finite positive number or null, which is not the same as a key that is missing."""
        return None if self._null(key, default) else self.number(key, default)

    def _null(self, key: str, default: Any) -> bool:
        self.known.add(key)
        return self.values.get(key, default) is None

    def number(self, key: str, default: float | None = None) -> float:
        """A finite positive number."""

        def fits(value: Any) -> bool:
            return type(value) in (int, float) and 0 < value < float("inf")

        return float(self._get(key, default, "a number above 0", fits))

    def switch(self, key: str, default: bool) -> bool:
        """True or false."""
        return self._get(key, default, "true or false", lambda v: isinstance(v, bool))

    def text(self, key: str, default: str) -> str:
        """A string."""
        return self._get(key, default, "a string", lambda v: isinstance(v, str))

    def mapping(self, key: str) -> dict[str, Any]:
        """A nested mapping, empty where it is missing or null."""
        return self._get(key, {}, "a mapping", lambda v: isinstance(v, dict))

    def require(self, key: str, *allowed: Any) -> None:
        """Refuse any value but ``allowed`` (missing and null are always allowed)."""
        self.known.add(key)
        value = self.values.get(key)
        if value is not None and value not in allowed:
            wanted = " or ".join(repr(item) for item in allowed) or "none"
            raise UserError(
                f"{self.origin}: '{self.prefix}{key}' is {value!r}, which is not supported here "
                f"(only {wanted})"
            )

    def unread(self) -> list[str]:
        """Keys with a value that nothing asked for."""
        return [
            self.prefix + key
            for key, value in self.values.items()
            if key not in self.known and value is not None
        ]


def warn_unread(origin: str, keys: list[str]) -> None:
    """Name the keys of a file that nothing read."""
    if keys:
        named = ", ".join(sorted(keys))
        warnings.warn(
            f"{origin}: not read, in case they matter to this model: {named}", stacklevel=3
        )
