"""Stands in for the tests of the exporters, which the source archive of transformers lacks."""


class ExportTesterMixin:
    """No tests."""
