"""Fixtures of the trainer's tests."""

import sys

import pytest


@pytest.fixture(autouse=True)
def shipped_only(request, monkeypatch):
    """``tiny_images`` registers a data set, a network and recipes when it is imported, for the tests of its importers;
    other tests see what is shipped."""
    tiny = sys.modules.get("tiny_images")
    if tiny is None:
        return
    if any(
        value is tiny or getattr(value, "__module__", "") == "tiny_images" for value in vars(request.module).values()
    ):
        return
    for registry in (tiny.DATASETS, tiny.MODELS, tiny.IMAGE_RECIPES):
        for name in tiny.REGISTERED & registry.keys():
            monkeypatch.delitem(registry, name)
