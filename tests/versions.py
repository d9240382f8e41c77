"""Which tests need more than the oldest versions that are supported, and why."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def needs(package: str, least: str, why: str) -> pytest.MarkDecorator:
    """Skip a test on older versions of a package, and say what they cannot do."""
    older = Version(version(package)).release < Version(least).release
    return pytest.mark.skipif(older, reason=f"{package} before {least} {why}")
