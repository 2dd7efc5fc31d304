"""The one table that maps class names to label values and colours."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from medray.errors import ConfigError, SlideError

# Colour-blind safe (Okabe and Ito 2008), in the order in which classes take them.
_PALETTE = (
    "#d55e00",
    "#0072b2",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#f0e442",
    "#999999",
)


@dataclass(frozen=True)
class Classes:
    """Class names by label value; value 0 is always the background.

    Attributes:
        names: Unique names; a name's position is its label value. At most 255.
    """

    names: tuple[str, ...] = ("background", "tumour")

    def __post_init__(self) -> None:
        """Check that there is a background, something else, and no name twice."""
        object.__setattr__(self, "names", tuple(self.names))
        if not 2 <= len(self.names) <= 255:
            raise ConfigError(
                f"classes: expected 2 to 255 names, the background first, "
                f"found {list(self.names)}"
            )
        if len(set(self.names)) != len(self.names) or not all(self.names):
            raise ConfigError(
                f"classes: every name must be unique and not empty, "
                f"found {list(self.names)}"
            )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def colors(self) -> tuple[str, ...]:
        """One #rrggbb colour per class; black for the background."""
        foreground = (_PALETTE[i % len(_PALETTE)] for i in range(len(self) - 1))
        return ("#000000", *foreground)

    def value(self, name: str | None) -> int:
        """Return the label value of `name`.

        An annotation without a class means the foreground class if there is just one.

        Raises:
            SlideError: The class is unknown, or missing where several are possible.
        """
        if name is None:
            if len(self) == 2:
                return 1
            raise SlideError(
                f"an annotation carries no class, and it could be any of "
                f"{list(self.names[1:])}; name its class in the annotation file, or "
                f"remove it"
            )
        if name in self.names:
            return self.names.index(name)
        close = difflib.get_close_matches(name, self.names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise SlideError(
            f"unknown class {name!r}; known classes: {list(self.names)}{hint} "
            f"(--classes names them, the first is the background, whatever its name)"
        )


class AnyClass(Classes):
    """Takes areas of any class for `inside`, where only the outline matters."""

    def __init__(self) -> None:
        super().__init__(("outside", "inside"))

    def value(self, name: str | None) -> int:
        """Return 1 for any name."""
        return 1


def rgb_of(color: str) -> tuple[int, int, int]:
    """Return red, green and blue, 0 to 255, of `#rrggbb`."""
    red, green, blue = bytes.fromhex(color[1:])
    return red, green, blue
