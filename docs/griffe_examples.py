"""The section ``Example`` of our docstrings, read by griffe as ``Examples``: code, not prose."""

import re
from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """Renames the section wherever it stands."""

    def on_object(self, *, obj: Object, **_kwargs: Any) -> None:
        """Called by griffe for each object that it has loaded."""
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
