"""Every setting, and how YAML becomes one."""
