"""stub until setup merges."""

extension = None
extension_error: str | None = "not built"
