"""What the API reference makes of the docstrings: their doctests become blocks of code."""

import re

import griffe


class ExamplesAsCode(griffe.Extension):
    """Turn `Example:` into the section `Examples:`, which griffe reads as text and doctests."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        """Rename the section in the docstring of one object."""
        if not obj.is_alias and obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
