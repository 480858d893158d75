"""Optional packages, which the core does without."""

from importlib.util import find_spec

from switchmamba.errors import ConfigError


def require(package: str, extra: str, purpose: str) -> None:
    """Raise ConfigError, which says how to install it, if ``package`` is not there; nothing is imported.

    Args:
        package: a top-level module.
        extra: of this project, to which the package belongs.
        purpose: what needs it.
    """
    if find_spec(package) is None:
        raise ConfigError(f"{purpose} needs {package}: pip install 'switchmamba[{extra}]'")
