"""``peerlora schema``."""

import json


def command() -> None:
    """Print the JSON schema of a config, for editors that complete and check YAML."""
    from peerlora.config.loading import schema

    print(json.dumps(schema(), indent=2))
