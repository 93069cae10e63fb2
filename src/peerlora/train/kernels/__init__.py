"""Fast forms of the frozen base's operations, each with a plain twin."""
