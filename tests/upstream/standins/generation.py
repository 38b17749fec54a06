"""Stands in for the tests of text generation, which the source archive of transformers lacks."""


class GenerationTesterMixin:
    """No tests."""
