"""Every error that fastgrad raises on purpose: each names the thing and the remedy."""

from __future__ import annotations

from collections.abc import Sequence


class FastgradError(Exception):
    """Base class: catch this to catch all that the library raises on purpose."""


class BlockSpecError(FastgradError, ValueError):
    """A block granularity that is not known, or does not fit the parameter."""


class CoverageError(FastgradError):
    """A parameter whose gradient the probe cannot attribute to examples exactly."""


class ProbeError(FastgradError):
    """The probe was used in a way that would give wrong numbers."""


class StatsError(FastgradError, ValueError):
    """Gradient statistics that cannot be computed, merged or read."""


class NonFiniteGradientError(FastgradError, FloatingPointError):
    """A gradient holds NaN or infinity. ``names`` lists the parameters concerned."""

    def __init__(self, names: Sequence[str], consequence: str) -> None:
        self.names = list(names)
        shown = ", ".join(self.names[:5]) + (
            f" and {len(self.names) - 5} more" if len(self.names) > 5 else ""
        )
        super().__init__(
            f"non-finite gradient (NaN or infinity) in: {shown}. {consequence} "
            "Remedy: lower the learning rate, clip gradients, check the batch for empty label "
            "masks, or use a GradScaler with float16."
        )


class SelectionError(FastgradError, ValueError):
    """A selection that is empty, does not fit the model, or names unknown parameters."""


class PartialError(FastgradError, RuntimeError):
    """A partial model that cannot be built, or is used after its removal."""


class BlueprintError(FastgradError, ValueError):
    """A blueprint file that is damaged, of a newer major version, or for other weights."""


class DeltaError(FastgradError, ValueError):
    """A delta file that is damaged or was made for other base weights."""


class ResourceError(FastgradError, ValueError):
    """A resource model or a plan with impossible numbers."""


class PrivacyError(FastgradError, ValueError):
    """A private release that would not be what it claims to be."""


class MissingExtraError(FastgradError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs the package '{package}', which is not installed. "
            f"Remedy: pip install 'fastgrad[{extra}]'"
        )
