"""Which tests need more than the oldest versions that are supported, and why."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def older(package: str, least: str) -> bool:
    """Tell whether a package is older than a release; its development versions are not."""
    return Version(version(package)).release < Version(least).release


def needs(package: str, least: str, why: str) -> pytest.MarkDecorator:
    """Skip a test on older versions of a package, and say what they cannot do."""
    return pytest.mark.skipif(older(package, least), reason=f"{package} before {least} {why}")
